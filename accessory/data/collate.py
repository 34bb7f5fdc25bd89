"""Rows to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accessory.schema import Batch, Encoded
from accessory.tokens import IGNORE


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Right-padded rows; tiles of all rows in reading order as (N,3,S,S), N = 0 for text alone."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = row.ids, row.labels, True
    return Batch(ids, labels, mask, torch.cat([r.tiles for r in rows]), tuple(r.source for r in rows))
