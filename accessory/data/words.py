"""Rendered words to read: training words and test words have none in common.

Words come from the names and keywords of the emoji concepts. They are drawn with the font that ships inside Pillow, and
with any ``fonts/*.ttf`` or ``*.otf`` found in the cache, in varied size, weight, slant, colour, place and tilt.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accessory.data import emoji
from accessory.data.assets import default_cache

TEST_SHARE = 10  # one word in ten is held out
LENGTHS = (2, 9)
_WORD = re.compile(r"[a-z]+")


def is_test_word(word: str) -> bool:
    """Whether a (lower-case) word is held out; decided by its hash, so it holds for every list."""
    return hashlib.sha256(word.encode()).digest()[0] % TEST_SHARE == 0


@functools.lru_cache(maxsize=8)
def word_list(split: Literal["train", "test"], cache: Path | None = None) -> tuple[str, ...]:
    """The words of a split, lower case, 2 to 9 letters, sorted."""
    found: set[str] = set()
    for concept in emoji.concepts(cache):
        for text in (concept.label, *concept.tags):
            found.update(w for w in _WORD.findall(text.lower()) if LENGTHS[0] <= len(w) <= LENGTHS[1])
    return tuple(sorted(w for w in found if is_test_word(w) == (split == "test")))


@functools.lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.lru_cache(maxsize=4)
def font_paths(cache: Path | None = None) -> tuple[str, ...]:
    """Fonts to draw with; the empty name is Pillow's own."""
    folder = (cache or default_cache()) / "fonts"
    return ("", *sorted(str(p) for p in folder.glob("*.[to]tf")))


def draw_word(text: str, size: int, rng: np.random.Generator, cache: Path | None = None) -> Image.Image:
    """One word on a (size, size) RGB picture, wholly inside it. ``rng`` decides how it looks."""
    fonts = font_paths(cache)
    points = int(rng.integers(4, 8)) * 8
    font = _font(fonts[int(rng.integers(len(fonts)))], points)
    weight = int(rng.integers(0, 1 + points // 24))  # a thicker pen would close the eyes of a, e and o
    x1, y1, x2, y2 = font.getbbox(text, stroke_width=weight)
    width, height = int(x2 - x1) + 4, int(y2 - y1) + 4
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((2 - x1, 2 - y1), text, fill=255, font=font, stroke_width=weight, stroke_fill=255)
    slant = float(rng.uniform(0, 0.25)) if rng.random() < 0.3 else 0.0
    if slant:
        mask = mask.transform(
            (width + int(slant * height), height), Image.Transform.AFFINE, (1, slant, -slant * height, 0, 1, 0),
            Image.Resampling.BILINEAR,
        )  # fmt: skip
    mask = mask.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR, expand=True)
    # As wide as the picture allows, down to two thirds of that: letters stay legible after the tower's own resizing.
    ratio = min((size - 4) / mask.width, (size - 4) / mask.height) * float(rng.uniform(0.65, 1.0))
    ratio = min(ratio, 0.55 * size / mask.height)
    mask = mask.resize((max(1, int(mask.width * ratio)), max(1, int(mask.height * ratio))), Image.Resampling.BILINEAR)
    back, ink = _colours(rng)
    picture = (
        emoji.gradient(size, back, back, rng)
        if rng.random() < 0.8
        else emoji.gradient(size, back, _near(back, rng), rng)
    )
    left = int(rng.integers(1, size - mask.width))
    top = int(rng.integers(1, size - mask.height))
    picture.paste(ink, (left, top, left + mask.width, top + mask.height), mask)
    return picture


def _near(colour: emoji.Colour, rng: np.random.Generator) -> emoji.Colour:
    red, green, blue = (int(np.clip(c + rng.integers(-40, 41), 0, 255)) for c in colour)
    return red, green, blue


def _colours(rng: np.random.Generator) -> tuple[emoji.Colour, emoji.Colour]:
    """Background and ink, at least 100 levels of grey apart."""
    if rng.random() < 0.3:
        return (255, 255, 255), (0, 0, 0)
    while True:
        two = rng.integers(0, 256, (2, 3))
        if abs(float((two[0] - two[1]) @ emoji.LUMA)) >= 100:
            (r, g, b), (x, y, z) = two.tolist()
            return (r, g, b), (x, y, z)


def cased(word: str, rng: np.random.Generator) -> str:
    """The word as written: mostly lower case, sometimes capitalised or in capitals."""
    kind = rng.random()
    return word if kind < 0.6 else word.upper() if kind < 0.8 else word.capitalize()
