"""A tile is blank exactly when no content pixel lies in it, and real tiles put together are the resized picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accessory.data.image import FILL, pad_to_square, resize, to_tensor
from accessory.data.tiling import TilingConfig, auto_grid, cut, plan

SIDES = st.integers(1, 300)


def flags(width: int, height: int, grid: int, size: int = 16) -> list[bool]:
    return [t.blank for t in plan(width, height, size=size, grid=grid).tiles]


def test_wide_and_tall_pictures_leave_tiles_blank() -> None:
    assert flags(200, 100, 2) == [False, False, False, True, True]
    assert flags(100, 200, 2) == [False, False, True, False, True]
    assert flags(400, 100, 4) == [False] + [False] * 4 + [True] * 12
    assert flags(100, 100, 2) == [False] * 5


def test_without_skip_nothing_is_blank() -> None:
    assert not any(t.blank for t in plan(400, 100, size=8, grid=4, skip=False).tiles)


def test_order_is_global_then_rows() -> None:
    made = plan(10, 10, size=8, grid=2)
    assert [t.box for t in made.tiles] == [(0, 0, 16, 16), (0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert [t.is_global for t in made.tiles] == [True] + [False] * 4
    assert len(plan(10, 10, size=8, grid=2, global_view=False).tiles) == 4
    assert len(plan(10, 40, size=8, grid=1).tiles) == 1


@settings(max_examples=60, deadline=None)
@given(width=SIDES, height=SIDES, grid=st.integers(2, 4), size=st.integers(2, 12))
def test_blank_iff_no_content_and_reassembly(width: int, height: int, grid: int, size: int) -> None:
    white = Image.new("RGB", (width, height), (255, 255, 255))
    made = plan(width, height, size=size, grid=grid)
    assert made.content is not None
    side = grid * size
    content = torch.zeros(side, side, dtype=torch.bool)
    content[: made.content[3], : made.content[2]] = True
    assert max(made.content[2:]) == side
    real = iter(cut(white, made)[1:])
    canvas = to_tensor(Image.new("RGB", (side, side), FILL))
    for tile in made.tiles[1:]:
        x0, y0, x1, y1 = tile.box
        assert tile.blank == (not content[y0:y1, x0:x1].any())
        if not tile.blank:
            canvas[:, y0:y1, x0:x1] = next(real)
    assert next(real, None) is None
    assert torch.equal(canvas[0] == 1.0, content)


def test_reassembled_tiles_are_the_resized_picture() -> None:
    image = Image.effect_noise((90, 45), 80).convert("RGB")
    made = plan(90, 45, size=16, grid=2)
    tiles = cut(image, made)
    assert tiles.shape == (3, 3, 16, 16)
    assert torch.equal(torch.cat([tiles[1], tiles[2]], dim=2), to_tensor(resize(image, 32, 16)))
    assert torch.equal(tiles[0], to_tensor(resize(pad_to_square(image), 16, 16)))
    whole = cut(image, plan(90, 45, size=16, grid=2, skip=False))
    square = torch.cat([torch.cat([whole[1], whole[2]], 2), torch.cat([whole[3], whole[4]], 2)], 1)
    assert torch.equal(square, to_tensor(resize(pad_to_square(image), 32, 32)))


@pytest.mark.parametrize(("width", "height", "grid"), [(128, 128, 1), (20, 10, 1), (129, 100, 2), (900, 300, 3)])
def test_auto_goes_by_resolution(width: int, height: int, grid: int) -> None:
    assert auto_grid(width, height, size=128, max_grid=3) == grid
    config = TilingConfig(128, "auto", max_grid=3)
    assert len(config.plan(width, height).tiles) == (1 if grid == 1 else 1 + grid * grid)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
        plan(1, 1, size=8, grid=0)
