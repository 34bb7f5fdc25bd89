"""Blocks that are computed again for the backward pass, or compiled, train the same when the model is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accessory.nn.attention import Attention
from tests.distributed.curves import PLANS, TOLERANCE, Rows, alone, difference, spread
from tests.distributed.helpers import run_ranks

STEPS = 4
METHODS = {"block_checkpointing": ["full", "moe", "qlora"], "compile": ["full"]}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """Curves of one process that does neither."""
    home = tmp_path_factory.mktemp("alone")
    return {method: alone(home, method, STEPS) for method in METHODS["block_checkpointing"]}


@pytest.mark.parametrize(("option", "name"), [*(("block_checkpointing", n) for n in PLANS), ("compile", "product")])
def test_the_curve_stays(
    option: str, name: str, one: dict[str, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, world = PLANS[name]
    calls = [0]
    plain, compiled = Attention.forward, nn.Module.compile

    def counted(self: Attention, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(self, *args, **kwargs)

    if option == "compile":
        # Graphs are traced and differentiated ahead of time as ever, and then run by torch: code takes minutes to make.
        monkeypatch.setattr(nn.Module, "compile", lambda self, **more: compiled(self, backend="aot_eager", **more))
    else:
        monkeypatch.setattr(Attention, "forward", counted)

    def work(rank: int) -> Any:
        train = spread(tmp_path, plan, METHODS[option], STEPS, **{option: True})
        rows = train(rank)[0]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if option == "compile" else 0
        return rows, calls[0], graphs

    for rank, (rows, passes, graphs) in enumerate(run_ranks(work, world)):
        copies = world // plan.tensor
        micro = STEPS * 2 // copies * 2 * len(METHODS[option])  # of two blocks each
        assert passes == (2 * micro if option == "block_checkpointing" else 0)
        assert graphs > 0 or option != "compile"
        if rank == 0:
            for method, ours in rows.items():
                for value in ("loss", "grad_norm"):
                    assert difference(one[method], ours, value) < TOLERANCE, (method, value)
