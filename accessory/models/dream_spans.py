"""Where pictures are dreamt in a sequence: the layout of a span, who sees it, what precedes it, what is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accessory.nn.ragged import Ragged
from accessory.tokens import DREAM, DREAM_END, DREAM_START, NAMES

Drop = Literal["keep", "text", "image", "all"]


@dataclass(frozen=True)
class NullPolicy:
    """Probabilities that a picture is trained without a part of its context: its text, its pictures, or all of it.

    What is dropped is replaced by a context of the same layout (see ``Dream.dropped``), the same at inference.
    """

    text: float = 0.0
    image: float = 0.0
    all: float = 0.1

    def __post_init__(self) -> None:
        parts = (self.text, self.image, self.all)
        if min(parts) < 0 or sum(parts) > 1:
            raise ValueError(f"drop: text, image and all are probabilities of sum at most 1, got {parts}")

    def draw(self, n: int, generator: torch.Generator | None = None) -> list[Drop]:
        """What is dropped of each of ``n`` pictures."""
        kinds: tuple[Drop, ...] = ("text", "image", "all")
        limits = torch.tensor([self.text, self.image, self.all], dtype=torch.float64).cumsum(0)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return [kinds[i] if i < 3 else "keep" for i in (u[:, None] >= limits).sum(1).tolist()]


@dataclass(frozen=True)
class DreamSpan:
    """``dream_start``, ``num_queries`` queries, ``dream_end``: the positions of one dreamt picture."""

    num_queries: int

    def ids(self) -> list[int]:
        """The placeholders of a span, num_queries + 2 of them."""
        return [DREAM_START, *[DREAM] * self.num_queries, DREAM_END]

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (N) of every ``dream_start`` in ids (B, T), in reading order.

        Raises:
            ValueError: when a span is not whole, or a query or end stands outside of one: its row is named.
        """
        rows, columns = (ids == DREAM_START).nonzero(as_tuple=True)
        layout = torch.tensor(self.ids(), device=ids.device)
        where = columns[:, None] + torch.arange(len(layout), device=ids.device)
        whole = where[:, -1] < ids.shape[1]
        if len(rows):
            found = ids[rows[:, None], where.clamp_max(ids.shape[1] - 1)]
            whole = whole & (found == layout).all(1)
        stray = ((ids == DREAM) | (ids == DREAM_END)).sum() != len(rows) * (self.num_queries + 1)
        if not bool(whole.all()) or bool(stray):
            row = int(rows[~whole][0]) if not bool(whole.all()) else self._stray(ids)
            raise ValueError(
                f"row {row} holds a torn dream span: it is {NAMES[DREAM_START]}, {self.num_queries} times "
                f"{NAMES[DREAM]}, {NAMES[DREAM_END]}, uncut"
            )
        return rows, columns

    def _stray(self, ids: Tensor) -> int:
        counts = ((ids == DREAM) | (ids == DREAM_END)).sum(1)
        wanted = (ids == DREAM_START).sum(1) * (self.num_queries + 1)
        return int((counts != wanted).nonzero()[0])


def is_hidden(ids: Tensor) -> Tensor:
    """Where queries and ends stand: what ``hide_queries_from_future`` hides. The trigger stays visible, for it was
    said: a model that did not see that it has dreamt would say it again."""
    return (ids == DREAM) | (ids == DREAM_END)


def is_prompt(ids: Tensor) -> Tensor:
    """Positions that a picture may be dreamt from: text and pictures, not the spans of other dreams."""
    return ~is_hidden(ids) & (ids != DREAM_START)


def hide_spans(ids: Tensor, mask: Tensor | None, past: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, T, past + T) and positions (B, T) under which later positions neither see a span nor count it.

    ``ids`` (B, T) are the new positions; of the cached ones none may be hidden (a reader crops its spans).
    ``mask`` (B, past + T): False on padding.
    """
    b, t = ids.shape
    real = torch.ones(b, past + t, dtype=torch.bool, device=ids.device) if mask is None else mask
    hidden = torch.cat((ids.new_zeros(b, past, dtype=torch.bool), is_hidden(ids)), 1) & real
    start = torch.cat((ids.new_zeros(b, past, dtype=torch.bool), ids == DREAM_START), 1)
    span = start.long().cumsum(1)
    inside = hidden.long().cumsum(1)
    # Hidden positions so far at the newest trigger; what exceeds them is the offset within this span.
    before = torch.where(start, inside, 0).cummax(1).values
    shown = (real & ~hidden).long().cumsum(1) - 1
    positions = (shown + torch.where(hidden, inside - before, 0)).clamp_min(0)
    index = torch.arange(past + t, device=ids.device)
    query = index[past:, None]
    allowed = (index <= query) & real[:, None]
    same = (span[:, past:, None] == span[:, None]) & hidden[:, past:, None]
    allowed &= ~hidden[:, None] | same
    if window is not None:
        allowed &= positions[:, None] > positions[:, past:, None] - window
    # A query on padding would see nothing and turn into NaN; it may see itself, and nobody reads it.
    return (allowed | (index == query))[:, None], positions[:, past:]


def hide_packed(ids: Tensor, rows: Ragged, window: int | None) -> tuple[Ragged, Tensor]:
    """:func:`hide_spans` for sequences ids (S, T) that share a row: their layout and positions (1, N)."""
    positions = torch.zeros_like(ids)

    def mask(own: Tensor, t: int) -> Tensor:
        allowed, positions[own, :t] = hide_spans(ids[own, :t], rows.mask[own, :t], 0, window)
        return allowed

    hidden = rows.masked(mask)
    return hidden, rows.flat(positions)


def prompts(ids: Tensor, mask: Tensor | None, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (N, L) of what precedes every span at ``rows``, ``columns`` (N) of ids (B, T), packed to the left, and
    which of them are real (N, L). L is the longest; other spans and padding are left out."""
    keep = is_prompt(ids) if mask is None else is_prompt(ids) & mask
    keep = keep[rows] & (torch.arange(ids.shape[1], device=ids.device) < columns[:, None])
    longest = int(keep.sum(1).max()) if len(rows) else 0
    index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return index, keep.gather(1, index)


def without(ids: Tensor, kind: Drop, null_ids: Sequence[int]) -> Tensor:
    """A context (T) with its text dropped (the null's own text stands for it), its pictures dropped, or both."""
    null = torch.tensor(list(null_ids), dtype=ids.dtype, device=ids.device)
    if kind == "all":
        return null
    if kind == "text":
        return torch.cat((null, ids[ids < 0]))
    return ids[ids >= 0] if kind == "image" else ids
