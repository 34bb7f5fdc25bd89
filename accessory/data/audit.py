"""Showing what a row teaches: the text as the model reads it, learned stretches marked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from accessory.data.tokenizer import Tokenizer
from accessory.schema import Encoded
from accessory.tokens import IGNORE, IMAGE, NAMES, SKIP

OPEN, CLOSE = "⟦", "⟧"
"""Stand around what is learned."""


def render_row(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The row as text: runs of placeholders as ``<image>×16``, control tokens by name, learned text in brackets."""
    pairs = zip(encoded.ids.tolist(), (encoded.labels != IGNORE).tolist())
    out = []
    for learned, group in groupby(pairs, key=lambda p: p[1]):
        text = _text([i for i, _ in group], tokenizer)
        out.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return "".join(out)


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    out: list[str] = []
    # Ordinary tokens are decoded together, because a character may be spread over several of them.
    for kind, group in groupby(ids, key=lambda i: i if tokenizer.is_control(i) else None):
        run = list(group)
        if kind is None:
            out.append(tokenizer.decode(run, glued=True))
        else:
            name = NAMES[kind] if kind < 0 else tokenizer.name(kind) or f"<{kind}>"
            out.append(name if len(run) == 1 else f"{name}×{len(run)}")
    return "".join(out)


@dataclass(frozen=True)
class Counts:
    """Positions of a row by what stands there."""

    positions: int
    learned: int
    images: int  # image placeholders
    skips: int
    tiles: int

    def agrees(self, tokens_per_tile: int) -> bool:
        """Whether the placeholders fit the tiles; a model refuses the row when they do not."""
        return self.images == self.tiles * tokens_per_tile


def count(encoded: Encoded) -> Counts:
    """What a row holds."""
    return Counts(
        positions=len(encoded.ids),
        learned=int((encoded.labels != IGNORE).sum()),
        images=int((encoded.ids == IMAGE).sum()),
        skips=int((encoded.ids == SKIP).sum()),
        tiles=len(encoded.tiles),
    )
