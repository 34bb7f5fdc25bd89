"""The tower contract: shapes, empty batches, exact constants, frozen statistics, layout of grids."""

import pytest
import torch

from accessory.vision.presets import PRESETS, build
from accessory.vision.tower import Tower, bring_to, repeat_to, to_map, to_patches
from accessory.vision.towers import TimmTower, TowerConfig, build_tower, open_clip_tower, transformers_tower

TINY = ["tiny-lite", "tiny-clip", "tiny-sphinx"]


def lite(size: int = 64) -> Tower:
    return build_tower(TowerConfig("timm", "tf_efficientnet_lite0", size, {"indices": (-1, -2), "norm": False}))


@pytest.mark.parametrize("name", TINY)
def test_tokens_have_the_promised_shapes_and_singles_equal_the_batch(name: str) -> None:
    tower = build(name)
    x = torch.rand(3, 3, tower.size, tower.size)
    seen, out, empty = tower(x), tower.tokens(x), tower.tokens(x[:0])
    assert seen.patches.shape == (3, tower.grid[0] * tower.grid[1], tower.width)
    assert (seen.cls is not None) == tower.has_cls
    assert len(out) == len(empty) == len(tower.groups)
    for i, group in enumerate(tower.groups):
        assert out[i].shape == (3, group.num_tokens, group.width)
        assert empty[i].shape == (0, group.num_tokens, group.width)
        singles = torch.cat([tower.tokens(x[k : k + 1])[i] for k in range(3)])
        torch.testing.assert_close(out[i], singles, atol=1e-5, rtol=1e-4)
        assert (out[i][0] - out[i][1]).abs().max() > 1e-6  # equal rows would make the line above empty


def test_default_preset_gives_sixteen_tokens_of_768() -> None:
    tower = build("efficientnet-lite0")
    assert (tower.size, tower.width, tower.grid, tower.has_cls) == (128, 768, (4, 4), False)
    assert tower.tokens(torch.rand(1, 3, 128, 128))[0].shape == (1, 16, 768)
    assert not any(k.startswith(("model.conv_head", "model.classifier")) for k in tower.state_dict())


@pytest.mark.parametrize(
    ("name", "tokens", "width", "size"),
    [("sphinx", 289, 5632, 224), ("sphinx-light", 257, 4608, 512), ("sphinx-moe", 289, 5632, 512)],
)
def test_full_presets_on_meta(name: str, tokens: int, width: int, size: int) -> None:
    with torch.device("meta"):
        tower = build(name)
    assert sum(g.num_tokens for g in tower.groups) == tokens
    assert (tower.groups[-1].width, tower.size) == (width, size)
    if tokens == 289:
        assert [(g.name, g.num_tokens, g.width) for g in tower.groups] == [("qformer", 32, 768), ("visual", 257, 5632)]


def test_full_presets_have_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        members = build("sphinx").members
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in members.items()}
    assert count["openclip_convnext_xxl"] == 843_398_016
    assert count["qformer"] == 1_091_114_496
    assert count["dinov2_vitg14"] == 1_136_480_768 - (37 * 37 - 16 * 16) * 1536  # positions already resized


def test_batch_norm_stays_frozen_and_affine_learns() -> None:
    tower = lite().train()
    before = {k: v.clone() for k, v in tower.state_dict().items() if "running" in k or "tracked" in k}
    tower.tokens(torch.rand(2, 3, 64, 64))[0].square().mean().backward()
    after = tower.state_dict()
    assert before
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert tower.training
    assert tower.get_parameter("model.bn1.weight").grad.abs().max() > 0


def test_a_bare_timm_model_would_move_its_statistics() -> None:
    tower = lite().train()
    model = tower.get_submodule("model").train()
    before = model.bn1.running_mean.clone()
    model(torch.rand(2, 3, 64, 64))
    assert not torch.equal(before, model.bn1.running_mean)


def test_a_fresh_tower_is_frozen_before_anyone_calls_train() -> None:
    tower = TimmTower("tf_efficientnet_lite0", 64, norm=False)
    before = tower.model.bn1.running_mean.clone()
    tower(torch.rand(1, 3, 64, 64))
    assert torch.equal(before, tower.model.bn1.running_mean)


def test_constants_stay_exact_in_bf16_and_come_back_from_meta() -> None:
    tower = build("tiny-clip")
    exact = tower.mean.clone()
    tower.to(torch.bfloat16)
    assert tower.mean.dtype == torch.float32
    assert torch.equal(tower.mean, exact)
    assert tower.tokens(torch.rand(1, 3, 32, 32))[0].dtype == torch.bfloat16
    assert not torch.equal(exact.to(torch.bfloat16).float(), exact)  # rounding would have shown
    with torch.device("meta"):
        empty = build("tiny-clip")
    assert empty.mean.is_meta
    assert torch.equal(empty.to_empty(device="cpu").mean, exact)
    assert not any(k.endswith(("mean", "std")) for k in tower.state_dict())


@pytest.mark.parametrize("name", ["tiny-lite", "tiny-clip"])
def test_patches_are_row_major(name: str) -> None:
    """Light on one corner changes most the token of that corner."""
    tower = build(name)
    rows, cols = tower.grid
    for row, col in [(0, cols - 1), (rows - 1, 0)]:
        base = torch.full((1, 3, tower.size, tower.size), 0.5)
        lit = base.clone()
        step = tower.size // rows
        lit[:, :, row * step : (row + 1) * step, col * step : (col + 1) * step] = torch.rand(1, 3, step, step)
        change = (tower(lit).patches - tower(base).patches).square().sum(-1)[0]
        near = change.view(rows, cols)
        assert near[row, col] > 3 * near[col, row]


def test_fold_keeps_every_value_at_its_place() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    folded = bring_to(x, (2, 2))
    assert folded.shape == (2, 12, 2, 2)
    for c, dy, dx in [(0, 0, 1), (2, 1, 0)]:
        assert torch.equal(folded[:, c * 4 + dy * 2 + dx], x[:, c, dy::2, dx::2])
    assert torch.equal(repeat_to(x, (8, 4))[:, :, 5, 3], x[:, :, 2, 3])
    assert torch.equal(to_map(to_patches(x), (4, 4)), x)
    with pytest.raises(ValueError, match="cannot be folded"):
        bring_to(x, (3, 3))
    with pytest.raises(ValueError, match="cannot be repeated"):
        repeat_to(x, (6, 6))


def test_indices_may_be_repeated_up_to_a_finer_grid() -> None:
    tower = TimmTower("tf_efficientnet_lite0", 64, (-2, -1), norm=False, grid=(4, 4)).eval()
    assert tower.width == 112 + 320
    x = torch.rand(1, 3, 64, 64)
    coarse = tower(x).patches.view(4, 4, -1)[..., 112:]
    assert torch.equal(coarse[0, 0], coarse[1, 1])
    assert not torch.equal(coarse[0, 0], coarse[2, 2])


def test_bad_tiles_name_what_was_wanted() -> None:
    tower = build("tiny-clip")
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\).*\(N, 3, 32, 32\)"):
        tower(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="uint8"):
        tower(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_bad_configs_are_errors() -> None:
    with pytest.raises(ValueError, match="no multiple of 32"):
        lite(100)
    with pytest.raises(ValueError, match="index 5 is outside"):
        TimmTower("tf_efficientnet_lite0", 64, (5,))
    with pytest.raises(ValueError, match="'nope' is not one of blip2, clip-h-projected, clip-l"):
        build("nope")
    with pytest.raises(ValueError, match="no model 'nope'"):
        open_clip_tower("nope", 32)
    with pytest.raises(ValueError, match="'relu'"):
        open_clip_tower("ViT-B-32", 32, activation="relu")
    with pytest.raises(ValueError, match="'resnet'"):
        transformers_tower("resnet", 32)
    with pytest.raises(ValueError, match="kind 'x'"):
        build_tower(TowerConfig("x", "y", 1))
    assert set(TINY) < set(PRESETS)
