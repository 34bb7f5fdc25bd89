"""A small world to draw: sixty concepts in three styles, an encoder that sees colours, and generators made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from accessory.data import emoji
from accessory.diffusion.latents import PixelCodec
from accessory.diffusion.sampler import SamplerSettings
from accessory.evaluate import asking
from accessory.evaluate.asking import Query
from accessory.evaluate.drawn import Scorer
from accessory.evaluate.gallery import Gallery
from accessory.models.generator_net import to_image
from accessory.schema import Prompt

COUNT, SIDE = 60, 16
RIDDLES = (("what is seven", ("thing 7",)), ("what is even", ("thing 2", "thing 4")), ("what is odd", ("thing 9",)))


def world(monkeypatch: pytest.MonkeyPatch, count: int = COUNT) -> None:
    """Every concept is sixteen colours; a style adds some of its own. Each third concept has no telling keywords."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (count, 4, 4, 3))
    drawn = {}
    for style in emoji.STYLES:
        own = rng.integers(0, 256, colours.shape)
        rgba = np.full((count, 4, 4, 4), 255, np.uint8)
        rgba[..., :3] = 0.8 * colours + 0.2 * own
        drawn[style] = rgba.repeat(8, 1).repeat(8, 2)
    known = tuple(
        emoji.Concept(
            f"A{k:03X}", f"thing {k}", ("thing",) if k % 3 == 0 else ("many", "more", "things", f"word{k}"), "g", "s"
        )
        for k in range(count)
    )
    monkeypatch.setattr(emoji, "concepts", lambda cache=None: known)
    monkeypatch.setattr(emoji, "pictures", lambda style, size=32, cache=None: drawn[style])
    monkeypatch.setattr(asking, "RIDDLES", RIDDLES)


class Colours:
    """A tower whose features are the sixteen colours, around grey."""

    size = 32
    mean = torch.zeros(3)

    def tokens(self, tiles: Tensor) -> tuple[Tensor]:
        """(B, 1, 48)."""
        return (F.avg_pool2d(tiles, 8).flatten(1)[:, None] - 0.5,)


class Painter:
    """In place of a generator: ``paint`` makes a picture of (prompt, seed)."""

    def __init__(self, paint: Callable[[Prompt, int], Image.Image]) -> None:
        self.paint, self.codec, self.size, self.settings = paint, PixelCodec(2), (SIDE, SIDE), SamplerSettings()
        self.batches: list[int] = []

    def generate(self, prompts: Sequence[Prompt], *, seeds: Sequence[int], settings: Any = None) -> list[Image.Image]:
        """One picture each."""
        self.batches.append(len(prompts))
        return [self.paint(p, s) for p, s in zip(prompts, seeds, strict=True)]

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """As a generator does."""
        return [to_image(x) for x in self.codec.decode(latents)]


def noise(prompt: Prompt, seed: int) -> Image.Image:
    """Colours that say nothing."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(colours.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1))


def real(asked: Sequence[Query], style: str | None = None) -> Callable[[Prompt, int], Image.Image]:
    """The real drawing of what is asked for (in ``style``, whatever was asked)."""
    of = {query.prompt: query for query in asked}

    def paint(prompt: Prompt, seed: int) -> Image.Image:
        query = of[prompt]
        rgba = np.asarray(emoji.pictures(style or query.style)[query.accepted[0]])
        return Image.fromarray(emoji.plain(rgba, SIDE))

    return paint


def scorer(paint: Callable[[Prompt, int], Image.Image], **options: Any) -> Scorer:
    """Judged by :class:`Colours`."""
    return Scorer(Painter(paint), Gallery(Colours()), **options)  # type: ignore[arg-type]
