"""Tiling by aspect, and drawings between two styles."""

import numpy as np
import pytest

from accessory.data.emoji import blend
from accessory.data.tiling import TilingConfig, aspect_grid


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(128, 128, 1), (4000, 4000, 1), (256, 128, 2), (128, 256, 2), (512, 128, 4), (9, 1, 4)],
)
def test_the_grid_follows_the_ratio_of_the_sides(width: int, height: int, grid: int) -> None:
    assert aspect_grid(width, height, max_grid=4) == grid


def test_a_wide_picture_costs_its_own_tiles_only() -> None:
    config = TilingConfig(size=32, grid="aspect", max_grid=4)
    real = {ratio: config.plan(100 * ratio, 100).num_real for ratio in (1, 2, 4)}
    assert real == {1: 1, 2: 3, 4: 5}  # the global view and the tiles with content
    assert TilingConfig(size=32, grid="aspect", max_grid=4, skip=False).plan(400, 100).num_real == 17


def test_a_blend_has_both_drawings_and_their_pure_ends() -> None:
    first = np.zeros((4, 4, 4), np.uint8)
    first[:2] = (200, 0, 0, 255)
    second = np.zeros((4, 4, 4), np.uint8)
    second[2:] = (0, 200, 0, 255)
    both = blend(first, second, 0.75)
    assert both[0, 0].tolist() == [200, 0, 0, 191]
    assert both[3, 3].tolist() == [0, 200, 0, 63]
    assert np.array_equal(blend(first, second, 1.0), first)
