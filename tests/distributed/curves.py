"""The table of loss curves: how far ranks are from one process, for every method and plan.

    python -m tests.distributed.curves --steps 50 [--methods full lora ...] [--plans tensor fsdp product]

Each cell is the largest difference of any logged loss and of any gradient norm, relative. Exit status 1 when one is
beyond the tolerance, or when a loss has not fallen.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from accessory.parallel import groups
from accessory.parallel.layout import ParallelConfig
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import METHODS, Mixed, column, config, made, trained

TOLERANCE = 2e-5  # over 20 steps; what ranks add up in another order grows with the steps
PLANS = {
    "tensor": (ParallelConfig(tensor=2), 2),
    "fsdp": (ParallelConfig(data="fsdp"), 2),
    "product": (ParallelConfig(tensor=2, data="fsdp"), 4),
}
Rows = list[dict[str, float]]


def alone(home: Path, method: str, steps: int, **options: Any) -> Rows:
    """The curve of one process, which sees the micro-batches of both data ranks in turn."""
    return trained(made(home / "words", method), Mixed(None), config(home / method, steps, **options))


def spread(
    home: Path, plan: ParallelConfig, methods: Sequence[str], steps: int, **options: Any
) -> Callable[[int], Any]:
    """What a rank does: train all ``methods``."""

    def work(rank: int) -> Any:
        rows = {}
        for method in methods:
            model = made(home / str(rank), method)
            copies = torch.distributed.get_world_size() // plan.tensor  # each draws its part of an update
            settings = config(home / method, steps, plan, accumulation=2 // copies, **options)
            rows[method] = trained(model, Mixed(rank // plan.tensor if copies > 1 else None), settings)
        return rows, groups.data_rank(), groups.tensor_rank()

    return work


def difference(a: Rows, b: Rows, value: str) -> float:
    """The largest difference of one number of two curves, relative to the first."""
    assert len(a) == len(b)
    one, other = column(a, value), column(b, value)
    return float(((one - other) / one).abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the table, judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of losses, relative (default 1e-4)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods:
            began = time.monotonic()
            one = alone(Path(folder) / "alone", method, given.steps)
            losses = column(one, "loss")
            cells = []
            for name in given.plans:
                plan, world = PLANS[name]
                found = run_ranks(spread(Path(folder) / name, plan, [method], given.steps), world, 600)[0][0][method]
                loss, norm = (difference(one, found, value) for value in ("loss", "grad_norm"))
                bad += loss > given.tolerance
                cells.append(f"{name} {loss:.1e} / {norm:.1e}")
            bad += bool(losses[-1] > losses[0] - 0.05)
            fell = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
            print(f"{method}: {fell}; {', '.join(cells)} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
