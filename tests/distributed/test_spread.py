"""Tensor parallelism, FSDP2 and their product train what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from accessory.train import adamw8bit
from tests.distributed.curves import PLANS, TOLERANCE, Rows, alone, difference, spread
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import METHODS, apart, column

STEPS = 20
FEW = {"optimizer": "adamw8bit"}
BF16 = {"precision": "bf16", "cpu_autocast": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Rows, dict[str, Any]]]:
    """Rows and exported tensors of one process."""
    home = tmp_path_factory.mktemp("alone")
    return {m: (alone(home, m, STEPS), load_file(home / m / "final" / "trainable.safetensors")) for m in METHODS}


@pytest.mark.parametrize("name", PLANS)
def test_ranks_train_what_one_process_trains(name: str, one: dict[str, Any], tmp_path: Path) -> None:
    plan, world = PLANS[name]
    found = run_ranks(spread(tmp_path, plan, list(METHODS), STEPS), world)
    assert [f[1:] for f in found] == [(r // plan.tensor, r % plan.tensor) for r in range(world)]
    for method, (rows, weights) in one.items():
        ours = found[0][0][method]
        assert len(rows) == len(ours) == STEPS
        for value in ("loss", "language", "grad_norm", *(["router"] if method == "moe" else [])):
            assert difference(rows, ours, value) < TOLERANCE, (method, value)
        assert float(column(ours, "loss")[0] - column(ours, "loss")[-1]) > 0.05, method  # it learns
        exported = load_file(tmp_path / method / "final" / "trainable.safetensors")
        assert apart(weights, exported) < 1e-2, method


@pytest.mark.parametrize("name", ["tensor", "fsdp"])
def test_moments_of_a_byte_each_are_cut_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit, "SMALL", 0)
    plan, world = PLANS[name]
    few, plain = alone(tmp_path / "few", "full", 6, **FEW), alone(tmp_path / "plain", "full", 6)
    ours = run_ranks(spread(tmp_path, plan, ["full"], 6, **FEW), world)[0][0]["full"]
    # Blocks of moments end elsewhere, and chance is drawn for each part: near, but not equal.
    assert difference(few, ours, "loss") < 0.01
    assert 0 < difference(few, plain, "loss") < 0.01


def test_bf16_is_that_of_one_process(tmp_path: Path) -> None:
    plan, world = PLANS["product"]
    half, plain = alone(tmp_path / "half", "full", 4, **BF16), alone(tmp_path / "plain", "full", 4)
    ours = run_ranks(spread(tmp_path, plan, ["full"], 4, **BF16), world)[0][0]["full"]
    # Sums of ranks are rounded to eight bits in other places.
    assert difference(half, ours, "loss") < 1e-3
    assert difference(half, ours, "grad_norm") < 1e-2
    assert difference(plain, half, "loss") > 2 * TOLERANCE
