"""Mixtures: order, common grid, pseudo class token, resizing rules."""

import pytest
import torch
from torch.nn import functional as F

from accessory.vision.mixture import Mixture
from accessory.vision.presets import build
from accessory.vision.towers import TimmTower


def tiny() -> Mixture:
    found = build("tiny-sphinx")
    assert isinstance(found, Mixture)
    return found


def test_channels_follow_the_declared_order_and_each_member_sees_its_own_copy() -> None:
    mix = tiny()
    x = torch.rand(2, 3, 32, 32)
    clip, conv, dino = (mix.member(n) for n in mix.channel)
    big = F.interpolate(x, size=(64, 64), mode="nearest")
    a, b, c = clip(x), conv(big), dino(x)
    cells = b.patches.view(2, 2, 2, -1).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    out = mix(x)
    torch.testing.assert_close(out.patches, torch.cat([a.patches, cells, c.patches], -1))
    torch.testing.assert_close(out.cls, torch.cat([a.cls, b.patches.mean(1), c.cls], -1))
    torch.testing.assert_close(mix.tokens(x)[0], mix.member("qformer")(x).patches)
    assert [g.name for g in mix.groups] == ["qformer", "visual"]
    # and the rule matters: a bicubic copy gives other features
    other = conv(F.interpolate(x, size=(64, 64), mode="bicubic", align_corners=False))
    assert (other.patches - b.patches).abs().max() > 1e-3


def test_without_any_class_token_there_is_none() -> None:
    args = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 20)}
    towers = {n: TimmTower("convnext_atto", 64, model_args=args).eval() for n in ("a", "b")}
    mix = Mixture(64, towers).eval()
    assert not mix.has_cls
    assert mix.tokens(torch.rand(1, 3, 64, 64))[0].shape == (1, 4, 40)


def test_gradients_reach_every_member() -> None:
    mix = tiny().train()
    sum(t.square().sum() for t in mix.tokens(torch.rand(1, 3, 32, 32))).backward()
    for name in (*mix.channel, *mix.extra):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in mix.member(name).parameters()), name


def test_members_keep_float_pixels_until_their_own_normalisation() -> None:
    mix = tiny().to(torch.bfloat16)
    seen: list[torch.dtype] = []
    mix.member("clip").register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert {t.dtype for t in mix.tokens(torch.rand(1, 3, 32, 32))} == {torch.bfloat16}
    assert seen == [torch.float32]


def test_bad_mixtures_are_errors() -> None:
    tower = build("tiny-clip")
    with pytest.raises(ValueError, match="takes tiles of 32, the mixture has 64"):
        Mixture(64, {"clip": tower})
    with pytest.raises(ValueError, match="'area'"):
        Mixture(64, {"clip": tower}, resize={"clip": "area"})
    with pytest.raises(ValueError, match="distinct names"):
        Mixture(32, {"clip": tower}, {"clip": tower})
    with pytest.raises(ValueError, match="needs channel towers"):
        Mixture(32, {})
