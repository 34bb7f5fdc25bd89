"""What this machine can do at best: how fast it reads memory and multiplies matrices.

``python -m benchmarks.floors [--threads N] [--dtype bfloat16]``
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call. Contenders take turns (A B C A B C ...), so that a busy machine disturbs all alike."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def floor_runs(dtype: torch.dtype, megabytes: int = 384, size: int = 2048) -> dict[str, Callable[[], object]]:
    """Contenders for :func:`interleaved`; :func:`rates` turns their times into rates."""
    source = torch.ones(megabytes << 18, dtype=torch.float32)
    target = torch.empty_like(source)
    matrix = torch.ones(megabytes * (1 << 20) // dtype.itemsize // size, size, dtype=dtype)
    row = torch.ones(1, size, dtype=dtype)
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return {
        "copy": lambda: target.copy_(source),
        "read": lambda: F.linear(row, matrix),
        "matmul": lambda: F.linear(a, b),
    }


def rates(seconds: Mapping[str, Sequence[float]], megabytes: int = 384, size: int = 2048) -> dict[str, float]:
    """GB/s (copy: read plus written) and GFLOP/s from the best of each: a floor is what the machine can do."""
    gigabytes = megabytes * (1 << 20) / 1e9
    return {
        "copy_gb_s": 2 * gigabytes / min(seconds["copy"]),
        "read_gb_s": gigabytes / min(seconds["read"]),
        "matmul_gflop_s": 2 * size**3 / 1e9 / min(seconds["matmul"]),
    }


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def products(weights: Sequence[Tensor], x: Mapping[int, Tensor]) -> None:
    """Every ``W x`` of a model once, and nothing else; ``x`` by input width."""
    for w in weights:
        F.linear(x[w.shape[1]], w)


def main() -> None:
    """Print the floors as a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        result = rates(interleaved(floor_runs(getattr(torch, args.dtype)), args.repeats))
    if args.json:
        print(json.dumps(result))
        return
    print(f"| floor ({args.dtype}, {args.threads} threads) | |\n|---|---|")
    print(f"| memory copy | {result['copy_gb_s']:.1f} GB/s |")
    print(f"| memory read (matrix times vector) | {result['read_gb_s']:.1f} GB/s |")
    print(f"| matrix product | {result['matmul_gflop_s']:.0f} GFLOP/s |")


if __name__ == "__main__":
    main()
