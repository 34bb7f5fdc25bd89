"""Rows to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accessory.schema import Batch, Encoded, Targets
from accessory.tokens import IGNORE


def collate(rows: Sequence[Encoded], pad_id: int, packed: bool = False) -> Batch:
    """Right-padded rows; tiles of all rows in reading order as (N,3,S,S), N = 0 for text alone. ``packed``: see
    :class:`Batch`."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = row.ids, row.labels, True
    tiles, sources = torch.cat([r.tiles for r in rows]), tuple(r.source for r in rows)
    counts = torch.tensor([len(r.tiles) for r in rows])
    return Batch(ids, labels, mask, tiles, sources, _targets(rows), counts, packed)


def _targets(rows: Sequence[Encoded]) -> Targets | None:
    """The pictures of all rows in reading order; None where no row asks for one."""
    found = [((row.draw, i), target) for row in rows for i, target in enumerate(row.targets)]
    if not found:
        return None
    pixels = [t.pixels for _, t in found]
    return Targets(
        torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels,
        prompts=tuple(t.prompt for _, t in found),
        keys=tuple(t.key for _, t in found),
        places=tuple(place for place, _ in found),
    )
