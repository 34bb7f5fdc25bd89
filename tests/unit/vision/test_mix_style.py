"""Mixing of styles: statistics move, content stays, and only while the tower trains."""

import pytest
import torch

from accessory.vision import presets
from accessory.vision.mix_style import MixStyleConfig, attach_mix_style, mix_style


def test_statistics_become_anothers_and_the_content_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5) * torch.rand(6, 4, 1, 1) * 3 + torch.randn(6, 4, 1, 1)
    y = mix_style(x, 0.1)

    def content(z: torch.Tensor) -> torch.Tensor:
        return (z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), keepdim=True)

    assert torch.allclose(content(x), content(y), atol=1e-3)
    assert (x.mean((2, 3)) - y.mean((2, 3))).abs().max() > 0.1
    low, high = x.mean((2, 3)).amin(0) - 1e-4, x.mean((2, 3)).amax(0) + 1e-4
    assert bool(((y.mean((2, 3)) >= low) & (y.mean((2, 3)) <= high)).all()), "a mix lies between what there was"


def test_it_acts_in_training_only() -> None:
    torch.manual_seed(0)
    tower = presets.build("tiny-lite")
    pixels = torch.rand(4, 3, tower.size, tower.size)
    plain = tower.eval()(pixels).patches
    attach_mix_style(tower, MixStyleConfig(("model.blocks.0",), probability=1.0))
    assert torch.equal(tower(pixels).patches, plain)
    mixed = tower.train()(pixels).patches
    assert (mixed - plain).abs().max() > 1e-3
    mixed.sum().backward()
    assert all(p.grad is not None for p in tower.model.blocks[0].parameters())


def test_a_single_picture_has_nobody_to_mix_with() -> None:
    tower = presets.build("tiny-lite")
    pixels = torch.rand(1, 3, tower.size, tower.size)
    plain = tower.eval()(pixels).patches
    attach_mix_style(tower, MixStyleConfig(("model.blocks.0",), probability=1.0))
    assert torch.equal(tower.train()(pixels).patches, plain)


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.nowhere"):
        attach_mix_style(presets.build("tiny-lite"), MixStyleConfig(("model.nowhere",)))
    with pytest.raises(ValueError, match="probability"):
        MixStyleConfig(("model.blocks.0",), probability=0)
