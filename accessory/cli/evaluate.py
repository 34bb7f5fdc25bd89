"""``python -m accessory evaluate --model DIR``: scores on the built-in test sets, each beside its controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from accessory.cli.chat import QUANTIZE, quantization

CONTROLS = ("none", "shuffled", "blind")


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    p = sub.add_parser("evaluate", help="score a model on the built-in test sets")
    p.add_argument("--model", required=True, metavar="DIR", help="a model folder, or the name of a shipped model")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="test sets (default: all but flags)")
    p.add_argument(
        "--controls", nargs="+", choices=CONTROLS, default=["none", "shuffled"], help="default: none shuffled"
    )
    p.add_argument("--limit", type=int, metavar="N", help="ask only N questions of each set, spread evenly")
    p.add_argument("--batch-size", type=int, default=64, help="questions asked together (default: 64)")
    p.add_argument("--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: cuda where there is one)")
    p.add_argument("--quantize", metavar="KIND", help=QUANTIZE)
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--cache", type=Path, help="asset cache")
    p.add_argument("--retrieval", action="store_true", help="also name emoji by nearest neighbour in the encoder")
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write every question, answer and verdict")


def main(args: argparse.Namespace) -> int:
    """Print a Markdown table; one line a task and control as it is done."""
    import torch

    from accessory.evaluate.score import TASKS, score
    from accessory.serve.chat import load

    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args.model, cache=args.cache, device=args.device, quantization=quantization(args)).model
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("", encoding="utf-8")
    print("| task | pictures | right | of | accuracy | seconds |\n|---|---|---:|---:|---:|---:|", flush=True)
    for task in args.tasks or TASKS:
        for control in args.controls:
            row = score(model, task, limit=args.limit, control=control, cache=args.cache, batch_size=args.batch_size)
            shown = "own" if control == "none" else control
            cells = f"{row.correct} | {row.total} | {100 * row.accuracy:.1f} % | {row.seconds:.0f}"
            print(f"| {task} | {shown} | {cells} |", flush=True)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    for item in row.items:
                        entry = {"task": task, "control": control, **dataclasses.asdict(item)}
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if args.retrieval:
        _retrieval(model.config, args.cache, model.net.tower)
    return 0


def _retrieval(config: object, cache: Path | None, tuned: object) -> None:
    from accessory.evaluate.retrieval import retrieval_accuracy
    from accessory.models.build import ModelConfig, build_tower
    from accessory.vision.tower import Tower

    assert isinstance(config, ModelConfig)
    if config.tower is None or not isinstance(tuned, Tower):
        raise ValueError("--retrieval needs a model with a tower")
    frozen = build_tower(config.tower, cache).to(tuned.mean.device)
    for name, tower in (("encoder as published", frozen), ("encoder of this model", tuned)):
        plain, centred = retrieval_accuracy(tower.eval(), cache)
        print(f"nearest neighbour, {name}: {100 * plain:.1f} %; with sets centred: {100 * centred:.1f} %", flush=True)
