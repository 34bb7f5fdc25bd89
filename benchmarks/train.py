"""Training, ours against transformers + peft with padding and against the lineage's own ways, on the default mixture.

``python -m benchmarks.train [--seconds 60] [--threads N] [--repeats 2] [--kinds full lora prefix] [--contenders ...]
    [--rows 16] [--pad 512] [--cpu-time] [--json]``

SmolLM2-135M with the default tower and projector, all weights, LoRA and zero-init prefix, each contender in a process
of its own (``benchmarks/rivals.py`` says what they share and what not), one after the other, round by round, so that a
busy machine disturbs all alike; medians of the rounds. Speed counts learned tokens and leaves out the first two
updates; the peak is of the resident memory while training, and what the loader's process holds is not in it. After
every eighth of the time all are tested on the same rows (not in their time): "to the loss" is when the mean loss of a
learned token came down to what the slowest of them reached at its end. The floor is the machine's own: products of the
blocks with the real positions and of the table with the learned ones, at the rate of one large bf16 product. On a busy
machine ``--threads 1 --cpu-time`` counts only the seconds in which a process ran.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from accessory.models.build import ModelConfig
from benchmarks.floors import floor_runs, interleaved, median, rates
from benchmarks.rivals import CONTENDERS, KINDS, Contender, Ours, Setting, Tally

WARM = 2  # updates
TESTS = 8
SOURCES = Path(__file__).resolve().parents[1] / "data_configs" / "default.yaml"


@dataclass(frozen=True)
class Outcome:
    """What one contender did in one round. ``gflop`` of a learned token at the least; ``curve``: (seconds, loss)."""

    contender: str
    speed: float  # learned tokens a second
    step_s: float
    peak_mb: float
    real: float | None  # share of the computed positions; ours has no others, and says how full its packs are
    waited: float  # share of the time
    gflop: float
    curve: list[tuple[float, float]]
    filled: float | None = None


def least_gflop(contender: Contender, tally: Tally) -> float:
    """Products that no way of training is without, for a learned token: forward, the gradient of the input, and where
    all weights train their own."""
    passes = 3 if contender.setting.kind == "full" else 2
    products = tally.positions * contender.matrices + tally.learned * contender.table
    return 2 * passes * products / tally.learned / 1e9


def memory(name: str) -> float:
    """MB of this process under a name of the kernel's (VmHWM: the most that was resident)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def forget_peak() -> None:
    """What was freed goes back to the system, and the peak begins at what is left."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(name: str, setting: Setting, args: argparse.Namespace) -> Outcome:
    """Train for so many seconds and tell."""
    seconds, clock = args.seconds, time.process_time if args.cpu_time else time.perf_counter
    contender = CONTENDERS[name][1](setting)
    batches = contender.held_out(args.tested)
    curve = [(0.0, contender.test(batches))]
    forget_peak()
    trained, before, peak = 0.0, Tally(), 0.0
    began = wall = 0.0
    while trained < seconds or contender.tally.updates < WARM + 2:
        start, shown = clock(), time.perf_counter()
        contender.update()
        trained += clock() - start
        wall += time.perf_counter() - shown if contender.tally.updates > WARM else 0.0
        if contender.tally.updates == WARM:
            before, began = replace(contender.tally), trained
        peak = max(peak, memory("VmHWM"))
        if trained >= seconds * len(curve) / TESTS:
            curve.append((trained, contender.test(batches)))
            forget_peak()  # the tests pad for all alike, and are none of the training
    tally = contender.tally
    learned, spent = tally.learned - before.learned, trained - began
    contender.close()
    return Outcome(
        name,
        speed=learned / spent,
        step_s=spent / (tally.updates - before.updates),
        peak_mb=peak,
        real=None if isinstance(contender, Ours) else tally.positions / tally.computed,
        waited=(tally.waited - before.waited) / wall,
        gflop=least_gflop(contender, tally),
        curve=curve,
        filled=contender.source.filled if isinstance(contender, Ours) else None,
    )


def reached(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Seconds until a curve came down to ``loss``, on straight lines between its points; None when it never did."""
    for (a, high), (b, low) in itertools.pairwise(curve):
        if low <= loss:
            return a if high <= loss else a + (b - a) * (high - loss) / (high - low)
    return None


def spawn(argv: Sequence[str], kind: str, name: str) -> Outcome:
    """Run a contender in a process of its own; what it logs goes to stderr."""
    command = [sys.executable, "-m", "benchmarks.train", *argv, "--worker", kind, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    outcome = Outcome(**json.loads(done.stdout.splitlines()[-1]))
    print(f"{kind}, {name}: {outcome.speed:.1f} learned tokens/s", file=sys.stderr, flush=True)
    return outcome


def show(kind: str, rounds: Sequence[Sequence[Outcome]], gflops: float) -> None:
    """Print the table of a kind of tuning: medians of the rounds."""
    targets = [max(x.curve[-1][1] for x in outcomes) for outcomes in rounds]
    print(f"\n| {kind} | learned tokens/s | ours is | s/update | to loss {median(targets):.2f} | ours is | peak MB "
          "| real positions | waited for data | of the floor |\n|---|" + "---:|" * 9)  # fmt: skip
    columns = list(zip(*rounds, strict=True))
    own = next((c for c in columns if c[0].contender == "ours"), None)
    for column in columns:
        times = [reached(x.curve, t) for x, t in zip(column, targets, strict=True)]
        speed, taken = median([x.speed for x in column]), [t for t in times if t is not None]
        faster = sooner = "-"
        if own is not None:
            faster = f"{median([o.speed / x.speed for o, x in zip(own, column, strict=True)]):.2f}"
            best = [reached(o.curve, t) for o, t in zip(own, targets, strict=True)]
            pairs = [t / b for t, b in zip(times, best, strict=True) if t is not None and b]
            sooner = f"{median(pairs):.2f}" if pairs else "-"
        shares = [x.real for x in column if x.real is not None]
        real = f"{median(shares):.1%}" if shares else "-"
        title, step = CONTENDERS[column[0].contender][0], median([x.step_s for x in column])
        print(
            f"| {title} | {speed:.1f} | {faster} | {step:.2f} "
            f"| {median(taken):.1f} s | {sooner} | {median([x.peak_mb for x in column]):.0f} "
            f"| {real} | {median([x.waited for x in column]):.1%} "
            f"| {median([x.speed * x.gflop / gflops for x in column]):.1%} |"
        )
    gflop = median([x.gflop for column in columns for x in column])
    print(f"| floor: {gflop:.2f} GFLOP a learned token | {gflops / gflop:.1f} |" + " |" * 7 + " 100.0% |")
    for x in (own or ())[:1]:
        print(f"\nOurs: packs were {x.filled:.1%} full.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each contender and round")
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=16, help="rows an update")
    parser.add_argument("--pad", type=int, default=512, help="positions to which LLaMA-Adapter pads a row")
    parser.add_argument("--tested", type=int, default=64, help="rows of the test between updates")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="a data configuration")
    parser.add_argument("--cache", type=Path, help="asset cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; needs --threads 1")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the threads' seconds, so it needs --threads 1")
    return args


def main() -> None:
    """Spawn a worker for every kind, round and contender, and print what they found."""
    argv = sys.argv[1:]
    args = parse(argv)
    if args.worker:
        kind, name = args.worker
        setting = Setting(
            kind, args.sources, ModelConfig(), args.rows, args.pad, threads=args.threads, cache=args.cache
        )
        print(json.dumps(asdict(work(name, setting, args))))
        return
    torch.set_num_threads(args.threads)
    found, floors = {}, []
    for kind in args.kinds:
        found[kind] = [[spawn(argv, kind, name) for name in args.contenders] for _ in range(args.repeats)]
        with torch.inference_mode():
            clock = time.process_time if args.cpu_time else time.perf_counter
            floors.append(rates(interleaved(floor_runs(torch.bfloat16), 3, clock))["matmul_gflop_s"])
    if args.json:
        print(
            json.dumps({"gflop_s": max(floors), **{k: [[asdict(x) for x in r] for r in v] for k, v in found.items()}})
        )
        return
    budget = f"{args.repeats} rounds of {args.seconds:g} s{' of CPU time' if args.cpu_time else ''}"
    print(
        f"SmolLM2-135M, {args.sources.stem}, {args.rows} rows an update, bf16 autocast, {args.threads} threads, "
        f"{budget}; one bf16 product: {max(floors):.0f} GFLOP/s."
    )
    for kind, rounds in found.items():
        show(kind, rounds, max(floors))


if __name__ == "__main__":
    main()
