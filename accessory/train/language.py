"""The next-token loss of what is learned, of padded samples and of packed ones, whole or a part at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from accessory.nn.ragged import Ragged
from accessory.schema import Batch
from accessory.tokens import IGNORE


def layout(batch: Batch) -> Ragged | None:
    """Where the samples of a packed batch lie in the row that they share; None for one that is padded."""
    return Ragged.of(batch.mask) if batch.packed else None


def next_token_losses(
    scores: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor, rows: Ragged | None = None, chunk: int | None = None
) -> Tensor:
    """Losses (M) of the M learned ``labels`` (B, T), in reading order; the first of a sample is predicted by nothing.

    ``scores`` maps states (..., D) to scores (..., V). ``h``: states (B, T, D), or (1, N, D) of samples laid out as
    ``rows``. With ``chunk`` no more than so many positions have scores at a time: they are computed again for the
    backward pass, and neither pass ever holds (M, V).
    """
    learned = labels[:, 1:] != IGNORE
    if rows is None:
        states = h[:, :-1][learned]  # only where something is learned: V is most of the work
    else:
        states = h[0, rows.at(*learned.nonzero(as_tuple=True))]
    targets = labels[:, 1:][learned]

    def losses(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores(part).float(), target, reduction="none")

    if chunk is None or len(targets) <= chunk:
        return losses(states, targets)
    parts = zip(states.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(losses, part, target, use_reentrant=False) for part, target in parts])
