"""What a model that writes and dreams minimises: the weights of its two losses, and the language loss's trigger."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.tokens import IGNORE


@dataclass(frozen=True)
class DreamLossConfig:
    """``language`` and ``picture`` weigh the two losses (DreamLLM trains 0 : 1 or 1 : 0 first, then 1 : 10).

    ``scale`` divides by the sum (``l1``) or the Euclidean norm (``l2``) of the weights. ``trigger`` weighs the
    trigger among the labels: pictures are asked for far less often than words.
    """

    language: float = 1.0
    picture: float = 10.0
    scale: Literal["none", "l1", "l2"] = "none"
    trigger: float = 1.0

    def __post_init__(self) -> None:
        if min(self.language, self.picture) < 0 or self.language + self.picture <= 0 or self.trigger < 0:
            raise ValueError(f"dream loss: weights are at least 0 and not both 0, got {self}")

    def total(self, language: Tensor, picture: Tensor) -> Tensor:
        """The weighted sum of two scalars. A part of weight 0 is left out: 0 times NaN would be NaN."""
        divisor = {
            "none": 1.0,
            "l1": self.language + self.picture,
            "l2": math.hypot(self.language, self.picture),
        }[self.scale]
        parts = [w * loss for w, loss in ((self.language, language), (self.picture, picture)) if w]
        return torch.stack(parts).sum() / divisor


def language_loss(scores: Tensor, labels: Tensor, trigger_id: int, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses of scores (B, T, V) and labels (B, T), and what it is to be divided by.

    Labels are columns of ``scores`` (``Dream.targets``) or -100; position t predicts label t + 1. The trigger counts
    ``weight`` times in both sums, so the quotient stays a mean.
    """
    labels = labels[:, 1:].flatten()
    losses = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="none")
    weights = (labels != IGNORE).to(losses.dtype)
    weights = torch.where(labels == trigger_id, weights * weight, weights)
    return (losses * weights).sum(), weights.sum()
