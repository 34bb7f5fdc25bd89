"""Sizes of pictures that cost about the same, and how a picture is brought to one of them.

The rule of Lumina-T2X's any-resolution training. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]
BEST = 4
"""Among how many of the best sizes one is chosen: a mild change of aspect as augmentation."""


def bucket_sizes(side: int, *, patch: int = 16, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """All sizes of whole patches with at most ``(side / patch)^2`` of them, from the widest to the tallest.

    Args:
        side: of the square that sets the budget, in pixels.
        patch: pixels of a patch's side (of the latent's patch times the encoder's reduction).
        max_aspect: longer side to shorter.

    Raises:
        ValueError: when ``side`` is not a whole number of patches.
    """
    if side < patch or side % patch:
        raise ValueError(f"a side of {side} pixels is not a whole number of patches of {patch}")
    budget = (side // patch) ** 2
    sizes: list[Size] = []
    width, height = budget, 1
    while width > 0:
        if max(width, height) / min(width, height) <= max_aspect:
            sizes.append((width * patch, height * patch))
        if (height + 1) * width <= budget:
            height += 1
        else:
            width -= 1
    return tuple(sizes)


def best_sizes(width: int, height: int, sizes: Sequence[Size], count: int = BEST) -> list[tuple[float, Size]]:
    """The sizes that keep the most of a picture, best first: (share of its area that is kept, size)."""
    scored = []
    for size in sizes:
        across, down = size[0] / width, size[1] / height
        scored.append((min(across, down) / max(across, down), size))
    return sorted(scored, reverse=True)[:count]


def choose_size(
    width: int, height: int, sizes: Sequence[Size], rng: np.random.Generator | None = None, count: int = BEST
) -> Size:
    """One of the ``count`` best sizes, evenly; the best where no generator is given."""
    best = best_sizes(width, height, sizes, count if rng is not None else 1)
    return best[int(rng.integers(len(best))) if rng is not None else 0][1]


@dataclass(frozen=True)
class Nearest:
    """From the (width, height) of a picture to the one of ``sizes`` that keeps the most of it; a value, so that loader
    processes can be handed it."""

    sizes: tuple[Size, ...]

    def __call__(self, width: int, height: int) -> Size:
        return choose_size(width, height, self.sizes)


@dataclass(frozen=True)
class CropPlan:
    """How a picture is brought to a size: halved (box filter) to the sizes in ``halved``, resized (bicubic), cut.

    Attributes:
        room: by how many pixels the resized picture is wider and taller than the target.
    """

    halved: tuple[Size, ...]
    resized: Size
    target: Size

    @property
    def room(self) -> Size:
        return self.resized[0] - self.target[0], self.resized[1] - self.target[1]

    def box(self, offset: Callable[[int], int]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the cut; ``offset(n)`` gives a number from 0 to n."""
        left, top = offset(self.room[0]), offset(self.room[1])
        return left, top, left + self.target[0], top + self.target[1]


def plan_crop(width: int, height: int, target: Size) -> CropPlan:
    """The steps to ``target``: halves while both sides are at least twice the target's, then the least that fits."""
    halved = []
    while width >= 2 * target[0] and height >= 2 * target[1]:
        width, height = width // 2, height // 2
        halved.append((width, height))
    scale = max(target[0] / width, target[1] / height)
    return CropPlan(tuple(halved), (round(width * scale), round(height * scale)), target)


def crop(image: Image.Image, target: Size, rng: np.random.Generator | None = None) -> Image.Image:
    """The picture at ``target``, cut at a random place; in the middle where no generator is given."""
    plan = plan_crop(*image.size, target)
    for size in plan.halved:
        image = image.resize(size, Image.Resampling.BOX)
    image = image.resize(plan.resized, Image.Resampling.BICUBIC)
    if rng is None:
        return image.crop(plan.box(lambda n: n // 2))
    return image.crop(plan.box(lambda n: int(rng.integers(n + 1))))
