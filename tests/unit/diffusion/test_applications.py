"""Training-free applications: each changes what it should, and nothing where it has nothing to do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accessory.diffusion.applications import (
    RegionPrompt,
    compose,
    edit,
    extrapolate,
    normalised,
    repaint,
    scene,
    style_batch,
    tiled,
    token_count,
    trained_tokens,
)
from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.dit_sizes import SIZES
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Ode, SamplerSettings, Scheduled, sample
from accessory.diffusion.time_grid import Grid
from tests.unit.diffusion.dits import FLAG, NEXT, far, noise, randomised, told

KINDS = {"flag": FLAG, "next": NEXT}
EULER = SamplerSettings(solver=Ode(method="euler"), grid=Grid(points=4), guidance=Guidance(2.0))
SHAPE = (4, 8, 8)


def encode(texts: list[str]) -> Condition:
    """Features that depend on the words of a text alone."""
    rows = []
    for text in texts:
        words = [torch.Generator().manual_seed(sum(map(ord, word))) for word in text.split()]
        seq = torch.stack([torch.randn(20, generator=g) for g in words])[None]
        rows.append(Condition(seq=seq, mask=torch.ones(1, len(words), dtype=torch.bool)))
    return join(rows)


NULL = encode(["nothing"])


def one(latents: Latents) -> Tensor:
    assert isinstance(latents, Tensor)
    return latents


# --- Resolution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_extrapolation_acts_only_beyond_the_trained_size(kind: str) -> None:
    config = KINDS[kind]
    model, condition = randomised(config), told(config, 1)
    task = {"shape": (4, 16, 16), "seeds": [3], "settings": EULER}
    plain = one(sample(model, condition, NULL, **task))
    for trained in ((16, 16), (32, 8), (32, 32)):
        same = one(sample(model, condition, NULL, **task, steering=extrapolate(config, trained, (16, 16))))
        assert torch.equal(same, plain)
    double = extrapolate(config, (8, 8), (16, 16))
    assert far(one(sample(model, condition, NULL, **task, steering=double)), plain) > 1e-3
    # The table and the attention each do their part.
    for part in (replace(double, rope_scale=1.0), replace(double, base_tokens=None)):
        assert far(one(sample(model, condition, NULL, **task, steering=part)), plain) > 1e-3


def test_families_have_their_released_numbers() -> None:
    flag, next_ = SIZES["flag_t2i_5b"], SIZES["next_t2i_2b"]
    trained, wanted = (128, 128), (256, 256)
    a, b = extrapolate(flag, trained, wanted), extrapolate(next_, trained, wanted)
    assert (a.rope_method, a.rope_scale, a.base_tokens) == ("ntk", 4.0, 4224)
    assert (b.rope_method, b.rope_scale, b.base_tokens, b.watershed) == ("time_switch", 2.0, 4096, 0.3)
    assert (token_count(flag, trained), token_count(next_, trained)) == (4160, 4096)
    assert trained_tokens(flag, trained, tallest=1) == 4160
    assert trained_tokens(SIZES["large_t2i_3b"], trained) == token_count(SIZES["large_t2i_3b"], trained) == 4224
    # The released scale of queries at 2048 pixels, over 1 / sqrt(72).
    assert b.base_tokens is not None
    ratio = math.log(token_count(next_, wanted)) / math.log(b.base_tokens)
    assert math.sqrt(ratio / 72) == pytest.approx(0.127294, abs=1e-6)
    assert extrapolate(flag, trained, trained, proportional=True).base_tokens == 4224
    assert extrapolate(
        next_, trained, wanted, proportional=False, steering=Steering(shared_attention=True)
    ) == Steering(rope_scale=2.0, shared_attention=True)
    with pytest.raises(ValueError, match="3 axes"):
        extrapolate(replace(FLAG, rope_axes=3), (8, 8), (16, 16))


# --- Regions ----------------------------------------------------------------------------------------------------------


def test_one_region_of_all_is_the_plain_text() -> None:
    model, condition = randomised(NEXT), encode(["a red cat"])
    task = {"shape": SHAPE, "seeds": [1], "settings": EULER}
    plain = one(sample(model, condition, NULL, **task))
    whole = [RegionPrompt("a red cat", (0, 0, 1, 1))]
    halves = [RegionPrompt("a red cat", (0, 0, 0.5, 1)), RegionPrompt("a red cat", (0.5, 0, 1, 1))]
    for parts in (whole, halves):
        assert far(one(sample(model, condition, NULL, **task, steering=compose(parts, encode))), plain) < 1e-4
    other = [halves[0], replace(halves[1], text="two blue birds")]
    assert far(one(sample(model, condition, NULL, **task, steering=compose(other, encode))), plain) > 1e-3
    louder = [replace(whole[0], weight=2.0)]
    assert far(one(sample(model, condition, NULL, **task, steering=compose(louder, encode))), plain) > 1e-3


def test_a_region_replaces_the_text_it_covers() -> None:
    # With the pooled vector held fixed, a picture under a region of all is the picture of the region's text.
    model, pooled = randomised(NEXT), noise(1, 20)
    condition, other = (replace(encode([text]), pooled=pooled) for text in ("a red cat", "two blue birds"))
    null = replace(NULL, pooled=pooled)
    task = {"shape": SHAPE, "seeds": [1], "settings": EULER}
    over = compose([RegionPrompt("two blue birds", (0, 0, 1, 1))], encode)
    found = one(sample(model, condition, null, **task, steering=over))
    assert far(found, one(sample(model, other, null, **task))) < 1e-4
    assert far(found, one(sample(model, condition, null, **task))) > 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 4), (3, 1)])
def test_each_cell_of_a_grid_has_its_own_text(rows: int, columns: int) -> None:
    # One block and one step, so that what a cell reads stays in it.
    model, texts = randomised(replace(NEXT, n_layers=1)), ["cat", "bird tree", "sun", "sea ship boat"][: rows * columns]
    settings = replace(EULER, grid=Grid(points=2))
    shape = (4, 2 * rows * 2, 2 * columns * 2)
    pooled = noise(1, 20)
    condition, null = replace(encode([scene(tiled(texts, rows, columns))]), pooled=pooled), replace(NULL, pooled=pooled)

    def draw(texts: list[str]) -> Tensor:
        steering = compose(tiled(texts, rows, columns), encode)
        return one(sample(model, condition, null, shape=shape, seeds=[1], settings=settings, steering=steering))

    plain = draw(texts)
    for i in range(len(texts)):
        changed = draw([*texts[:i], "house", *texts[i + 1 :]])
        moved = (changed - plain).abs().amax((0, 1)) > 1e-5
        inside = torch.zeros(shape[1:], dtype=torch.bool)
        y, x = divmod(i, columns)
        inside[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = True
        assert torch.equal(moved, inside), f"cell {i}"


def test_texts_are_read_once_and_errors_are_named() -> None:
    steering = compose(tiled(["sky", "cat", "sky"], 3, 1), encode)
    assert steering.region_condition is not None
    assert len(steering.region_condition) == 2
    assert [region.row for region in steering.regions] == [0, 1, 0]
    with pytest.raises(ValueError, match="no regions"):
        compose([], encode)
    with pytest.raises(ValueError, match="3 texts for 2 rows of 2"):
        tiled(["a", "b", "c"], 2, 2)
    with pytest.raises(ValueError, match="2 texts of regions were encoded to 1 rows"):
        compose(tiled(["a", "b"], 1, 2), lambda texts: encode(texts[:1]))


# --- One style --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_picture_of_a_style_batch_is_its_own(kind: str) -> None:
    model, condition = randomised(KINDS[kind]), told(KINDS[kind], 3)
    y = one(style_batch(model, condition, NULL, shape=SHAPE, seeds=[1, 2, 3], settings=EULER))
    for i in range(3):
        alone = one(sample(model, condition[[i]], NULL, shape=SHAPE, seeds=[i + 1], settings=EULER))[0]
        if i == 0:
            assert far(y[i], alone) < 1e-4
        else:
            assert far(y[i], alone) > 1e-3
    # Another first picture means another style; another third one matters to itself alone.
    first = one(style_batch(model, condition, NULL, shape=SHAPE, seeds=[7, 2, 3], settings=EULER))
    third = one(style_batch(model, condition, NULL, shape=SHAPE, seeds=[1, 2, 7], settings=EULER))
    assert far(first[1], y[1]) > 1e-3
    assert far(third[:2], y[:2]) < 1e-4 < far(third[2], y[2])


def test_a_given_picture_sets_the_style() -> None:
    model, condition = smooth(), told(NEXT, 2)
    reference = 0.5 * noise(*SHAPE, seed=9)
    settings = SamplerSettings(grid=Grid(points=12), guidance=None)
    task = {"shape": SHAPE, "seeds": [1, 2], "settings": settings}
    y = one(style_batch(model, condition, **task, reference=reference))
    assert far(y[0], reference) < 5e-3
    plain = one(style_batch(model, condition, **task))
    assert far(y[1], plain[1]) > 1e-4
    assert far(plain[0], reference) > 0.1
    listed = style_batch(model, condition, **(task | {"shape": [SHAPE, SHAPE]}), reference=reference)
    assert max(far(a, b) for a, b in zip(listed, y)) < 1e-4
    with pytest.raises(ValueError, match="the reference has shape"):
        style_batch(model, condition, **task, reference=reference[:, :4])


# --- Editing ----------------------------------------------------------------------------------------------------------


def smooth() -> FlagDiT:
    """A model whose velocity changes slowly: its last layer is small."""
    model = randomised(NEXT)
    with torch.no_grad():
        for p in model.final_layer.parameters():
            p.mul_(0.15)
    return model


def test_strength_0_gives_the_picture_back() -> None:
    model, condition = randomised(NEXT), told(NEXT, 2)
    picture = noise(2, *SHAPE, seed=9)
    task = {"seeds": [1, 2], "settings": EULER}
    assert torch.equal(one(repaint(model, picture, condition, NULL, strength=0.0, **task)), picture)
    assert torch.equal(one(edit(model, picture, condition, condition, NULL, start=1.0, settings=EULER)), picture)
    half = one(repaint(model, picture, condition, NULL, strength=0.5, **task))
    assert far(half, picture) > 1e-2
    # Strength 1 leaves nothing of it.
    full = one(repaint(model, picture, condition, NULL, strength=1.0, **task))
    assert far(full, one(sample(model, condition, NULL, shape=SHAPE, **task))) < 1e-5
    with pytest.raises(ValueError, match=r"a time in \[0, 1\], got 1.5"):
        edit(model, picture, condition, condition, start=1.5)


def test_an_edit_with_the_same_text_is_a_round_trip() -> None:
    model, condition, other = smooth(), told(NEXT, 2), told(NEXT, 2, seed=8)
    picture = noise(2, *SHAPE, seed=9)
    settings = SamplerSettings(grid=Grid(points=16), guidance=None)
    errors = []
    for points in (6, 11, 21):
        fine = replace(settings, grid=Grid(points=points))
        errors.append(far(one(edit(model, picture, condition, condition, start=0.0, settings=fine)), picture))
    assert errors[-1] < 2e-3
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # second order, as midpoint is
    edited = [one(edit(model, picture, condition, other, start=s, settings=settings)) for s in (0.0, 0.5, 0.9)]
    changes = [(y - picture).abs().mean().item() for y in edited]
    assert changes[0] > changes[1] > changes[2] > 0
    assert changes[0] > 5 * errors[-1]
    as_list = edit(model, list(picture), condition, other, start=0.5, settings=settings)
    assert max(far(a, b) for a, b in zip(as_list, edited[1])) < 1e-4
    with pytest.raises(ValueError, match="only a flow can be inverted"):
        edit(model, picture, condition, other, settings=SamplerSettings(solver=Scheduled()))


def test_channels_get_the_statistics_of_the_path() -> None:
    picture = 3 * noise(2, *SHAPE, seed=9) + torch.arange(4.0)[:, None, None]
    state = 0.2 * noise(2, *SHAPE, seed=10) - 1
    assert normalised(state, picture, 0.5, "keep") is state
    for t in (0.0, 0.4):
        unit, source = (one(normalised(state, picture, t, kind)) for kind in ("unit", "source"))
        spread = picture.std((2, 3), correction=0)
        assert unit.mean((2, 3)).abs().max() < 1e-5
        for found, own in ((unit, torch.ones_like(spread)), (source, spread)):
            wanted = ((t * own) ** 2 + (1 - t) ** 2).sqrt()
            torch.testing.assert_close(found.std((2, 3), correction=0), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(source.mean((2, 3)), t * picture.mean((2, 3)), rtol=1e-4, atol=1e-5)
        listed = normalised(list(state), list(picture), t, "source")
        assert max(far(a, b) for a, b in zip(listed, source)) < 1e-5
    # ... and an edit uses them.
    model, condition = smooth(), told(NEXT, 2)
    settings = SamplerSettings(grid=Grid(points=4), guidance=None)
    plain, unit = (
        one(edit(model, picture, condition, condition, start=0.3, statistics=kind, settings=settings))
        for kind in ("keep", "unit")
    )
    assert far(plain, unit) > 0.1
