"""``python -m accessory convert SRC DST``: weights from one layout to another; the only place that reads pickles.

A model or generator folder of ours (``runs/NAME/final``) becomes one to hand on: ``--dtype`` makes it smaller,
``--base`` names the base as others have it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("convert", help="convert weights between layouts")
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of weights, a .gguf file, or a trained folder")
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder")
    layouts = ("auto", "accessory", "hf", "meta", "gguf")
    parser.add_argument("--from", dest="source", choices=layouts, default="auto", help="layout of SRC (default: auto)")
    parser.add_argument("--to", dest="target", choices=("accessory", "hf"), default="accessory", help="layout of DST")
    parser.add_argument("--dtype", choices=DTYPES, help="cast (default: as stored; GGUF: bfloat16)")
    parser.add_argument("--quantize", metavar="KIND", help="write int8, int4 or nf4 weights (only --to accessory)")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="write N shards (only --to accessory)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer from here (default: SRC)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="split larger files (default: 5)")
    parser.add_argument("--base", metavar="DIR", help="of a trained folder: its base, the same in another precision")
    parser.set_defaults(main=main)


def _check(args: argparse.Namespace) -> None:
    if args.base is not None:
        raise ValueError(f"--base is for model and generator folders, and {args.src} has no config.yaml")
    if args.tensor_parallel is not None and args.target != "accessory":
        raise ValueError(f"--tensor-parallel {args.tensor_parallel} needs --to accessory, got --to {args.target}")
    if args.quantize is not None and (args.target != "accessory" or args.tensor_parallel is not None):
        raise ValueError(f"--quantize {args.quantize} needs --to accessory, and no --tensor-parallel")
    if args.max_shard_gb <= 0:
        raise ValueError(f"--max-shard-gb must be positive, got {args.max_shard_gb}")


def main(args: argparse.Namespace) -> int:
    """Convert, and print what was written.

    Raises:
        ValueError: for options that exclude each other and everything that reading or writing refuses.
    """
    import torch

    from accessory.backbone.gguf import load_gguf, single_file
    from accessory.backbone.hf import TOKENIZER_FILES, has_tokenizer, write_hf
    from accessory.backbone.meta import save_shards
    from accessory.backbone.quantized import save_quantized
    from accessory.backbone.store import cast
    from accessory.backbone.weights import detect, load_backbone, read_folder, save_accessory
    from accessory.peft.quantize import Quantization

    if (args.src / "config.yaml").is_file():
        return _trained(args)
    _check(args)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    layout = detect(args.src) if args.source == "auto" else args.source
    quantized = None
    if args.quantize is not None:
        quantized = load_backbone(args.src, dtype=dtype, quantization=Quantization.parse(args.quantize))
        config, tensors = quantized.config, quantized.state_dict()
    elif layout == "gguf":
        config, tensors = load_gguf(single_file(args.src), dtype or torch.bfloat16)
    else:
        config, tensors = read_folder(args.src, layout=layout, pickles=True)
        tensors = cast(tensors, dtype)
    tokenizer = args.tokenizer
    if tokenizer is None and args.src.is_dir() and has_tokenizer(args.src):
        tokenizer = args.src
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ValueError(f"--tokenizer {tokenizer} holds no tokenizer")
    limit = int(args.max_shard_gb * 1e9)
    if args.target == "hf":
        write_hf(config, tensors, args.dst, tokenizer, limit)
    elif args.tensor_parallel is not None:
        save_shards(config, tensors, args.dst, args.tensor_parallel)
    elif quantized is not None:
        save_quantized(quantized, args.dst, max_shard_bytes=limit)
    else:
        save_accessory(config, tensors, args.dst, max_shard_bytes=limit)
    if args.target == "accessory" and tokenizer is not None:
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, args.dst / file)
    count = sum(t.numel() for t in tensors.values())
    held = f"{count:,} parameters" if quantized is None else f"{args.quantize}, {count:,} numbers"
    print(f"{args.dst}: {args.target} layout, {len(tensors)} tensors, {held} (read as {layout})")
    if tokenizer is not None:
        print(f"tokenizer: that of {tokenizer}")
    elif layout == "gguf":
        print("tokenizer: none written, the one inside a GGUF file is not converted; --tokenizer DIR takes one along")
    else:
        print("tokenizer: none written, there is none in SRC; --tokenizer DIR takes one along")
    return 0


def _trained(args: argparse.Namespace) -> int:
    import torch

    from accessory.models.export import export

    options = (("to hf", args.target == "hf"), ("tensor-parallel", args.tensor_parallel), ("quantize", args.quantize))
    if other := [f"--{name}" for name, value in options if value]:
        raise ValueError(f"{args.src} is a folder of trained tensors beside a base, {other[0]} is for whole models")
    made = export(args.src, args.dst, getattr(torch, args.dtype) if args.dtype else None, args.base)
    count, size = (sum(f(t) for t in made.tensors.values()) for f in (torch.Tensor.numel, lambda t: t.nbytes))
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in made.tensors.values()}))
    print(f"{args.dst}: {made.kind}, {len(made.tensors)} tensors, {count:,} numbers in {size / 1e6:.1f} MB ({kinds})")
    for name in made.outside:
        print(f"it names {name}, which is not among the shipped models and has to go with it", file=sys.stderr)
    return 0
