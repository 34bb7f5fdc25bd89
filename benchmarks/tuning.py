"""One table: zero-init prefix, bias + norm, LoRA and the projector alone, fine-tuned on the same task.

``python -m benchmarks.tuning [--model DIR] [--task flags] [--seconds 120 | --steps N] [--methods ...] [--limit N]``

Everything of ``--model`` is frozen; each method adds what it needs and trains only that, on the training split of the
task, with the same batches. Every method runs in a process of its own, so that its peak memory is its own (the peak is
read after training and before scoring). Loss and accuracy are those of the test split, before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from accessory.data.builtin import build as build_set
from accessory.data.collate import collate
from accessory.evaluate.score import score
from accessory.models import build
from accessory.models.build import Model, ModelConfig
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, TrainSpec, TuningSpec
from accessory.train.config import GroupConfig, TrainConfig
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.run import DataConfig, RunConfig, run

BASE = "base"  # the worker that trains nothing: the numbers before
FOREVER = 1_000_000


@dataclass(frozen=True)
class Method:
    """What is added, and the learning rate that suits it (gates start at zero and need a faster one)."""

    title: str
    specs: tuple[TuningSpec, ...]
    lr: float
    groups: tuple[GroupConfig, ...] = ()


METHODS: dict[str, Method] = {
    "prefix": Method("zero-init prefix", (PrefixSpec(10, init_std=0.02),), 2e-3, (GroupConfig("*.gate", 10.0),)),
    "bias-norm": Method("bias + norm", (BiasSpec(), NormSpec()), 2e-3),
    "lora": Method("LoRA, rank 16", (LoraSpec(16, 32.0),), 1e-3),
    "projector": Method("projector only", (TrainSpec(("projector.*",)),), 1e-3),
}


@dataclass(frozen=True)
class Outcome:
    """What one worker found. Memory in MB is the process's peak; for the base it is what loading takes."""

    method: str
    loss: float
    accuracy: float
    memory: float
    parameters: int = 0
    tokens_per_s: float = 0.0
    steps: int = 0


def experiment(args: argparse.Namespace, method: Method, folder: Path) -> RunConfig:
    """The fine-tuning of one method, as an experiment file would say it."""
    data = folder / "data.yaml"
    data.write_text(f"sources:\n  - {{kind: builtin, name: {args.task}, options: {{turns: 1}}}}\n", encoding="utf-8")
    train = TrainConfig(
        output_dir=str(folder / "run"),
        max_steps=args.steps or FOREVER,
        max_seconds=None if args.steps else args.seconds,
        schedule_by="steps" if args.steps else "time",
        lr=args.lr_scale * method.lr,
        min_lr=args.lr_scale * method.lr / 100,
        batch_size=args.batch_size,
        warmup_steps=min(10, args.steps or 10),
        betas=(0.9, 0.98),
        checkpoint_every=FOREVER,
        log_every=1,
        threads=args.threads,
        groups=method.groups,
        tensorboard=False,
    )
    model = ModelConfig(base=str(args.model.resolve()), tuning=method.specs)
    cache = str(args.cache) if args.cache else None
    return RunConfig(train, DataConfig(str(data), workers=1, window=1), model, cache=cache)


@torch.inference_mode()
def held_out_loss(model: Model, args: argparse.Namespace) -> float:
    """Mean loss of a learned token on (at most ``--limit`` rows of) the test split."""
    rows = build_set(args.task, "test", cache=args.cache, size=model.config.tiling.size)
    count = min(len(rows), args.limit or len(rows))
    chosen = [rows[k * len(rows) // count] for k in range(count)]
    objective = DialogueObjective(ObjectiveConfig(), model.tokenizer)
    total = learned = 0.0
    for start in range(0, count, args.batch_size):
        part = [model.encoder.encode(s) for s in chosen[start : start + args.batch_size]]
        loss, tokens, _ = objective(model.net, collate(part, model.tokenizer.pad_id))
        total, learned = total + float(loss), learned + float(tokens)
    return total / learned


def peak_megabytes() -> float:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def tested(model: Model, args: argparse.Namespace, method: str, memory: float) -> Outcome:
    """Loss and accuracy on the test split."""
    row = score(model, args.task, limit=args.limit, cache=args.cache)
    return Outcome(method, held_out_loss(model, args), row.accuracy, memory)


def work(args: argparse.Namespace) -> Outcome:
    """One worker: fine-tune by ``args.worker`` and test, or only test."""
    torch.set_num_threads(args.threads)
    if args.worker == BASE:
        model = build.load(args.model, cache=args.cache)
        return tested(model, args, BASE, peak_megabytes())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = run(experiment(args, METHODS[args.worker], folder))
        memory = peak_megabytes()
        assert result is not None
        assert result.final is not None
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        speeds = [r["tokens_per_s"] for r in rows if "tokens_per_s" in r]
        model = build.load(result.final, cache=args.cache, train=True)
        parameters = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
        model.net.requires_grad_(False).eval()
        found = tested(model, args, args.worker, memory)
    speed = statistics.median(speeds[1:] or speeds)  # the first step warms up
    return replace(found, parameters=parameters, tokens_per_s=speed, steps=result.step)


def spawn(argv: list[str], worker: str) -> Outcome:
    """Run a worker in a process of its own; what it logs goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.tuning", *argv, "--worker", worker]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def show(args: argparse.Namespace, base: Outcome, outcomes: list[Outcome]) -> None:
    """Print the markdown table."""
    budget = f"{args.steps} steps" if args.steps else f"{args.seconds:g} s"
    print(f"{args.model.name} on {args.task}, {budget} each, batches of {args.batch_size}, {args.threads} threads.")
    print(f"Loaded and not trained, the model takes {base.memory:.0f} MB.\n")
    print(
        "| method | trainable parameters | steps | tokens/s | peak MB | loss before | after | accuracy before | after |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for x in outcomes:
        print(
            f"| {METHODS[x.method].title} | {x.parameters:,} | {x.steps} | {x.tokens_per_s:.0f} | {x.memory:.0f} "
            f"| {base.loss:.3f} | {x.loss:.3f} | {base.accuracy:.1%} | {x.accuracy:.1%} |"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = Path(__file__).resolve().parents[1] / "weights" / "nano-sphinx"
    parser.add_argument("--model", type=Path, default=shipped, help="the model folder to start from")
    parser.add_argument("--task", default="flags", help="a built-in set")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=120.0, help="of training, for each method")
    budget.add_argument("--steps", type=int, help="instead of seconds")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr-scale", type=float, default=1.0, help="multiplies every learning rate")
    parser.add_argument("--limit", type=int, help="test on N rows only, spread evenly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, help="asset cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", choices=[BASE, *METHODS], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Spawn a worker a method, one after the other, and print what they found."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.worker:
        from accessory import log

        log.setup()
        print(json.dumps(asdict(work(args))))
        return
    base, *outcomes = [spawn(argv, worker) for worker in (BASE, *args.methods)]
    if args.json:
        print(json.dumps([asdict(x) for x in (base, *outcomes)]))
        return
    show(args, base, outcomes)


if __name__ == "__main__":
    main()
