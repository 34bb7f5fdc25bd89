"""The smallest thing that can be trained: an embedding, dropout, a picture path that some batches do not use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.data.rows import RowRejected
from accessory.schema import Batch, Encoded, Sample
from accessory.tokens import IGNORE

VOCAB, LENGTH, PIXELS = 11, 6, 2


class ToyModel(nn.Module):
    """ids (B,T), tiles (N,3,2,2) -> logits (B,T,V). The mean of the tiles is added everywhere."""

    def __init__(self, width: int = 8, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, dtype=dtype)
        self.projector = nn.Linear(3, width, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.output = nn.Linear(width, VOCAB, dtype=dtype)
        self.frozen = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
        self.dropout = dropout

    def forward(self, ids: Tensor, tiles: Tensor) -> Tensor:
        x = self.embed(ids)
        if len(tiles):
            x = x + self.projector(tiles.to(x.dtype).mean((2, 3))).sum(0)
        return self.output(F.dropout(self.norm(self.frozen(x) + x), self.dropout, self.training))


def toy_model(seed: int = 0, **options: Any) -> ToyModel:
    torch.manual_seed(seed)
    return ToyModel(**options)


def toy_batch(rows: range | list[int], pictures: bool = True) -> Batch:
    """Rows by number: each has its own tokens and its own count of learned ones."""
    ids, labels = [], []
    for row in rows:
        g = torch.Generator().manual_seed(row)
        one = torch.randint(0, VOCAB, (LENGTH,), generator=g)
        label = one.roll(-1).clone()
        label[: row % (LENGTH - 1)] = IGNORE  # between 2 and 6 learned tokens: averages of averages would differ
        ids.append(one)
        labels.append(label)
    g = torch.Generator().manual_seed(rows[0])
    tiles = torch.rand(2 if pictures else 0, 3, PIXELS, PIXELS, generator=g)
    mask = torch.ones(len(ids), LENGTH, dtype=torch.bool)
    return Batch(torch.stack(ids), torch.stack(labels), mask, tiles, tuple(f"toy.json:{row}" for row in rows))


class ToySource:
    """Consecutive rows for ever (or ``epoch`` batches, then the end); rank r of n takes its part of each step."""

    def __init__(
        self, batch_size: int = 2, rank: int = 0, world: int = 1, epoch: int | None = None, pictures: bool = True
    ) -> None:
        self.batch_size, self.rank, self.world, self.epoch, self.pictures = batch_size, rank, world, epoch, pictures
        self.given = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = (self.given * self.world + self.rank) * self.batch_size
            self.given += 1
            yield toy_batch(range(start, start + self.batch_size), self.pictures)
            if self.epoch is not None and self.given % self.epoch == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.given = state["given"]


class ToyRows:
    """Endless rows for a mixture; every ``bad``-th cannot be read."""

    name, weight, unbounded = "toy", 1.0, True

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Sample:
        if self.bad is not None and index % self.bad == 3:
            raise RowRejected("broken", self.name, index)
        return Sample((), self.name, index)


class ToyEncoder:
    """Tokens, and in every second row a picture, by the row's number."""

    tile_size, pad_id = PIXELS, 0

    def encode(self, sample: Sample) -> Encoded:
        g = torch.Generator().manual_seed(sample.index)
        ids = torch.randint(0, VOCAB, (LENGTH - sample.index % 3,), generator=g)
        labels = ids.roll(-1)
        labels[: sample.index % 3] = IGNORE
        tiles = torch.rand(sample.index % 2, 3, PIXELS, PIXELS, generator=g)
        return Encoded(ids, labels, tiles, sample.source, sample.index)


def toy_objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    logits = model(batch.ids, batch.tiles).float().flatten(0, 1)
    labels = batch.labels.flatten()
    keep = labels != IGNORE
    right = (logits.argmax(-1) == labels)[keep].sum()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE), keep.sum(), {"accuracy": right}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
