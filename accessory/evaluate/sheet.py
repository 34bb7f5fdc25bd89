"""A contact sheet: what was asked, what was drawn, and the real drawing, row by row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, TEXT = 96, 8, 330  # pixels: of a picture's side, between things, for words
COLUMNS, LINES, LEADING = 50, 6, 14  # letters of a line of words, how many lines, and pixels from one to the next
PAPER, INK, SOFT, MARK = (255, 255, 255), (24, 26, 32), (110, 114, 124), (190, 60, 30)
HEAD = 24


@dataclass(frozen=True)
class Row:
    """``marked`` rows, those of held-out pairs, get a bar and the word; ``note`` stands under the words in grey."""

    words: str
    note: str
    drawn: tuple[Image.Image, ...]
    real: Image.Image
    marked: bool = False


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Prompts, pictures and real drawings, one row each.

    Raises:
        ValueError: when there is no row, or rows hold different numbers of pictures.
    """
    counts = {len(row.drawn) for row in rows}
    if len(counts) != 1:
        raise ValueError(f"a sheet needs rows of equally many pictures, got {sorted(counts) or 'none'}")
    across = counts.pop()
    width = TEXT + (across + 2) * (CELL + GAP)
    page = Image.new("RGB", (width, HEAD + len(rows) * (CELL + GAP) + GAP), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    real_at = width - CELL - GAP
    for left, word in ((GAP, "asked for"), (TEXT, "drawn"), (real_at, "real")):
        pen.text((left, GAP), word, SOFT, font)
    for number, row in enumerate(rows):
        top = HEAD + number * (CELL + GAP)
        lines = textwrap.wrap(row.words, COLUMNS)
        shown = lines if len(lines) < LINES else [*lines[: LINES - 2], lines[LINES - 2][: COLUMNS - 3] + "..."]
        for k, line in enumerate(shown):
            pen.text((GAP + 6, top + k * LEADING), line, INK, font)
        pen.text((GAP + 6, top + len(shown) * LEADING + 2), row.note, MARK if row.marked else SOFT, font)
        if row.marked:
            pen.rectangle((0, top, 4, top + CELL), fill=MARK)
        for k, picture in enumerate(row.drawn):
            page.paste(_cell(picture), (TEXT + k * (CELL + GAP), top))
        page.paste(_cell(row.real), (real_at, top))
    return page


def _cell(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
