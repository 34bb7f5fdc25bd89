"""Pictures in a sequence: batches equal singles, learned vectors stand where they should, cached equals uncached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.models.build import Model, ProjectorConfig, ResamplerConfig
from accessory.models.mllm import MLLM
from accessory.peft.attach import PrefixSpec, TrainSpec
from accessory.tokens import IMAGE, IMAGE_END, IMAGE_START, SKIP
from tests.tiny import disturb
from tests.unit.models.pictured import batch, mixed, model, picture, sample

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model(tmp_path_factory.mktemp("tiny"), projector=ProjectorConfig("linear_norm", start_end=True))


def seeing_by_prefix(folder: Path, *, projector: bool = False) -> Model:
    return model(
        folder,
        projector=ProjectorConfig("linear_norm") if projector else None,
        resampler=ResamplerConfig(length=3, width=16, depth=1, heads=2),
        tuning=(PrefixSpec(length=3, init_std=0.1), TrainSpec(("resampler.*",))),
        train=True,
    )


@torch.inference_mode()
def test_a_mixed_batch_equals_its_rows_one_by_one(made: Model) -> None:
    rows = mixed()
    both = batch(made, rows)
    # 1 + (1 + 3) + (1 + 2): every tile but the blank ones
    assert both.tiles.shape[0] == 1 + 1 + 3 + 3
    together = made.net(both.ids, both.tiles)
    for i, row in enumerate(rows):
        alone = batch(made, [row])
        h = made.net(alone.ids, alone.tiles)[0]
        torch.testing.assert_close(together[i, : len(h)], h, **CLOSE)
    swapped = made.net(both.ids, both.tiles.flip(0))
    assert (swapped - together)[1:].abs().amax((1, 2)).min() > 1e-2  # the pictures matter in every row that has one
    assert torch.equal(swapped[0], together[0])


@torch.inference_mode()
def test_every_kind_of_position_gets_its_vector(made: Model) -> None:
    one = batch(made, mixed()[2:3])
    x, ids = made.net.embed(one.ids, one.tiles), one.ids
    assert made.net.projector is not None
    features = made.net.encode(one.tiles)
    assert torch.equal(x[ids == IMAGE], features.flatten(0, 1))
    for placeholder, name in ((SKIP, "skip"), (IMAGE_START, "start_img"), (IMAGE_END, "end_img")):
        found = x[ids == placeholder]
        assert len(found) == {SKIP: 2}.get(placeholder, len(one.tiles)), name
        assert (found == getattr(made.net.projector, name)).all(), name
    assert torch.equal(x[ids >= 0], made.net.backbone.tok_embeddings.weight[ids[ids >= 0]])
    spared = made.net.embed(ids, features=features)
    assert torch.equal(spared, x)


@pytest.mark.parametrize("name", ["skip", "start_img", "end_img"])
def test_learned_vectors_matter(made: Model, name: str) -> None:
    one = batch(made, mixed()[2:3])
    vector = getattr(made.net.projector, name)
    with torch.inference_mode():
        before = made.net(one.ids, one.tiles)
    old = vector.data.clone()
    try:
        vector.data += 1
        with torch.inference_mode():
            after = made.net(one.ids, one.tiles)
    finally:
        vector.data.copy_(old)
    assert (after - before)[:, -1].abs().max() > 1e-3


def test_wrong_counts_name_both_numbers(made: Model) -> None:
    one = batch(made, mixed()[1:2])
    per_tile = made.encoder.tokens_per_tile
    with pytest.raises(ValueError, match=rf"\b{per_tile} <image> placeholders.*\b{3 * per_tile} features"):
        made.net(one.ids, one.tiles.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match=rf"\b{per_tile} <image> placeholders.*\b0 features"):
        made.net(one.ids, one.tiles[:0])
    with pytest.raises(ValueError, match="no tiles came"):
        made.net(one.ids)
    with pytest.raises(ValueError, match="splices no pictures"):
        MLLM(made.net.backbone)(one.ids, one.tiles)
    with pytest.raises(ValueError, match="has no tower"):
        MLLM(made.net.backbone).encode(one.tiles)
    with pytest.raises(ValueError, match="needs a projector or a resampler"):
        MLLM(made.net.backbone, made.net.tower)


@torch.inference_mode()
def test_cached_equals_uncached_with_pictures(made: Model) -> None:
    one = batch(made, mixed()[2:3])
    whole = made.net(one.ids, one.tiles)
    total = one.ids.shape[1]
    starts = (one.ids[0] == IMAGE_START).nonzero()[:, 0].tolist()
    cuts = [starts[0] + 3, starts[1], total - 1]  # within a picture too, where its features come in two parts
    features = made.net.encode(one.tiles).flatten(0, 1)[None]
    cache, parts, at, seen = made.net.backbone.cache(1, total), [], 0, 0
    for end in [*cuts, total]:
        ids = one.ids[:, at:end]
        n = int((ids == IMAGE).sum())
        parts.append(made.net(ids, features=features[:, seen : seen + n] if n else None, cache=cache))
        at, seen = end, seen + n
    assert cache.length == total
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_a_text_only_batch_keeps_the_projector_in_the_graph(tmp_path: Path) -> None:
    made = model(tmp_path, projector=ProjectorConfig("mlp", start_end=True), train=True)
    one = batch(made, mixed()[:1])
    assert one.tiles.shape[0] == 0
    made.net(one.ids, one.tiles).sum().backward()
    assert made.net.projector is not None
    grads = {n: p.grad for n, p in made.net.projector.named_parameters()}
    assert len(grads) == 7
    assert [n for n, g in grads.items() if g is None] == []
    assert all(not g.any() for g in grads.values() if g is not None)
    # ... and it changed nothing of the text
    with torch.inference_mode():
        plain = made.net.backbone(made.net.backbone.embed(one.ids))
        assert torch.equal(made.net(one.ids, one.tiles), plain)


@pytest.mark.parametrize("projector", [False, True])
def test_a_visual_prefix_matters_once_its_gates_open(tmp_path: Path, projector: bool) -> None:
    made = seeing_by_prefix(tmp_path, projector=projector)
    made.net.eval()
    rows = [mixed()[0], sample(picture(1), "What is this?"), sample(picture(2), "What is this?")]
    both = batch(made, rows)
    blank = replace(both, tiles=both.tiles.flip(0))
    with torch.no_grad():
        features = made.net.encode(both.tiles) if projector else None
        shut = [made.net(b.ids, b.tiles, features=features, counts=b.counts) for b in (both, blank)]
        assert torch.equal(*shut)  # closed gates: nothing of the picture comes through the prefix
        disturb(made.net)
        features = made.net.encode(both.tiles) if projector else None
        opened = [made.net(b.ids, b.tiles, features=features, counts=b.counts) for b in (both, blank)]
        assert (opened[0] - opened[1])[1:].abs().amax((1, 2)).min() > 1e-3
        assert torch.equal(opened[0][0], opened[1][0])  # the row without a picture
        for i, row in enumerate(rows):
            alone = batch(made, [row])
            h = made.net(alone.ids, alone.tiles)[0]
            torch.testing.assert_close(opened[0][i, : len(h)], h, **CLOSE)


def test_a_visual_prefix_goes_on_in_cached_steps(tmp_path: Path) -> None:
    made = seeing_by_prefix(tmp_path)
    disturb(made.net)
    made.net.eval()
    one = batch(made, [sample(picture(1), "What is this?")])
    with torch.inference_mode():
        whole = made.net(one.ids, one.tiles)
        context = made.net.context(one.ids, one.tiles)
        cut, total = one.ids.shape[1] - 4, one.ids.shape[1]
        cache = made.net.backbone.cache(1, total)
        steps = [made.net(one.ids[:, :cut], one.tiles, cache=cache)]
        steps += [made.net(one.ids[:, i : i + 1], cache=cache) for i in range(cut, total)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
        assert cache.context is not None  # the cache has kept it
        assert torch.equal(cache.context, context)
        torch.testing.assert_close(made.net(one.ids, context=context), whole, **CLOSE)
        cache.truncate(cut)
        assert cache.context is not None
        cache.context = None
        forgotten = made.net(one.ids[:, cut:], cache=cache)
        cache.truncate(0)
        assert cache.context is None
    assert (forgotten - whole[:, cut:]).abs().max() > 1e-3


def test_a_visual_prefix_counts_its_tiles(tmp_path: Path) -> None:
    made = seeing_by_prefix(tmp_path)
    two = batch(made, [sample(picture(1), "What is this?"), sample("What is this?")])
    with pytest.raises(ValueError, match=r"placeholders of 1 tiles.*there are 2"):
        made.net(two.ids, two.tiles.expand(2, -1, -1, -1), counts=two.counts)
    with pytest.raises(ValueError, match="1 tiles for 2 rows: which are whose"):
        made.net(two.ids, two.tiles)
    with pytest.raises(ValueError, match="splices no pictures"):
        made.net(torch.tensor([[1, IMAGE]]), two.tiles)
    with pytest.raises(ValueError, match="has no resampler"):
        model(tmp_path / "other").net.prefixes(two.tiles)


@torch.inference_mode()
def test_a_published_adapter_gives_a_picture_no_position(tmp_path: Path) -> None:
    """Its rows hold no placeholders: how many pictures each has is said beside them."""
    made = seeing_by_prefix(tmp_path)
    disturb(made.net, 0.3)
    tiles = torch.rand(3, 3, 64, 64)
    ids = torch.randint(0, 300, (2, 6))
    context = made.net.context(ids, tiles, torch.tensor([1, 2]))
    assert context is not None
    h = made.net(ids, context=context)
    alone = made.net.context(ids[1:], tiles[1:], torch.tensor([2]))
    torch.testing.assert_close(h[1:], made.net(ids[1:], context=alone), **CLOSE)
    assert (h - made.net(ids)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="placeholders of 2 tiles, but there are 3"):
        made.net.context(ids, tiles, torch.tensor([1, 1]))
