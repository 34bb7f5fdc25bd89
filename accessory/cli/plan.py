"""``python -m accessory plan MODEL_OR_PRESET``: memory and rough time of a model before it is loaded."""

from __future__ import annotations

import argparse


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("plan", help="memory and time that a model needs")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL_OR_PRESET",
        help="a model folder, a size (llama2-13b), SIZE+TOWER, or a published model (SPHINX-1k, llama_ens5); without "
        "it a table of all published ones",
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds of weights (default: bf16 int8 int4 nf4)")
    parser.add_argument("--batch", type=int, help="sequences at once (default: 1)")
    parser.add_argument(
        "--prompt", type=int, help="tokens of a prompt, pictures' included (1024; published models: all they read)"
    )
    parser.add_argument("--new", type=int, help="tokens of an answer (default: 256)")
    parser.add_argument("--pictures", type=int, help="tiles in a prompt (default: 1 where the model sees)")
    parser.add_argument(
        "--rates", nargs=2, type=float, metavar=("TFLOPS", "GB_S"),
        help="bf16 product and memory reading of the machine to plan for (default: this one, measured)",
    )  # fmt: skip
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print a table; ValueError for a name or a number that means nothing."""
    from dataclasses import replace

    from accessory.models.plan import KINDS, Rates, find, measured_rates, overview, plan, table

    if args.rates is not None and min(args.rates) <= 0:
        raise ValueError(f"--rates must be positive, got {args.rates[0]:g} {args.rates[1]:g}")
    said = {n: v for n in ("batch", "prompt", "new", "pictures") if (v := getattr(args, n)) is not None}
    rates = measured_rates() if args.rates is None else Rates(args.rates[0] * 1e12, args.rates[1] * 1e9)
    kinds = args.kinds or list(KINDS)
    if args.model is None:
        print(overview(kinds, rates, said))
    else:
        subject = find(args.model)
        load = replace(subject.load(), **said)
        print(table(subject, {kind: plan(subject, kind, load, rates) for kind in kinds}, load))
    print(
        f"\nTimes at {rates.flops / 1e12:.3g} TFLOP/s and {rates.bytes / 1e9:.3g} GB/s, the best that such a machine "
        "can do. Not counted: the interpreter with its libraries (about 0.4 GB), and the second copy of bf16 weights "
        "that chatting packs on a CPU. Towers (the rest) are loaded and compute in fp32."
    )
    return 0
