"""Sequences of unequal lengths as one row without padding; none of them sees another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_SLACK = 1.25, 8
"""A sequence is computed beside one that is at most so many times as long, and so many positions longer."""


@dataclass(frozen=True)
class Group:
    """G sequences of about equal lengths, up to t: which ones (G), where their positions lie in the row (G, t; behind
    the end of a sequence anything), and who sees whom in them (G or 1, 1, t, t; None: causal)."""

    rows: Tensor
    index: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Ragged:
    """S sequences, N positions in all: (S, T) right-padded is laid out as (1, N).

    ``mask`` (S, T) is True on real positions. Attention never crosses a border: it runs over groups of sequences of
    about equal lengths, so its cost is that of short rows; where flash-attn is installed it takes them all at once.
    """

    mask: Tensor
    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    order: Tensor | None  # (M) positions in the order of the groups; None where that is how they lie
    back: Tensor | None  # (N) where they are found in that order

    @staticmethod
    def of(mask: Tensor) -> Ragged:
        """The layout of right-padded rows with a real position each.

        Raises:
            ValueError: for an empty row, or padding on another side.
        """
        lengths = [int(n) for n in mask.sum(1).tolist()]
        width = torch.arange(mask.shape[1], device=mask.device)
        if min(lengths, default=0) < 1 or not torch.equal(width < mask.sum(1, keepdim=True), mask):
            raise ValueError(
                f"rows of lengths {lengths} in {mask.shape[1]} columns: each is right-padded and not empty"
            )
        starts, device = _starts(lengths), mask.device
        groups: list[Group] = []
        order: list[int] = []
        back = [0] * sum(lengths)
        for rows, longest in _alike(lengths):
            index = [[starts[r] + min(i, lengths[r] - 1) for i in range(longest)] for r in rows]
            for place, r in enumerate(rows):
                for i in range(lengths[r]):
                    back[starts[r] + i] = len(order) + place * longest + i
            order += [i for row in index for i in row]
            groups.append(Group(torch.tensor(rows, device=device), torch.tensor(index, device=device)))
        if order == list(range(len(back))):
            return Ragged(mask, tuple(lengths), tuple(groups), None, None)
        found = (torch.tensor(order, device=device), torch.tensor(back, device=device))
        return Ragged(mask, tuple(lengths), tuple(groups), *found)

    def flat(self, x: Tensor) -> Tensor:
        """(S, T, ...) without its padding: (1, N, ...)."""
        return x[self.mask][None]

    @functools.cached_property
    def positions(self) -> Tensor:
        """(1, N): every sequence counts from 0."""
        return self.flat(torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask))

    @functools.cached_property
    def starts(self) -> Tensor:
        """(S): where each sequence begins."""
        return torch.tensor(_starts(self.lengths), device=self.mask.device)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where positions (``rows``, ``columns``) of the padded layout lie among N; padding is anywhere."""
        return (self.starts[rows] + columns).clamp_max(sum(self.lengths) - 1)

    def masked(self, mask: Callable[[Tensor, int], Tensor | None]) -> Ragged:
        """With ``mask(rows, t)``, (G or 1, 1, t, t), of the first t positions of sequences ``rows`` (G)."""
        return replace(self, groups=tuple(replace(g, mask=mask(g.rows, g.index.shape[1])) for g in self.groups))

    @property
    def masks(self) -> bool:
        """Whether attention is other than causal within a sequence."""
        return any(g.mask is not None for g in self.groups)

    @torch.compiler.disable
    def each(self, attention: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """(1, H, N, A) of ``attention(group, *parts)``, which gets of every ``given`` (1, H, N, A) the part of a group
        as (G, H, t, A) and returns the like."""
        sizes = [g.index.numel() for g in self.groups]
        laid = [t[0].transpose(0, 1) for t in given]  # (N, H, A)
        if self.order is not None:
            laid = [t.index_select(0, self.order) for t in laid]
        found = []
        for group, *parts in zip(self.groups, *(t.split(sizes) for t in laid), strict=True):
            shaped = [p.unflatten(0, group.index.shape).transpose(1, 2) for p in parts]
            found.append(attention(group, *shaped).transpose(1, 2).flatten(0, 1))
        out = torch.cat(found)
        return (out if self.back is None else out.index_select(0, self.back)).transpose(0, 1)[None]

    @functools.cached_property
    def borders(self) -> Tensor:
        """(S + 1) in int32: where each sequence begins, and the end, as flash-attn wants them."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return torch.cat((ends.new_zeros(1), ends)).to(self.mask.device, torch.int32)

    @torch.compiler.disable
    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Causal attention of (1, H, N, A) over (1, K, N, A) by flash-attn; None where it cannot serve."""
        function = flash_attention() if q.device.type == "cuda" else None
        if function is None or self.masks or q.dtype not in (torch.float16, torch.bfloat16):
            return None
        longest = max(self.lengths)
        laid = [t[0].transpose(0, 1) for t in (q, k, v)]
        out: Tensor = function(*laid, self.borders, self.borders, longest, longest, causal=True)
        return out.transpose(0, 1)[None]


@functools.cache
def flash_attention() -> Any:
    """flash-attn's function for sequences of unequal lengths; None where it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for n in lengths[:-1]:
        starts.append(starts[-1] + n)
    return starts


def _alike(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows in groups of about equal lengths, and the longest of each; the shortest group first."""
    groups: list[tuple[list[int], int]] = []
    times, more = _SLACK
    for r in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if not groups or groups[-1][1] > max(times * lengths[r], lengths[r] + more):
            groups.append(([], lengths[r]))
        groups[-1][0].append(r)
    return [(sorted(rows), longest) for rows, longest in reversed(groups)]
