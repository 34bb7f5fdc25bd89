"""How likely a model holds an answer: log-likelihoods of given words, with pictures, without generating anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.data.collate import collate
from accessory.models.build import Model
from accessory.schema import Encoded, Turn
from accessory.tokens import IGNORE


@dataclass(frozen=True)
class Likelihood:
    """Of the labelled positions of one row: their summed log-probability in nats, how many they are, and whether each
    is the most likely token at its place."""

    total: float
    tokens: int
    greedy: bool

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token, nats."""
        return -self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)


def scored(scores: Tensor, wanted: Tensor) -> Likelihood:
    """Of the tokens ``wanted`` (n), which were to be chosen from ``scores`` (n, V). Id 0 is a token like any other."""
    chosen = scores.log_softmax(-1).gather(1, wanted[:, None]).double().sum()
    return Likelihood(float(chosen), len(wanted), bool((scores.argmax(-1) == wanted).all()))


def answered(model: Model, turns: Sequence[Turn], answer: str) -> Encoded:
    """The row that says ``answer`` to ``turns``: labels are on the answer and on the mark that ends it, so that the
    likelihood is that of exactly this answer and of no longer one.

    Raises:
        ValueError: when the row is longer than the model reads.
    """
    row = model.encoder.row((*turns, Turn("assistant", (answer,))))
    if len(row.ids) > model.encoder.max_length:
        raise ValueError(f"question and answer take {len(row.ids)} positions, the limit is {model.encoder.max_length}")
    return row


def hidden(model: Model, rows: Sequence[Encoded]) -> Tensor:
    """Final states (B, T, D) of rows, padded on the right; equal pictures are encoded once."""
    batch = collate(rows, model.encoder.pad_id)
    device = next(model.net.parameters()).device
    ids, tiles = batch.ids.to(device), batch.tiles.to(device)
    if not len(tiles):
        return model.net(ids)
    first: dict[bytes, int] = {}
    places = [first.setdefault(t.numpy().tobytes(), len(first)) for t in batch.tiles]
    unique = [places.index(k) for k in range(len(first))]
    features = None if model.net.projector is None else model.net.encode(tiles[unique])[places]
    prefixes = None if model.net.resampler is None else model.net.prefixes(tiles[unique])[places]
    context = model.net.context(ids, tiles, batch.to(device).counts, prefixes)
    # Attention is causal and padding stands behind a row's end, so that no mask is needed.
    return model.net(ids, tiles, features=features, context=context)


@torch.inference_mode()
def likelihoods(model: Model, rows: Sequence[Encoded], *, batch_size: int = 16) -> list[Likelihood]:
    """The likelihood of what is labelled in each row, given all that stands before it.

    Raises:
        ValueError: for a row without labels, or whose first position is labelled (nothing predicts it).
    """
    found: list[Likelihood] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        states = hidden(model, part)
        for row, state in zip(part, states, strict=True):
            where = (row.labels != IGNORE).nonzero().flatten().to(state.device)
            if len(where) == 0 or int(where[0]) == 0:
                raise ValueError("a row to be scored must label a position, and none before its second")
            wanted = row.labels.to(state.device)[where]
            found.append(scored(model.net.logits(state[where - 1]).float(), wanted))
    return found


def rank(model: Model, turns: Sequence[Turn], options: Sequence[str], *, batch_size: int = 16) -> list[Likelihood]:
    """How likely each option is as the answer to ``turns``."""
    return likelihoods(model, [answered(model, turns, option) for option in options], batch_size=batch_size)
