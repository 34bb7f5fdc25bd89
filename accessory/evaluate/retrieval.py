"""Naming by nearest neighbour: what an encoder's features give without any language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from accessory.data import emoji
from accessory.data.image import resize, to_tensor
from accessory.vision.tower import Tower


@torch.inference_mode()
def described(tower: Tower, pictures: Sequence[Image.Image], batch_size: int = 128) -> Tensor:
    """Mean tokens (n, C) of pictures, which are resized to the tower's size; on the CPU whatever the tower is on."""
    out = []
    for start in range(0, len(pictures), batch_size):
        views = [resize(p.convert("RGB"), tower.size, tower.size) for p in pictures[start : start + batch_size]]
        tiles = torch.stack([to_tensor(v) for v in views]).to(tower.mean.device)
        out.append(tower.tokens(tiles)[0].float().mean(1).cpu())
    return torch.cat(out)


def pooled(tower: Tower, style: str, cache: Path | None = None, batch_size: int = 128) -> Tensor:
    """As :func:`described` (num_concepts, C), of the plain drawings of one style."""
    drawn = emoji.pictures(style, cache=cache)
    out = []
    for start in range(0, len(drawn), batch_size):
        views = [Image.fromarray(emoji.plain(np.asarray(p), tower.size)) for p in drawn[start : start + batch_size]]
        out.append(described(tower, views, batch_size))
    return torch.cat(out)


def nearest_accuracy(references: list[Tensor], queries: Tensor, *, centred: bool = False) -> float:
    """Share of queries (n, C) whose most similar reference row, over all sets (n, C), has the same row number.

    Cosine similarity. ``centred`` first subtracts the mean of its own set from every row, because a constant offset
    between drawing styles says nothing about what is drawn. For the queries that is the mean of the whole test set:
    more than a model that is shown one picture can know.
    """
    if centred:
        references, queries = [r - r.mean(0) for r in references], queries - queries.mean(0)
    bank = torch.cat([F.normalize(r, dim=-1) for r in references])
    found = (F.normalize(queries, dim=-1) @ bank.T).argmax(-1) % len(queries)
    return float((found == torch.arange(len(queries))).float().mean())


def retrieval_accuracy(tower: Tower, cache: Path | None = None) -> tuple[float, float]:
    """Top-1 of the unseen style against both training styles as references: as it is, and with centred sets."""
    references = [pooled(tower, s, cache) for s in emoji.TRAIN_STYLES]
    queries = pooled(tower, emoji.TEST_STYLE, cache)
    return nearest_accuracy(references, queries), nearest_accuracy(references, queries, centred=True)
