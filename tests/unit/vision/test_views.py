"""Several views of a picture by one tower: how they are cut, in which order, and that one projection serves them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from accessory.models.mllm import MLLM
from accessory.vision.mixture import Member, Mixture, MixtureConfig, build_mixture, cut_views
from accessory.vision.presets import PRESETS, build, find
from accessory.vision.projector import Projector
from accessory.vision.resampler import Resampler
from accessory.vision.tower import TokenGroup
from accessory.vision.towers import TowerConfig
from tests import tiny_backbone


def config(size: int = 32, **options: int) -> MixtureConfig:
    """The tiny SPHINX over pictures of another size."""
    tiny = PRESETS["tiny-sphinx"]
    assert isinstance(tiny, MixtureConfig)
    return MixtureConfig(size, tiny.channel, tiny.extra, **options)


def same_weights(a: Mixture, b: Mixture) -> Mixture:
    b.load_state_dict(a.state_dict())
    return b


def test_views_are_the_whole_and_then_the_parts_row_by_row() -> None:
    x = torch.rand(2, 3, 48, 48)
    views = cut_views(x, 3, 16).unflatten(0, (2, 10))
    small = F.interpolate(x, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(views[:, 0], small)
    for i in range(9):
        row, column = divmod(i, 3)
        part = x[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert torch.equal(views[:, 1 + i], part)
    assert torch.equal(cut_views(x, 1, 48), x)
    # Parts of a resized picture, not resized parts: at their borders the two differ.
    half = F.interpolate(x, size=(24, 24), mode="bicubic", align_corners=False)
    parts = cut_views(x, 2, 12).unflatten(0, (2, 5))
    assert torch.equal(parts[:, 4], half[:, :, 12:, 12:])
    alone = F.interpolate(x[:, :, 24:, 24:], size=(12, 12), mode="bicubic", align_corners=False)
    assert (parts[:, 4] - alone).abs().max() > 1e-3


@torch.no_grad()
def test_every_view_gives_what_the_tower_of_one_view_gives() -> None:
    one, five = build_mixture(config()), build_mixture(config(64, tiles=2))
    same_weights(one, five)
    x = torch.rand(2, 3, 64, 64)
    views = cut_views(x, 2, 32).unflatten(0, (2, 5))
    tokens = five.tokens(x)
    assert [g.name for g in five.groups] == ["qformer", "visual"] * 5
    assert five.runs == (20,) * 5  # 3 queries, a class token and 4 x 4 patches
    assert one.runs == (20,)
    for view in range(5):
        for ours, expected in zip(tokens[2 * view : 2 * view + 2], one.tokens(views[:, view]), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (tokens[1] - tokens[3]).abs().max() > 1e-2  # and the views differ


@torch.no_grad()
def test_pooling_averages_the_patches_of_the_parts_alone() -> None:
    full, pooled = build_mixture(config(64, tiles=2)), build_mixture(config(64, tiles=2, pool=2))
    same_weights(full, pooled)
    x = torch.rand(2, 3, 64, 64)
    a, b = full.tokens(x), pooled.tokens(x)
    assert pooled.runs == (20, *(3 + 1 + 4,) * 4)
    assert pooled.runs == tuple(b[i].shape[1] + b[i + 1].shape[1] for i in range(0, 10, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    for i in range(3, 10, 2):
        assert torch.equal(a[i - 1], b[i - 1])
        assert torch.equal(a[i][:, 0], b[i][:, 0])  # the class token
        squares = a[i][:, 1:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(squares, b[i][:, 1:])


@torch.no_grad()
def test_one_projection_serves_all_views_and_no_picture_is_fine() -> None:
    tower = build_mixture(config(64, tiles=2, pool=2))
    projector = Projector(tower.groups, 12, "linear_norm", start_end=True)
    assert {n.split(".")[0] for n, _ in projector.named_parameters()} == {
        "qformer_proj", "visual_proj", "skip", "start_img", "end_img",
    }  # fmt: skip
    tokens = tower.tokens(torch.rand(2, 3, 64, 64))
    out = projector(tokens)
    assert out.shape == (2, projector.num_tokens, 12) == (2, sum(tower.runs), 12)
    pieces = [projector.get_submodule(f"{g.name}_proj")(t) for g, t in zip(tower.groups, tokens, strict=True)]
    torch.testing.assert_close(out, torch.cat(pieces, 1))
    assert projector.runs(tower.runs) == tower.runs
    assert Projector(tower.groups, 12, words=5).runs(tower.runs) == (*tower.runs[:-1], tower.runs[-1] + 1)
    assert projector(tower.tokens(torch.rand(0, 3, 64, 64))).shape == (0, sum(tower.runs), 12)


def test_bad_views_are_errors() -> None:
    with pytest.raises(ValueError, match="tiles 3 must be at least 1 and divide the mixture's size 64"):
        build_mixture(config(64, tiles=3))
    with pytest.raises(ValueError, match="pool 3 must be at least 1 and divide the grid"):
        build_mixture(config(64, tiles=2, pool=3))
    with pytest.raises(ValueError, match="clip takes tiles of 32, the mixture has 64"):
        build_mixture(config(128, tiles=2))
    with pytest.raises(ValueError, match="one width"):
        Projector((TokenGroup("visual", 4, 1), TokenGroup("visual", 5, 1)), 8)
    tower = build_mixture(config(64, tiles=2))
    with pytest.raises(ValueError, match="one view of a picture, this tower has 5"):
        MLLM(tiny_backbone.model(), tower, None, Resampler(tower.width, 32, 2, width=16, depth=1, heads=2))


def test_published_geometry() -> None:
    """Sides and views of the published models; the tokens of the full encoders are counted elsewhere."""
    known = {
        "sphinx": (224, 1), "sphinx-1k": (448, 2), "sphinx-2k": (672, 3), "sphinx-1k-pooled": (448, 2),
        "sphinx-light": (512, 1), "sphinx-light-1k": (1024, 2), "sphinx-moe": (512, 1), "sphinx-moe-1k": (1024, 2),
    }  # fmt: skip
    for name, found in known.items():
        preset = PRESETS[name]
        assert isinstance(preset, MixtureConfig)
        assert (preset.size, preset.tiles) == found


def activation_of(found: object) -> object:
    assert isinstance(found, MixtureConfig)
    return found.channel[0].config.options["activation"]


def test_clips_activation_is_a_choice() -> None:
    assert activation_of(find("sphinx-1k")) == "gelu"
    assert activation_of(find("sphinx-1k", "quick_gelu")) == "quick_gelu"
    assert activation_of(PRESETS["sphinx-1k"]) == "gelu"  # the preset itself stays
    plain, quick = build("tiny-clip"), build("tiny-clip", "quick_gelu")
    quick.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert (plain.tokens(x)[0] - quick.tokens(x)[0]).abs().max() > 1e-4
    for name in ("sphinx-light", "blip2", "tiny"):
        with pytest.raises(ValueError, match="activation 'gelu' is for"):
            find(name, "gelu")
    with pytest.raises(ValueError, match="vision preset 'nothing' is not one of"):
        find("nothing")
    assert Member("clip", TowerConfig("open_clip", "tiny", 32)).resize == "none"
