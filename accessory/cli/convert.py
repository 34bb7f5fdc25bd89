"""``python -m accessory convert SRC DST``: weights from one layout to another; the only place that reads pickles.

A model or generator folder of ours (``runs/NAME/final``) becomes one to hand on: ``--dtype`` makes it smaller,
``--base`` names the base as others have it. A checkpoint (``runs/NAME/step-NNNNNN``) counts as the folder that its run
would have exported then.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accessory.backbone.llama import Llama, LlamaConfig
    from accessory.models.gate import Bound, Measure, Row
    from accessory.peft.quantize import Quantization

    Read = Callable[[], tuple[LlamaConfig, dict[str, Tensor]]]

TARGET_HELP = "layout of DST; model: a model folder, of LLaMA2-Accessory's that sees or a release of LLaMA-Adapter"
DTYPES = ("bfloat16", "float16", "float32")
SKIPPED = "not compared (--skip-gate)"
_WHOLE = ("source", "overlay", "dtype", "tokenizer", "tolerance", "skip_gate")
_WAYS: dict[tuple[bool, str], tuple[str, ...]] = {
    (False, "accessory"): (*_WHOLE, "quantize", "tensor_parallel", "max_shard_gb"),
    (False, "hf"): (*_WHOLE, "max_shard_gb"),
    (False, "reference"): (*_WHOLE, "tensor_parallel", "sparse"),
    (False, "model"): (
        "source", "overlay", "tokenizer", "tolerance", "skip_gate", "llama_type", "prefix_gate", "clip_activation",
        "bgr",
    ),
    (True, "accessory"): ("dtype", "quantize", "base", "tolerance", "skip_gate"),
    (True, "reference"): (),
}  # fmt: skip
"""The options of each way, by whether SRC is a trained folder and by ``--to``: no other is taken."""
_DEFAULTS = {"source": "auto", "overlay": (), "sparse": False, "skip_gate": False, "bgr": False, "max_shard_gb": 5.0}
"""Of options that are something when they are not given."""


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("convert", help="convert weights between layouts")
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="folder of weights, a .gguf file, or a trained folder or checkpoint"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder")
    layouts = ("auto", "accessory", "hf", "meta", "gguf")
    parser.add_argument("--from", dest="source", choices=layouts, default="auto", help="layout of SRC (default: auto)")
    over = "folders laid over SRC; --to model: also LLaMA-Adapter's .pth files, and the file of the CLIP they see with"
    parser.add_argument("--overlay", type=Path, nargs="+", default=(), metavar="DIR", help=over)
    targets = ("accessory", "hf", "reference", "model")
    parser.add_argument("--to", dest="target", choices=targets, default="accessory", help=TARGET_HELP)
    parser.add_argument("--sparse", action="store_true", help="block-sparse experts (only --to reference)")
    parser.add_argument("--dtype", choices=DTYPES, help="cast (default: as stored; GGUF: bfloat16)")
    parser.add_argument(
        "--quantize", metavar="KIND", help="write int8, int4 or nf4 weights (only --to accessory, or of a model folder)"
    )
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="write N shards (not --to hf)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer from here (default: SRC)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="split larger files (default: 5)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest move of a logit, relative to the largest; with --quantize nats a position (default: by type and "
        "KIND)",
    )
    parser.add_argument("--skip-gate", action="store_true", help="do not compare logits before and after")
    parser.add_argument("--base", metavar="DIR", help="of a trained folder: its base, the same in another precision")
    kinds = "only --to model: a llama_type or a release (default: that of SRC/meta.json, or by the names in the file)"
    parser.add_argument("--llama-type", metavar="TYPE", help=kinds)
    gates = "only for LLaMA-Adapter's files (default: what the published code runs them with, raw for V1)"
    parser.add_argument("--prefix-gate", choices=("tanh", "raw"), help=gates)
    parser.add_argument(
        "--clip-activation",
        choices=("gelu", "quick_gelu"),
        help="only --to model: what CLIP runs with (default: what the published code runs the released files with)",
    )
    bgr = "only --to model: show the encoder red as blue, as LLaMA-Adapter V2 and ImageBind-LLM were trained"
    parser.add_argument("--bgr", action="store_true", help=bgr)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Convert, compare the logits of fixed prompts before and after, and print what was written.

    Raises:
        ValueError: for options that exclude each other and everything that reading or writing refuses.
        GateError: when what was written is not the same model; it is removed then.
    """
    import torch

    from accessory.backbone.hf import TOKENIZER_FILES, has_tokenizer
    from accessory.backbone.weights import detect
    from accessory.peft.quantize import Quantization
    from accessory.train.checkpoint import MARKER

    spec = Quantization.parse(args.quantize) if args.quantize is not None else None
    if (args.src / MARKER).is_file():
        return _checkpoint(args)
    trained = (args.src / "config.yaml").is_file()
    _check(args, trained)
    if trained:
        return _trained(args, spec)
    if args.target == "model":
        return _pictured(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    layout = detect(args.src) if args.source == "auto" else args.source
    tokenizer = args.tokenizer
    if tokenizer is None and args.src.is_dir() and has_tokenizer(args.src):
        tokenizer = args.src
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ValueError(f"--tokenizer {tokenizer} holds no tokenizer")
    held, said = _convert(args, layout, dtype, spec, tokenizer)
    if args.target != "hf" and tokenizer is not None:
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, args.dst / file)
    print(f"{args.dst}: {args.target} layout, {held} (read as {layout})")
    print(f"logits of the fixed prompts: {said}")
    if tokenizer is not None:
        print(f"tokenizer: that of {tokenizer}")
    elif layout == "gguf":
        print("tokenizer: none written, the one inside a GGUF file is not converted; --tokenizer DIR takes one along")
    else:
        print("tokenizer: none written, there is none in SRC; --tokenizer DIR takes one along")
    return 0


def _convert(
    args: argparse.Namespace, layout: str, dtype: torch.dtype | None, spec: Quantization | None, words: Path | None
) -> tuple[str, str]:
    """Read, measure, write and compare. Returns what was written, and how far it moved, in words."""
    from functools import partial

    import torch

    from accessory.backbone.gguf import load_gguf, single_file
    from accessory.backbone.store import cast
    from accessory.backbone.weights import from_tensors, read_folder
    from accessory.models.gate import hold, measure

    def read() -> tuple[LlamaConfig, dict[str, Tensor]]:
        if layout == "gguf" and not args.overlay:
            return load_gguf(single_file(args.src), dtype or torch.bfloat16)
        return read_folder(args.src, layout=layout, pickles=True, overlays=args.overlay)  # type: ignore[arg-type]

    config, tensors = read()
    rows = [] if words is None else _texts(words, config)
    before = None if args.skip_gate else measure(from_tensors(config, tensors), rows)
    held = f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters"
    if spec is not None:
        del config, tensors  # or what is mapped of them would stay beside the quantised ones
        return f"{held} as {args.quantize}", _quantize(args, layout, read, dtype, spec, before, rows)
    _write(args, config, cast(tensors, dtype), words)
    if before is None:
        return held, SKIPPED
    measured = partial(measure, rows=rows)
    moved = hold(before, args.dst, "converting to", tolerance=args.tolerance, opened=_open, measured=measured)
    return held, _moved(moved)


def _moved(moved: float) -> str:
    return f"moved by {moved:.2g} of their largest"


def _quantize(
    args: argparse.Namespace,
    layout: str,
    read: Read,
    dtype: torch.dtype | None,
    spec: Quantization,
    before: Measure | None,
    rows: Sequence[Row],
) -> str:
    """Write quantised weights, read a layer at a time where the layout allows it; returns how far the prompts moved.

    Three gates: what fewer bits cost is bounded before anything is written; what was written has to give the logits of
    what was made; and each of its weights has to be what its code explains.
    """
    from functools import partial

    from accessory.backbone import quantized
    from accessory.backbone.weights import quantized_from_tensors
    from accessory.models.gate import check_codes, check_drift, hold, measure

    source = quantized.open_folder(args.src, layout) if args.src.is_dir() and not args.overlay else None
    if source is None:
        model = quantized_from_tensors(*read(), spec, dtype=dtype)
    else:
        model = quantized.load(source, spec, dtype, "cpu")
    said, after, bound = SKIPPED, None, _bound(args, spec)
    if before is not None:
        after = measure(model, rows)
        said = f"moved by {check_drift(before, after, f'quantising {args.src} as {args.quantize}', bound)}"
    quantized.save_quantized(model, args.dst, max_shard_bytes=int(args.max_shard_gb * 1e9))
    del model
    if after is not None:
        readers = source.readers if source is not None else {k: partial(_itself, v) for k, v in read()[1].items()}

        def inspect(written: Llama, _: Measure) -> None:
            check_codes(written, lambda name: readers[f"{name}.weight"](), f"quantising {args.src}")

        hold(after, args.dst, "writing", opened=_open, measured=partial(measure, rows=rows), inspect=inspect)
    return said


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _bound(args: argparse.Namespace, spec: Quantization) -> Bound:
    """What a kind may cost; ``--tolerance`` says it in nats, and then nothing is asked of the likeliest tokens."""
    from dataclasses import replace

    from accessory.models.gate import QUANTISED

    bound = QUANTISED[spec.kind]
    return bound if args.tolerance is None else replace(bound, nats=args.tolerance, agreement=0.0)


def _write(args: argparse.Namespace, config: LlamaConfig, tensors: dict[str, Tensor], tokenizer: Path | None) -> None:
    """Write the folder that the options ask for."""
    from accessory.backbone.hf import write_hf
    from accessory.backbone.meta import save_shards
    from accessory.backbone.reference_folders import write_reference
    from accessory.backbone.weights import save_accessory

    limit = int(args.max_shard_gb * 1e9)
    if args.target == "hf":
        write_hf(config, tensors, args.dst, tokenizer, limit)
    elif args.target == "reference":
        write_reference(config, tensors, args.dst, args.tensor_parallel or 1, args.sparse)
    elif args.tensor_parallel is not None:
        save_shards(config, tensors, args.dst, args.tensor_parallel)
    else:
        save_accessory(config, tensors, args.dst, max_shard_bytes=limit)


def _open(folder: Path) -> Llama:
    """What was written, read again; LLaMA2-Accessory's files are pickles."""
    from accessory.backbone.quantized import stored_quantization
    from accessory.backbone.weights import from_tensors, load_backbone, read_folder

    if stored_quantization(folder) is not None:
        return load_backbone(folder)
    return from_tensors(*read_folder(folder, pickles=True))


def _check(args: argparse.Namespace, trained: bool) -> None:
    """Refuse every option that the way from SRC to ``--to`` would not heed."""
    allowed = _WAYS.get((trained, args.target))
    if allowed is None:
        raise ValueError(
            f"{args.src} is a folder of trained tensors beside a base, --to {args.target} is for whole models"
        )
    for name in dict.fromkeys(option for options in _WAYS.values() for option in options):
        value = getattr(args, name)
        if name in allowed or value == _DEFAULTS.get(name):
            continue
        flag = "--from" if name == "source" else f"--{name.replace('_', '-')}"
        what = "trained tensors" if trained else "whole weights"
        raise ValueError(
            f"{flag} needs {' or '.join(_way(*way) for way, options in _WAYS.items() if name in options)}; "
            f"{args.src} holds {what} and goes --to {args.target}"
        )
    if args.quantize is not None and args.tensor_parallel is not None:
        raise ValueError(f"--quantize {args.quantize} goes with no --tensor-parallel, got {args.tensor_parallel}")
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb must be positive, got {args.max_shard_gb}")


def _way(trained: bool, target: str) -> str:
    return f"a model or generator folder --to {target}" if trained else f"--to {target}"


def _texts(folder: Path, config: LlamaConfig) -> list[Row]:
    """The fixed texts in the words of a tokenizer; none, and ids are asked instead, where it cannot be read. It may
    have more ids than the model, for padding say, that no text comes to."""
    from accessory.data import tokenizer
    from accessory.models.gate import text_rows

    try:
        words = tokenizer.load(folder)
        rows = text_rows(words)
    except ValueError as error:
        print(f"{error}: the model is compared by ids in place of texts", file=sys.stderr)
        return []
    if (top := max(int(ids.max()) for ids, _ in rows)) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {words.vocab_size} ids and the model {config.vocab_size} rows: there is "
            f"none for id {top} of the fixed prompts"
        )
    return rows


def _pictured(args: argparse.Namespace) -> int:
    """A model with its encoders, or with prefixes, which no plain language model has."""
    from accessory.backbone.hf import has_tokenizer
    from accessory.models.reference_folder import convert_pictured, hold_pictured

    if args.source not in ("auto", "meta"):
        raise ValueError(f"--to model takes SRC as it is: no --from {args.source}")
    if args.tokenizer is not None and not has_tokenizer(args.tokenizer):
        raise ValueError(f"--tokenizer {args.tokenizer} holds no tokenizer")
    folders = [args.src, *args.overlay]
    config = convert_pictured(
        folders,
        args.dst,
        kind=args.llama_type,
        activation=args.clip_activation,
        pickles=True,
        tokenizer=args.tokenizer,
        gate=args.prefix_gate,
        bgr=args.bgr,
    )
    said = SKIPPED
    if not args.skip_gate:
        moved = hold_pictured(
            folders, args.dst, kind=args.llama_type, pickles=True, gate=args.prefix_gate, tolerance=args.tolerance
        )
        said = "not compared, SRC has no tokenizer" if moved is None else _moved(moved)
    sees = "no tower" if config.tower is None else f"the tower {config.tower.preset}"
    print(f"{args.dst}: model folder with {sees}, template {config.template}")
    for name, digest in () if config.tower is None else config.tower.encoders.items():
        print(f"encoder {name}: {digest}")
    print(f"logits of the fixed prompts: {said}")
    return 0


def _adapter(args: argparse.Namespace) -> int:
    """What was trained as a file of LLaMA-Adapter's own."""
    from accessory.models.adapter_release import write_release

    kind = write_release(args.src, args.dst)
    print(f"{args.dst}/{kind}.pth: what {args.src} has beside its language model and its encoder")
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    """What a checkpoint's run would have exported, converted."""
    from tempfile import TemporaryDirectory

    from accessory.train.consolidate import model_folder

    args.dst.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{args.dst.name}.", dir=args.dst.parent) as private:
        model_folder(args.src, Path(private) / "final")
        args.src = Path(private) / "final"
        return main(args)


def _trained(args: argparse.Namespace, spec: Quantization | None) -> int:
    import torch

    from accessory.models.export import export, hold_export

    if args.target == "reference":
        return _adapter(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    made = export(args.src, args.dst, dtype, args.base, spec)
    moved = SKIPPED
    if not args.skip_gate:
        bound = None if spec is None else _bound(args, spec)
        found = hold_export(args.src, args.dst, dtype, args.tolerance, bound, args.base)
        moved = _moved(found) if isinstance(found, float) else f"moved by {found}"
    count, size = (sum(f(t) for t in made.tensors.values()) for f in (torch.Tensor.numel, lambda t: t.nbytes))
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in made.tensors.values()}))
    print(f"{args.dst}: {made.kind}, {len(made.tensors)} tensors, {count:,} numbers in {size / 1e6:.1f} MB ({kinds})")
    print(f"fixed prompts: {moved}" + ("" if spec is None else f"; the backbone is quantised as {spec.kind} when read"))
    for name in made.outside:
        print(f"it names {name}, which is not among the shipped models and has to go with it", file=sys.stderr)
    return 0
