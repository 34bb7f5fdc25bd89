"""A data set whose flow is known: numbers of mean m and spread s, each picture with an m of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents, Prediction, Steering
from accessory.diffusion.transport import Transport

SPREAD = 0.5


def told(*means: float) -> Condition:
    """A condition a picture: the mean of its data, as one position of text and one channel."""
    seq = torch.tensor(means)[:, None, None]
    return Condition(seq=seq, mask=torch.ones(seq.shape[:2], dtype=torch.bool))


class Gaussian:
    """The best denoiser of such data, for every target of a flow, epsilon and v. It remembers what it was asked."""

    def __init__(self, prediction: Prediction = "flow", transport: Transport | None = None) -> None:
        self.prediction, self.transport, self.latent_channels = prediction, transport or Transport(), 4
        self.asked: list[int] = []
        self.times: list[float] = []
        self.dtypes: list[torch.dtype] = []
        self.steerings: list[Steering | None] = []
        self.tables: Any = None  # alphas_cumprod, for epsilon and v

    def __call__(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        assert condition.seq is not None
        assert t.shape == (len(x),)
        self.asked.append(len(x))
        self.times.append(float(t[0]))
        self.dtypes.append(x[0].dtype)
        self.steerings.append(steering)
        rows = [self.one(part, t[i], condition.seq[i, 0, 0]) for i, part in enumerate(x)]
        return torch.stack(rows) if isinstance(x, Tensor) else rows

    def one(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """The prediction for one picture."""
        if self.prediction != "flow":
            kept = self.tables[t.long()].to(x.dtype)
            alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
            away = (x - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)
            noise, data = sigma * away, mean + alpha * SPREAD**2 * away
            return noise if self.prediction == "epsilon" else alpha * noise - sigma * data
        c = self.transport.coefficients(t.to(x.dtype))
        away = (x - c.alpha * mean) / (c.alpha**2 * SPREAD**2 + c.sigma**2)
        if self.transport.target == "score":
            return -away
        if self.transport.target == "noise":
            return c.sigma * away
        return c.d_alpha * mean + (c.alpha * c.d_alpha * SPREAD**2 + c.sigma * c.d_sigma) * away
