"""Showing what a row teaches, and what looks wrong in a dialogue that can nevertheless be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from accessory.data.encode import Encoder
from accessory.data.image import open_picture
from accessory.data.template import render
from accessory.data.tiling import TilePlan
from accessory.data.tokenizer import Tokenizer
from accessory.schema import IDS, Encoded, Picture, Sample, Turn
from accessory.tokens import IGNORE, IMAGE, IMAGE_END, IMAGE_START, NAMES, SKIP

OPEN, CLOSE = "⟦", "⟧"
"""Stand around what is learned."""
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_SEEN = frozenset((IMAGE, SKIP, IMAGE_START, IMAGE_END))
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Shown:
    """A picture as a row has it: its ``name`` for people, and the positions that it takes."""

    name: str
    positions: int


def pictures(sample: Sample, encoder: Encoder) -> list[Shown]:
    """The pictures that the model sees in a sample, in the order of the row that ``encoder`` writes."""
    out: list[Shown] = []
    for segment in render(encoder.template, sample.turns):
        if not isinstance(segment.content, Picture):
            continue
        if segment.learn and encoder.dream is not None and not encoder.dream.seen:
            continue  # it is drawn, and never read
        plan = encoder.tiling.plan(*open_picture(segment.content.source).size)
        positions = len(encoder.picture_ids(plan))
        out.append(Shown(f"image {len(out) + 1}: {_views(plan)}, {positions} positions", positions))
    return out


def _views(plan: TilePlan) -> str:
    """``2x2 tiles and the whole, 1 blank``."""
    side, blank = plan.canvas // plan.size, len(plan.tiles) - plan.num_real
    if side == 1:
        return "1 tile"
    whole = " and the whole" if any(t.is_global for t in plan.tiles) else ""
    return f"{side}x{side} tiles{whole}" + (f", {blank} blank" if blank else "")


def render_row(encoded: Encoded, tokenizer: Tokenizer, shown: Sequence[Shown] = (), *, colour: bool = False) -> str:
    """The row as text, control tokens by name, what is learned in brackets or, with ``colour``, green.

    Pictures are written as ``shown`` names them (see :func:`pictures`), else as runs like ``<image>×16``.
    """
    opened, closed = (_GREEN, _PLAIN) if colour else (OPEN, CLOSE)
    pairs = zip(encoded.ids.tolist(), (encoded.labels != IGNORE).tolist())
    left = iter(shown)
    out = []
    for learned, group in groupby(pairs, key=lambda p: p[1]):
        text = _text([i for i, _ in group], tokenizer, left)
        out.append(f"{opened}{text}{closed}" if learned else text)
    return "".join(out)


def _text(ids: list[int], tokenizer: Tokenizer, shown: Iterator[Shown]) -> str:
    out: list[str] = []
    for seen, group in groupby(ids, key=_SEEN.__contains__):
        run = list(group)
        while seen and run and (picture := next(shown, None)) is not None and 0 < picture.positions <= len(run):
            out.append(f"[{picture.name}]")
            run = run[picture.positions :]
        # Ordinary tokens are decoded together, because a character may be spread over several of them.
        for kind, same in groupby(run, key=lambda i: i if tokenizer.is_control(i) else None):
            some = list(same)
            if kind is None:
                # What the data says is shown to a terminal, which must not take it for orders.
                text = tokenizer.decode(some, glued=True)
                out.append(_CONTROLS.sub(lambda m: repr(m.group())[1:-1], text))
            else:
                name = NAMES[kind] if kind < 0 else tokenizer.name(kind) or f"<{kind}>"
                out.append(name if len(some) == 1 else f"{name}×{len(some)}")
    return "".join(out)


@dataclass(frozen=True)
class Counts:
    """Positions of a row by what stands there. ``learned``: those that the loss is taken of, to which the first
    position never belongs, because nothing precedes it."""

    positions: int
    learned: int
    images: int  # image placeholders
    skips: int
    tiles: int
    placeholders: int = 0  # of any kind
    targets: int = 0  # pictures to be drawn

    @property
    def text(self) -> int:
        """Positions of text."""
        return self.positions - self.placeholders

    def agrees(self, tokens_per_tile: int) -> bool:
        """Whether the placeholders fit the tiles; a model refuses the row when they do not."""
        return self.images == self.tiles * tokens_per_tile


def count(encoded: Encoded) -> Counts:
    """What a row holds."""
    return Counts(
        positions=len(encoded.ids),
        learned=int((encoded.labels[1:] != IGNORE).sum()),
        images=int((encoded.ids == IMAGE).sum()),
        skips=int((encoded.ids == SKIP).sum()),
        tiles=len(encoded.tiles),
        placeholders=int((encoded.ids < 0).sum()),
        targets=len(encoded.targets),
    )


def oddities(turns: Sequence[Turn]) -> list[str]:
    """What looks wrong in a dialogue that can be read, in words that do not depend on the row."""
    said = [t for t in turns if t.role != "system"]
    roles = [t.role for t in said]
    out = []
    if "user" in roles:  # else it is a document
        if roles[0] == "assistant":
            out.append("role order: the assistant speaks first")
        for a, b in pairwise(roles):
            if a == b and f"role order: two turns of the {a} in a row" not in out:
                out.append(f"role order: two turns of the {a} in a row")
        if roles[-1] == "user":
            out.append("role order: the user speaks last, and nobody answers")
    if any(t.role == "assistant" and not t.text.strip() and not t.pictures for t in said):
        out.append("an empty answer: the model would learn to say nothing")
    if any(t.role == "user" and not t.text.strip() and not t.pictures for t in said):
        out.append("an empty question")
    return out


class Prints:
    """Fingerprints of rows and of their pictures, by content: two rows are one whatever files and blanks they have."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def picture(self, picture: Picture) -> str:
        """Digest of a picture file's bytes, or of the pixels of one that lies in memory."""
        source = picture.source
        if not isinstance(source, str):
            return hashlib.sha256(str(source.size).encode() + open_picture(source).tobytes()).hexdigest()
        if source not in self._files:
            with Path(source).open("rb") as file:
                self._files[source] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._files[source]

    def row(self, sample: Sample) -> str:
        """Digest of all that is said and shown."""
        facts: list[object] = [sample.meta.get(IDS)]
        for turn in sample.turns:
            parts = [" ".join(p.split()) if isinstance(p, str) else self.picture(p) for p in turn.parts]
            facts.append((turn.role, parts))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def pictures(self, sample: Sample) -> set[str]:
        """Digests of the pictures of a sample."""
        return {self.picture(p) for turn in sample.turns for p in turn.pictures}


def histogram(values: Sequence[int], bins: int = 8) -> Mapping[str, int]:
    """How many of ``values`` lie in each of at most ``bins`` ranges of one width, as ``1-64: 3``."""
    if not values:
        return {}
    low = min(values)
    width = -(-(max(values) - low + 1) // bins)
    found = [0] * ((max(values) - low) // width + 1)
    for v in values:
        found[(v - low) // width] += 1
    starts = [low + i * width for i in range(len(found))]
    return {f"{a}-{a + width - 1}" if width > 1 else f"{a}": n for a, n in zip(starts, found, strict=True)}
