"""Queries that are drawn: noisy and mixed ones, whose noise belongs to a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.models.conditioner import DreamConditioner
from accessory.models.dream import Dream
from accessory.models.dream_queries import QueryConfig, QueryNoise, waves
from accessory.models.dream_weights import load, own_state, save, to_dreamllm
from accessory.models.generator import Generator
from accessory.models.generator_config import DreamSource
from accessory.train.features import CachedFeatures
from accessory.train.generation import DiffusionConfig, DiffusionObjective, NullPolicy, targets_of
from tests.tiny import tiny_config, tiny_tokenizer
from tests.tiny_generator import DREAM, PROFILE, caption_loader, draw_model
from tests.unit.models.dreams import DIM, document, dream, padded, randomised, text
from tests.unit.models.test_dream import EXACT, told

NOISY, MIXED = QueryConfig("noisy", grid=(1, 5)), QueryConfig("mixed", sigma=0.5)
KINDS = pytest.mark.parametrize("query", [NOISY, MIXED], ids=lambda q: q.kind)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_what_stands_at_the_queries() -> None:
    learned, mixed = QueryNoise(QueryConfig(), 6, DIM), QueryNoise(MIXED, 6, DIM)
    noisy = QueryNoise(QueryConfig("noisy", sigma=0.0, grid=(2, 3)), 6, DIM)
    rows = torch.randn(6, DIM)
    assert torch.equal(learned(rows, 2), rows.expand(2, 6, DIM))
    assert learned.draw(generators(1)) is None
    assert not list(learned.parameters())
    assert not learned.state_dict()
    drawn = mixed.draw(generators(1, 2))
    assert drawn is not None
    torch.testing.assert_close(mixed(rows, 2, drawn), rows + 0.5 * drawn)
    assert torch.equal(mixed(rows, 2)[0], mixed(rows, 2)[1])
    assert float((drawn[0] - drawn[1]).abs().max()) > 1
    assert noisy.learned == 0
    places = noisy(rows[:0], 1)[0]
    assert len({tuple(p.tolist()) for p in places}) == 6, "six places, six vectors"
    other = QueryNoise(QueryConfig("noisy", sigma=0.0, grid=(3, 2)), 6, DIM)
    assert not torch.equal(waves(2, 3), other.waves)
    assert float(QueryNoise(QueryConfig("noisy"), 400, DIM).fixed.std()) == pytest.approx(1.0, abs=0.05)
    assert QueryNoise(QueryConfig("mixed"), 4, DIM).sigma == 0.02
    seeded = QueryNoise(QueryConfig("noisy", seed=1), 6, DIM)
    assert not torch.equal(seeded.fixed, QueryNoise(QueryConfig("noisy"), 6, DIM).fixed)


@KINDS
@torch.no_grad()
def test_one_context_has_one_picture_unless_noise_is_given(query: QueryConfig) -> None:
    bridge = dream(query=query)
    ids = text(6)[0][None]
    first = told(bridge.condition(ids))
    assert torch.equal(told(bridge.condition(ids)), first)
    drawn = [told(bridge.condition(ids, noise=bridge.noise.draw(generators(s)))) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3
    assert (drawn[0] - first).abs().max() > 1e-3
    # No noise anywhere is no matter of luck: with learned queries nothing of this is there.
    plain = dream()
    with pytest.raises(ValueError, match=r"query\.kind is 'learned'"):
        plain.condition(ids, noise=torch.zeros(1, 5, DIM))


@KINDS
@torch.no_grad()
def test_a_picture_keeps_its_noise_in_any_batch_and_in_one_forward(query: QueryConfig) -> None:
    bridge = dream(query=query)
    a, b = text(6, 4)
    ids, mask = padded([a, b], "left")
    noise = bridge.noise.draw(generators(1, 2))
    assert noise is not None
    made = bridge.condition(ids, mask=mask, noise=noise)
    alone = [bridge.condition(row[None], noise=noise[i : i + 1]) for i, row in enumerate((a, b))]
    torch.testing.assert_close(told(made), torch.cat([told(c) for c in alone]), **EXACT)
    swapped = bridge.condition(ids, mask=mask, noise=noise.flip(0))
    assert (told(swapped) - told(made)).abs().max() > 1e-3
    row, row_mask = padded([document(bridge, a, None), document(bridge, b, None)], "right")
    whole = bridge(row, mask=row_mask, noise=noise).condition
    assert whole is not None
    torch.testing.assert_close(told(whole), told(made), **EXACT)
    with pytest.raises(ValueError, match="for 2 spans of 5 queries"):
        bridge(row, mask=row_mask, noise=noise[:1])


@KINDS
def test_the_null_draws_nothing_in_training_either(query: QueryConfig) -> None:
    bridge = dream(query=query).train()
    a, b = text(6, 4)
    ids, mask = padded([document(bridge, a, None), document(bridge, b, None)], "right")
    noise = bridge.noise.draw(generators(1, 2))
    trained = bridge(ids, mask=mask, drop=["all", "keep"], noise=noise).condition
    kept = bridge(ids, mask=mask, noise=noise).condition
    assert trained is not None
    assert kept is not None
    bridge.eval()
    with torch.no_grad():
        assert torch.equal(told(trained[:1]), told(bridge.null()))
    assert torch.equal(told(trained[1:]), told(kept[1:]))
    own = {n: p for n, p in bridge.named_parameters() if p.requires_grad and p.numel()}
    told(trained).square().sum().backward()
    if query.kind == "noisy":
        assert any("places" in n for n in own)
        assert all(p.grad is not None and p.grad.any() for n, p in own.items() if "places" in n)
    else:
        assert bridge.queries.grad is not None
        assert bool(bridge.queries.grad.any())


@KINDS
@torch.no_grad()
def test_a_saved_bridge_has_the_same_noise(query: QueryConfig, tmp_path: Path) -> None:
    bridge = dream(query=query)
    assert not any("fixed" in name or "waves" in name for name in own_state(bridge))
    save(bridge, tmp_path / "bridge")
    again = load(bridge.net, tmp_path / "bridge").eval()
    ids = text(6)[0][None]
    expected = told(bridge.condition(ids))
    assert torch.equal(told(again.condition(ids)), expected)
    fresh = Dream(bridge.net, bridge.config).eval()
    randomised(fresh.heads)
    assert (told(fresh.condition(ids)) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="DreamLLM has no bridge"):
        to_dreamllm(dream("dreamllm", query=query))


def drawn_generator(folder: Path, query: QueryConfig, **options: Any) -> Generator:
    source = DreamSource(tiny_config(tiny_tokenizer(folder / "words")), replace(DREAM, query=query), PROFILE)
    names = ("conditioner.dream.heads.*", "conditioner.dream.noise.*") if query.kind == "noisy" else ("denoiser.*",)
    return draw_model(folder, dream=True, conditioner=source, **{"tuning": names, **options})


def test_training_draws_for_every_picture_and_never_for_its_place_in_a_batch(tmp_path: Path) -> None:
    query = QueryConfig("noisy", grid=(3, 1))
    model = drawn_generator(tmp_path, query)
    assert isinstance(model.conditioner, DreamConditioner)
    randomised(model.conditioner.dream.heads)
    objective = DiffusionObjective(DiffusionConfig(drop=NullPolicy(all=0.0)), seed=5)

    def conditions(batch_size: int, count: int) -> list[Tensor]:
        batches, out = iter(caption_loader(tmp_path, batch_size)), []
        for _ in range(count):
            targets = targets_of(next(batches))
            made = objective.condition(model, targets, objective.draw(model, targets))
            out += [told(made[[i]]) for i in range(len(made))]
        return out

    for whole, part in zip(conditions(4, 1), conditions(2, 2), strict=True):
        torch.testing.assert_close(whole, part, **EXACT)
    other = DiffusionObjective(objective.config, seed=6)
    targets = targets_of(next(iter(caption_loader(tmp_path, 1))))
    first, second = (told(o.condition(model, targets, o.draw(model, targets))) for o in (objective, other))
    assert (first - second).abs().max() > 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"kind": "learned", "sigma": 1.0}, "learned ones have no noise"),
        ({"kind": "mixed", "grid": (1, 5)}, "is for query.kind 'noisy'"),
        ({"kind": "noisy", "sigma": -1.0}, "at least 0"),
        ({"kind": "noisy", "grid": (0, 5)}, "at least 1 x 1"),
    ):
        with pytest.raises(ValueError, match=words):
            QueryConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid of 2 x 2 does not make num_queries 5"):
        dream(query=QueryConfig("noisy", grid=(2, 2)))
    with pytest.raises(ValueError, match="does not make num_queries 0"):
        dream("chatillusion", query=QueryConfig("mixed"))
    model = drawn_generator(tmp_path, QueryConfig("mixed"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="'mixed' is drawn for every picture"):
        CachedFeatures(model, tmp_path / "features", "tiny")
