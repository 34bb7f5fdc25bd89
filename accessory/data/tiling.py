"""Cutting a picture into views: one global view and a grid of tiles, those of pure padding left blank (SPHINX-X).

Planning is integer arithmetic on the picture's size alone. The global view is SPHINX's: padded to a square around the
middle, then resized. The grid lies over a canvas of side ``grid * size``. Without skip tokens it is that same square,
enlarged (SPHINX v1). With them the picture stands in the canvas' upper left corner, because only then can whole tiles
be free of it: in the middle, a 2:1 picture touches all four tiles of a 2x2 grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image

from accessory.data.image import FILL, center_square, pad_to_square, resize, to_tensor

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class TilingConfig:
    """``size`` pixels a tile side; ``grid`` tiles a canvas side.

    A grid of 1 is the global view alone; ``auto`` follows the resolution, ``aspect`` the ratio of the sides (a square
    picture of any resolution stays one view, a 4:1 one becomes four tiles and twelve skips); both at most ``max_grid``.
    ``fit`` crop takes the middle square instead of padding to one; only a single view can do so.
    """

    size: int
    grid: int | Literal["auto", "aspect"] = 1
    global_view: bool = True
    skip: bool = True
    max_grid: int = 2
    fit: Literal["pad", "crop"] = "pad"

    def __post_init__(self) -> None:
        if self.fit == "crop" and self.grid != 1:
            raise ValueError(f"tiling.fit 'crop' cuts one view out of the picture; tiling.grid is {self.grid}, not 1")

    def plan(self, width: int, height: int) -> TilePlan:
        """The views of a picture of this size."""
        grid = self.grid
        if grid == "auto":
            grid = auto_grid(width, height, size=self.size, max_grid=self.max_grid)
        elif grid == "aspect":
            grid = aspect_grid(width, height, max_grid=self.max_grid)
        made = plan(width, height, size=self.size, grid=grid, global_view=self.global_view, skip=self.skip)
        return made if self.fit == "pad" else replace(made, crop=True)


@dataclass(frozen=True)
class Tile:
    """``box`` (x0,y0,x1,y1) in pixels of the canvas; a blank tile holds no content and is never encoded."""

    box: Box
    blank: bool
    is_global: bool


@dataclass(frozen=True)
class TilePlan:
    """Views in reading order: the global one, then the grid row by row.

    ``content`` is where the picture stands in the canvas of side ``canvas``; None when the whole padded square is
    resized onto it. ``crop``: the only view is the middle square of the picture.
    """

    tiles: tuple[Tile, ...]
    size: int
    canvas: int
    content: Box | None
    crop: bool = False

    @property
    def num_real(self) -> int:
        """Tiles that are encoded."""
        return sum(not t.blank for t in self.tiles)


def auto_grid(width: int, height: int, *, size: int, max_grid: int) -> int:
    """The smallest grid whose canvas is no smaller than the picture, at most ``max_grid``."""
    return max(1, min(max_grid, -(-max(width, height) // size)))


def aspect_grid(width: int, height: int, *, max_grid: int) -> int:
    """The ratio of the longer to the shorter side, rounded, between 1 and ``max_grid``."""
    if min(width, height) < 1:
        raise ValueError(f"tiling: a picture of {width} x {height} pixels has no area")
    return max(1, min(max_grid, round(max(width, height) / min(width, height))))


def plan(width: int, height: int, *, size: int, grid: int, global_view: bool = True, skip: bool = True) -> TilePlan:
    """Views of a picture of ``width`` x ``height`` pixels; ValueError for numbers below one."""
    for name, value in (("width", width), ("height", height), ("size", size), ("grid", grid)):
        if value < 1:
            raise ValueError(f"tiling: {name} must be at least 1, got {value}")
    side = grid * size
    whole = (0, 0, side, side)
    if grid == 1:
        return TilePlan((Tile(whole, False, True),), size, side, None)
    content = (0, 0, _scaled(width, width, height, side), _scaled(height, width, height, side)) if skip else None
    tiles = [Tile(whole, False, True)] if global_view else []
    for y in range(0, side, size):
        for x in range(0, side, size):
            # The content starts at the corner, so a tile is free of it exactly when it begins beyond its end.
            blank = content is not None and (x >= content[2] or y >= content[3])
            tiles.append(Tile((x, y, x + size, y + size), blank, False))
    return TilePlan(tuple(tiles), size, side, content)


def _scaled(length: int, width: int, height: int, side: int) -> int:
    """A side of the picture on the canvas, rounded to the nearest pixel, never vanishing."""
    longest = max(width, height)
    return max(1, (2 * length * side + longest) // (2 * longest))


def cut(image: Image.Image, tile_plan: TilePlan) -> torch.Tensor:
    """The real tiles of an RGB picture as (num_real,3,S,S) in [0,1], in the plan's order."""
    size, side = tile_plan.size, tile_plan.canvas
    if tile_plan.crop:
        return to_tensor(center_square(image, size))[None]
    square = pad_to_square(image)
    canvas: Image.Image | None = None
    views = []
    for tile in tile_plan.tiles:
        if tile.blank:
            continue
        if tile.is_global:
            views.append(to_tensor(resize(square, size, size)))
            continue
        if canvas is None:
            canvas = _canvas(image, square, tile_plan.content, side)
        views.append(to_tensor(canvas.crop(tile.box)))
    return torch.stack(views)


def _canvas(image: Image.Image, square: Image.Image, content: Box | None, side: int) -> Image.Image:
    if content is None:
        return resize(square, side, side)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(resize(image, content[2], content[3]), (content[0], content[1]))
    return canvas
