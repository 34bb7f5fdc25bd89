"""Ranks whose batches hold other things run the same collectives: nothing waits for what never comes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.nn import moe
from accessory.parallel.layout import ParallelConfig
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import Mixed, column, config, made, trained

LIMIT = 60.0  # seconds that a rank waits for another before the test fails
PLANS = {
    "ddp": ParallelConfig(), "fsdp": ParallelConfig(data="fsdp"), "tensor": ParallelConfig(tensor=2),
    "product": ParallelConfig(tensor=2, data="fsdp"),
}  # fmt: skip


def some_steps(folder: Path, plan: ParallelConfig, world: int, method: str) -> list[Any]:
    """Two updates; every data rank has none, one or three pictures, and its neighbour another number of them."""
    copies = world // plan.tensor

    def work(rank: int) -> Any:
        source = Mixed(rank // plan.tensor, copies)
        own = config(folder / method, 2, plan, accumulation=1)
        rows = trained(made(folder / f"own{rank}", method), source, own)
        return [row["loss"] for row in rows], source.given

    return run_ranks(work, world, LIMIT)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", PLANS)
def test_no_rank_waits_for_ever(name: str, world: int, tmp_path: Path) -> None:
    plan = PLANS[name]
    for method in ("full", "moe"):
        found = some_steps(tmp_path, plan, world, method)
        assert all(given == 2 for _, given in found)
        assert all(losses == found[0][0] for losses, _ in found)
        assert found[0][0][0] != found[0][0][1]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tensor"])
def test_packs_are_padded_rows(name: str, tmp_path: Path) -> None:
    """Three updates of two ranks that have packs of other lengths: the losses and norms of padded rows."""
    plan, methods = PLANS[name], ("full", "prefix", "moe")

    def work(rank: int) -> Any:
        found = {}
        for method, kind in itertools.product(methods, ("padded", "packed", "leaking")):
            chunk = 5 if kind == "packed" and name != "fsdp" else None
            own = config(tmp_path / method / kind, 3, plan, accumulation=1, loss_chunk=chunk)
            source = Mixed(rank // plan.tensor, 2 // plan.tensor, kind)
            found[method, kind] = trained(made(tmp_path / f"own{rank}", method), source, own)
        return found

    found = run_ranks(work, 2, LIMIT)[0]
    for method in methods:
        padded, packed, leaking = (found[method, kind] for kind in ("padded", "packed", "leaking"))
        for value in ("loss", "grad_norm", *(["router"] if method == "moe" else [])):
            assert float((column(packed, value) / column(padded, value) - 1).abs().max()) < 1e-4, (method, value)
        assert float((column(leaking, "grad_norm") / column(padded, "grad_norm") - 1).abs().max()) > 1e-3, method


def test_scores_in_parts_are_refused_where_ranks_must_call_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_chunk 4 calls the output layer as often as"):
        config(tmp_path, 1, PLANS["fsdp"], loss_chunk=4)


@pytest.mark.parametrize("idle", [True, False])
def test_idle_experts_have_gradients_of_zero(idle: bool) -> None:
    """An expert without a row on one rank would otherwise have none there, and the ranks reduce different lists: gloo
    aborts in the reduce-scatter of FSDP then."""
    layer = moe.MoEFeedForward(8, 16, 4, 1, 8).train()
    layer.run_idle = idle
    layer(torch.randn(1, 1, 8)).sum().backward()
    found = [expert.get_submodule("w1").get_parameter("weight").grad for expert in layer.experts]
    assert [g is None for g in found].count(False) == (4 if idle else 1)
    assert sum(g is not None and bool(g.any()) for g in found) == 1
