"""``python -m accessory plan``: memory and rough time of a model before it is loaded, or of an experiment before it is
trained (``plan exps/NAME.yaml --gpus 8 --kind H100``)."""

from __future__ import annotations

import argparse


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = sub.add_parser("plan", help="memory and time that a model needs")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL_OR_PRESET_OR_YAML",
        help="a model folder, a size (llama2-13b), SIZE+TOWER, or a published model (SPHINX-1k, llama_ens5); without "
        "it a table of all published ones; or an experiment, as train takes it",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="values that replace those of an experiment")
    parser.add_argument("--gpus", type=int, help="devices to train an experiment on (default: 1)")
    parser.add_argument("--kind", metavar="GPU", help="what they are: H100, A100-80, RTX4090, ..., or this machine")
    parser.add_argument("--length", type=int, help="positions of an experiment's rows (default: its longest)")
    parser.add_argument("--learned", type=float, help="share of an experiment's text that has labels (default: 1)")
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
    if args.model is not None and args.model.endswith((".yaml", ".yml")):
        return _experiment(args)
    if wrong := [n for n in ("gpus", "kind", "length", "learned") if getattr(args, n) is not None]:
        raise ValueError(f"--{wrong[0]} is for an experiment (a .yaml file), and {args.model or 'no file'} is none")
    if args.overrides:
        raise ValueError(f"{args.overrides[0]} replaces a value of an experiment, and {args.model} is none")
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


def _experiment(args: argparse.Namespace) -> int:
    from accessory.train.planning import main_plan

    if wrong := [n for n in ("kinds", "batch", "prompt", "new") if getattr(args, n) is not None]:
        raise ValueError(f"--{wrong[0]} is for a model, and {args.model} is an experiment")
    if args.kind is None:
        raise ValueError("--kind is missing: which GPU the experiment is planned for, e.g. --kind H100")
    said = {n: v for n in ("length", "pictures", "learned") if (v := getattr(args, n)) is not None}
    print(main_plan(args.model, args.overrides, 1 if args.gpus is None else args.gpus, args.kind, said, args.rates))
    return 0
