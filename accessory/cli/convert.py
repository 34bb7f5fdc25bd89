"""``python -m accessory convert SRC DST``: weights from one layout to another; the only place that reads pickles.

A model or generator folder of ours (``runs/NAME/final``) becomes one to hand on: ``--dtype`` makes it smaller,
``--base`` names the base as others have it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from accessory.backbone.llama import Llama, LlamaConfig
    from accessory.models.gate import Measure
    from accessory.peft.quantize import Quantization

TARGET_HELP = "layout of DST; model: a model folder, of LLaMA2-Accessory's that sees or a release of LLaMA-Adapter"
DTYPES = ("bfloat16", "float16", "float32")


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("convert", help="convert weights between layouts")
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of weights, a .gguf file, or a trained folder")
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder")
    layouts = ("auto", "accessory", "hf", "meta", "gguf")
    parser.add_argument("--from", dest="source", choices=layouts, default="auto", help="layout of SRC (default: auto)")
    over = "folders laid over SRC; --to model: also LLaMA-Adapter's .pth files, and the file of the CLIP they see with"
    parser.add_argument("--overlay", type=Path, nargs="+", default=(), metavar="DIR", help=over)
    targets = ("accessory", "hf", "reference", "model")
    parser.add_argument("--to", dest="target", choices=targets, default="accessory", help=TARGET_HELP)
    parser.add_argument("--sparse", action="store_true", help="block-sparse experts (only --to reference)")
    parser.add_argument("--dtype", choices=DTYPES, help="cast (default: as stored; GGUF: bfloat16)")
    parser.add_argument("--quantize", metavar="KIND", help="write int8, int4 or nf4 weights (only --to accessory)")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="write N shards (not --to hf)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer from here (default: SRC)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="split larger files (default: 5)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest move of a logit, relative to the largest (default: by type and KIND)",
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

    from accessory.backbone.gguf import load_gguf, single_file
    from accessory.backbone.hf import TOKENIZER_FILES, has_tokenizer
    from accessory.backbone.store import cast
    from accessory.backbone.weights import detect, from_tensors, read_folder
    from accessory.models.gate import hold, measure
    from accessory.peft.quantize import Quantization

    if (args.src / "config.yaml").is_file():
        return _trained(args)
    _check(args)
    spec = Quantization.parse(args.quantize) if args.quantize is not None else None
    if args.target == "model":
        return _pictured(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    layout = detect(args.src) if args.source == "auto" else args.source
    if layout == "gguf" and not args.overlay:
        config, tensors = load_gguf(single_file(args.src), dtype or torch.bfloat16)
    else:
        config, tensors = read_folder(args.src, layout=layout, pickles=True, overlays=args.overlay)
    before = None if args.skip_gate else measure(from_tensors(config, tensors))
    tensors = cast(tensors, dtype)
    tokenizer = args.tokenizer
    if tokenizer is None and args.src.is_dir() and has_tokenizer(args.src):
        tokenizer = args.src
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ValueError(f"--tokenizer {tokenizer} holds no tokenizer")
    count = sum(t.numel() for t in tensors.values())
    held = f"{len(tensors)} tensors, {count:,} parameters" + ("" if spec is None else f" as {args.quantize}")
    if spec is not None:
        moved = _quantize(args, config, tensors, spec, before)
    else:
        _write(args, config, tensors, tokenizer)
        moved = None
        if before is not None:
            moved = hold(before, args.dst, "converting to", tolerance=args.tolerance, opened=_open)
    if args.target != "hf" and tokenizer is not None:
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, args.dst / file)
    print(f"{args.dst}: {args.target} layout, {held} (read as {layout})")
    said = "not compared (--skip-gate)" if moved is None else f"moved by {moved:.2g} of their largest"
    print(f"logits of the fixed prompts: {said}")
    if tokenizer is not None:
        print(f"tokenizer: that of {tokenizer}")
    elif layout == "gguf":
        print("tokenizer: none written, the one inside a GGUF file is not converted; --tokenizer DIR takes one along")
    else:
        print("tokenizer: none written, there is none in SRC; --tokenizer DIR takes one along")
    return 0


def _quantize(
    args: argparse.Namespace,
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    spec: Quantization,
    before: Measure | None,
) -> float | None:
    """Write quantised weights; ``tensors`` is emptied on the way. Returns how far the logits moved from the full ones.

    Two gates: what fewer bits cost is bounded by ``--tolerance``, or for its kind, before anything is written; what
    was written has to give the logits of what was made.
    """
    from accessory.backbone.quantized import save_quantized
    from accessory.backbone.weights import quantized_from_tensors
    from accessory.models.gate import QUANTISED, check, hold, measure

    model = quantized_from_tensors(config, tensors, spec)
    moved, after = None, None
    if before is not None:
        after = measure(model)
        limit = QUANTISED[spec.kind] if args.tolerance is None else args.tolerance
        moved = check(before, after, f"quantising {args.src} as {args.quantize}", limit)
    save_quantized(model, args.dst, max_shard_bytes=int(args.max_shard_gb * 1e9))
    if after is not None:
        hold(after, args.dst, "writing", opened=_open)
    return moved


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


def _check(args: argparse.Namespace) -> None:
    if args.base is not None:
        raise ValueError(f"--base is for model and generator folders, and {args.src} has no config.yaml")
    if args.tensor_parallel is not None and args.target in ("hf", "model"):
        raise ValueError(
            f"--tensor-parallel {args.tensor_parallel} needs --to accessory or reference, got --to {args.target}"
        )
    if args.sparse and args.target != "reference":
        raise ValueError(f"--sparse needs --to reference, got --to {args.target}")
    if args.quantize is not None and (args.target != "accessory" or args.tensor_parallel is not None):
        raise ValueError(f"--quantize {args.quantize} needs --to accessory, and no --tensor-parallel")
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb must be positive, got {args.max_shard_gb}")
    if (args.llama_type or args.clip_activation or args.prefix_gate or args.bgr) and args.target != "model":
        raise ValueError("--llama-type, --clip-activation, --prefix-gate and --bgr need --to model")


def _pictured(args: argparse.Namespace) -> int:
    """A model with its encoders, or with prefixes, which no plain language model has."""
    from accessory.backbone.hf import has_tokenizer
    from accessory.models.reference_folder import convert_pictured

    if args.dtype or args.source not in ("auto", "meta"):
        raise ValueError("--to model takes SRC as it is: no --dtype or --from")
    if args.tokenizer is not None and not has_tokenizer(args.tokenizer):
        raise ValueError(f"--tokenizer {args.tokenizer} holds no tokenizer")
    config = convert_pictured(
        [args.src, *args.overlay],
        args.dst,
        kind=args.llama_type,
        activation=args.clip_activation,
        pickles=True,
        tokenizer=args.tokenizer,
        gate=args.prefix_gate,
        bgr=args.bgr,
    )
    sees = "no tower" if config.tower is None else f"the tower {config.tower.preset}"
    print(f"{args.dst}: model folder with {sees}, template {config.template}")
    for name, digest in () if config.tower is None else config.tower.encoders.items():
        print(f"encoder {name}: {digest}")
    return 0


def _adapter(args: argparse.Namespace) -> int:
    """What was trained as a file of LLaMA-Adapter's own."""
    from accessory.models.adapter_release import write_release

    kind = write_release(args.src, args.dst)
    print(f"{args.dst}/{kind}.pth: what {args.src} has beside its language model and its encoder")
    return 0


def _trained(args: argparse.Namespace) -> int:
    import torch

    from accessory.models.export import export

    if args.target == "reference":
        return _adapter(args)
    target = f"to {args.target}"
    said = (
        (target, args.target != "accessory"),
        ("tensor-parallel", args.tensor_parallel),
        ("overlay", args.overlay),
        ("quantize", args.quantize),
    )
    if other := [f"--{n}" for n, v in said if v]:
        raise ValueError(f"{args.src} is a folder of trained tensors beside a base, {other[0]} is for whole models")
    made = export(args.src, args.dst, getattr(torch, args.dtype) if args.dtype else None, args.base)
    count, size = (sum(f(t) for t in made.tensors.values()) for f in (torch.Tensor.numel, lambda t: t.nbytes))
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in made.tensors.values()}))
    print(f"{args.dst}: {made.kind}, {len(made.tensors)} tensors, {count:,} numbers in {size / 1e6:.1f} MB ({kinds})")
    for name in made.outside:
        print(f"it names {name}, which is not among the shipped models and has to go with it", file=sys.stderr)
    return 0
