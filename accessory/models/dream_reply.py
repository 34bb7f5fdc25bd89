"""What a model says before it draws: its own words are part of what a picture is dreamt from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.models.dream import Dream


@dataclass(frozen=True)
class Reply:
    """The likeliest tokens ``ids`` up to where the model asks for a picture (``draws``), ends, or is cut off."""

    ids: tuple[int, ...]
    draws: bool


def padded(rows: Sequence[Tensor], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (T_i) each as (B, T), filled with ``value`` on the right, and which are real (B, T)."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), value)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids.to(device), mask.to(device)


@torch.no_grad()
def replies(
    dream: Dream, rows: Sequence[Tensor], tiles: Tensor | None, limit: int, stops: Collection[int], pad: int
) -> list[Reply]:
    """Greedy answers of at most ``limit`` tokens to B contexts (T_i) with all their tiles (N, 3, S, S).

    ``stops``: ids that end an answer; they and the trigger are no part of it.
    """
    ids, mask = padded(rows, pad, dream.queries.device)
    cache = dream.net.backbone.cache(len(rows), ids.shape[1] + limit)
    states = dream.read(ids, tiles, mask=mask, cache=cache)
    h = states.final[torch.arange(len(rows), device=ids.device), mask.sum(1) - 1]
    said: list[list[int]] = [[] for _ in rows]
    draws, open_rows = [False] * len(rows), set(range(len(rows)))
    for step in range(limit):
        chosen = dream.logits(h).argmax(-1).tolist()
        for i in tuple(open_rows):
            if chosen[i] == dream.trigger_id or chosen[i] in stops:
                draws[i] = chosen[i] == dream.trigger_id
                open_rows.remove(i)
            else:
                said[i].append(chosen[i])
        if not open_rows or step + 1 == limit:
            break
        fed = torch.tensor([[chosen[i] if i in open_rows else pad] for i in range(len(rows))], device=ids.device)
        real = torch.tensor([[i in open_rows] for i in range(len(rows))], device=ids.device)
        mask = torch.cat((mask, real), 1)
        h = dream.read(fed, mask=mask, cache=cache, context=states.context).final[:, 0]
    return [Reply(tuple(ids), drawn) for ids, drawn in zip(said, draws, strict=True)]
