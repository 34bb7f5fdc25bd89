"""Tensor parallelism, FSDP2 and their product train what one process trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accessory.parallel import groups
from accessory.parallel.layout import ParallelConfig
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import METHODS, Mixed, apart, column, config, made, trained

STEPS = 20
TOLERANCE = 2e-5  # of losses, gradient norms and all else that is logged, relative
PLANS = {
    "tensor": (ParallelConfig(tensor=2), 2),
    "fsdp": (ParallelConfig(data="fsdp"), 2),
    "product": (ParallelConfig(tensor=2, data="fsdp"), 4),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows and exported tensors of one process, which sees the micro-batches of both data ranks in turn."""
    home = tmp_path_factory.mktemp("alone")
    found = {}
    for method in METHODS:
        rows = trained(made(home, method), Mixed(None), config(home / method, STEPS))
        found[method] = (rows, load_file(home / method / "final" / "trainable.safetensors"))
    return found


def spread(home: Path, plan: ParallelConfig, methods: list[str], steps: int = STEPS) -> Callable[[int], Any]:
    """What a rank does: train all ``methods``."""

    def work(rank: int) -> Any:
        rows = {}
        for method in methods:
            model = made(home / str(rank), method)
            copies = torch.distributed.get_world_size() // plan.tensor  # each draws its part of an update
            settings = config(home / method, steps, plan, accumulation=2 // copies)
            rows[method] = trained(model, Mixed(rank // plan.tensor if copies > 1 else None), settings)
        return rows, groups.data_rank(), groups.tensor_rank()

    return work


@pytest.mark.parametrize("name", PLANS)
def test_ranks_train_what_one_process_trains(name: str, alone: dict[str, Any], tmp_path: Path) -> None:
    plan, world = PLANS[name]
    found = run_ranks(spread(tmp_path, plan, list(METHODS)), world)
    assert [f[1:] for f in found] == [(r // plan.tensor, r % plan.tensor) for r in range(world)]
    for method, (rows, weights) in alone.items():
        ours = found[0][0][method]
        assert len(rows) == len(ours) == STEPS
        for value in ("loss", "language", "grad_norm", *(["router"] if method == "moe" else [])):
            a, b = column(rows, value), column(ours, value)
            assert float(((a - b) / a).abs().max()) < TOLERANCE, (method, value)
        assert float(column(ours, "loss")[0] - column(ours, "loss")[-1]) > 0.05, method  # it learns
        exported = load_file(tmp_path / method / "final" / "trainable.safetensors")
        assert apart(weights, exported) < 1e-2, method
