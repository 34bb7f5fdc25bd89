"""Tensor parallelism: every gradient is that of one process, and what cannot be cut is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.parallel import groups, layers
from accessory.parallel.layout import ParallelConfig
from accessory.parallel.shard import parallelize
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import EVERYTHING, METHODS, apart, gradients, made

PLAN = ParallelConfig(tensor=2)
BATCHES = (1, 2)  # with one picture and with three


def unsummed(patch: pytest.MonkeyPatch) -> None:
    """The way from whole to cut forgets to sum gradients."""
    patch.setattr(layers, "copied", lambda x: x)


def misplaced(patch: pytest.MonkeyPatch) -> None:
    """Ranks take each other's input columns."""

    def share(name: str, tensor: Tensor, axis: int) -> Tensor:
        return tensor.chunk(2, axis)[groups.tensor_rank() ^ axis]

    patch.setattr(layers, "share", share)


CASES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None] | None, dict[str, Any]]] = {
    "right": (None, {"specs": EVERYTHING}),
    "tied": (None, {"specs": EVERYTHING, "tie_embeddings": True}),
    "moe": (None, {"specs": EVERYTHING, "method": "moe"}),
    "unsummed": (unsummed, {"specs": EVERYTHING}),
    "misplaced": (misplaced, {"specs": EVERYTHING}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list[Any]]]:
    """Gradients of one process and of two ranks for every case."""
    home = tmp_path_factory.mktemp("tensor")

    def work(rank: int) -> Any:
        out = {}
        for name, (spoil, options) in CASES.items():
            with pytest.MonkeyPatch.context() as patch:
                if spoil is not None:
                    spoil(patch)
                out[name], layout = gradients(made(home / str(rank), **options), PLAN, BATCHES)
            assert len(layout.places) >= 50
        return out

    ranks = run_ranks(work)
    one = {name: gradients(made(home, **options), ParallelConfig(), BATCHES)[0] for name, (_, options) in CASES.items()}
    return {name: (one[name], [r[name] for r in ranks]) for name in CASES}


def parts(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole gradients, and this rank's of what is not cut over data ranks."""
    whole = {n: g for n, g in found.items() if not n.startswith("own/")}
    return whole, {n: g for n, g in found.items() if n.startswith("own/")}


@pytest.mark.parametrize("name", ["right", "tied", "moe"])
def test_every_gradient_is_that_of_one_process(name: str, found: dict[str, tuple[Any, list[Any]]]) -> None:
    one, ranks = found[name]
    wanted, (whole, first), second = parts(one)[0], parts(ranks[0]), parts(ranks[1])[1]
    for kind in ("delta.a", "delta.b", "prefix.tokens", "prefix.gate", "new_gate", "bias", "scale", "norm", "tower."):
        assert any(kind in n for n in whole), kind
    assert apart(wanted, whole) < 1e-4
    # What both ranks hold whole has the same gradient on both without a sum.
    copies = {n: g for n, g in first.items() if g.shape == wanted[n.removeprefix("own/")].shape}
    assert 40 < len(copies) < len(first)
    assert apart(copies, {n: second[n] for n in copies}) < 1e-5


@pytest.mark.parametrize("name", ["unsummed", "misplaced"])
def test_a_wrong_cut_is_seen(name: str, found: dict[str, tuple[Any, list[Any]]]) -> None:
    one, ranks = found[name]
    assert apart(parts(one)[0], parts(ranks[0])[0]) > 0.1


def test_what_does_not_divide_is_named(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        odd = made(tmp_path / str(rank), n_kv_heads=1, ffn_dim=47, vocab_size=361)
        before = [n for n, _ in odd.net.named_modules()]
        said = []
        for model in (odd, made(tmp_path / str(rank))):
            if model is not odd and rank:
                with torch.no_grad():
                    next(model.net.backbone.parameters()).add_(1)
            try:
                parallelize(model.net, PLAN)
            except ValueError as error:
                said.append(str(error))
        assert before == [n for n, _ in odd.net.named_modules()]
        return said

    for divides, differ in run_ranks(work):
        assert divides == (
            "parallel.tensor 2 does not divide n_kv_heads 1, the feed-forward width 47, vocab_size 361; up to 8 1 does"
        )
        assert "have built different models" in differ


def test_a_frozen_towers_tiles_are_shared(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        found = []
        for specs in (METHODS["lora"], EVERYTHING):
            model = made(tmp_path / str(rank), specs=specs)
            tower, encoded = model.net.tower, []
            assert tower is not None
            tiles = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
            wanted = [t.detach() for t in tower.tokens(tiles)]
            parallelize(model.net, PLAN)
            tower.register_forward_pre_hook(lambda _, inputs, seen=encoded: seen.append(len(inputs[0])))
            for count in (5, 1, 0):
                for a, b in zip(tower.tokens(tiles[:count]), wanted, strict=True):
                    assert torch.allclose(a, b[:count], atol=1e-5)
            found.append(encoded)
        return found

    # A tower that trains encodes all of them on every rank, as its gradients are to be whole there.
    assert run_ranks(work) == [[[3, 1, 0], [5, 1, 0]], [[2, 0, 0], [5, 1, 0]]]


def test_too_few_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel.tensor is 2, but 1 process\(es\) run; .* --nproc-per-node 2"):
        parallelize(made(tmp_path).net, PLAN)
    with pytest.raises(ValueError, match=r"parallel\.tensor is 0"):
        ParallelConfig(tensor=0)


def test_dropout_of_a_cut_input_is_that_of_one_process() -> None:
    from accessory.peft.lora import LowRank

    x, whole = torch.randn(3, 8), LowRank(8, 4, 2, dropout=0.5).train()
    torch.manual_seed(3)
    wanted = whole._dropped(x)
    for part in (0, 1):
        whole.cut_input = (part, 2)
        torch.manual_seed(3)
        assert torch.equal(whole._dropped(x.chunk(2, -1)[part]), wanted.chunk(2, -1)[part])
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
    assert np.isfinite(wanted.numpy()).all()
