"""Paths between noise and data, what a network may be asked for on them, and the losses of training.

Time runs from noise (t = 0) to data (t = 1): ``x_t = alpha(t) data + sigma(t) noise``. Sources: Lipman et al. 2023
(flow matching), Ma et al. 2024 (SiT: interpolants, score and velocity, equations 3 to 11), Esser et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from accessory.diffusion.batch import each, means
from accessory.diffusion.denoiser import Latents

PathKind = Literal["linear", "gvp", "vp"]
Target = Literal["velocity", "score", "noise"]
Weighting = Literal["none", "velocity", "likelihood"]
Stage = Literal["train", "ode", "sde"]


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their derivatives at some times, all of one shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def rate(self) -> Tensor:
        """``d log(alpha) / dt``, by which the data grows; infinite where alpha is 0."""
        return self.d_alpha / self.alpha

    @property
    def score_factor(self) -> Tensor:
        """The d of ``velocity = rate x + d score``."""
        return self.rate * self.sigma**2 - self.sigma * self.d_sigma


@dataclass(frozen=True)
class Transport:
    """A path and what the network predicts on it.

    Attributes:
        path: ``linear`` (t and 1 - t), ``gvp`` (sine and cosine) or ``vp`` (variance preserving diffusion).
        target: what the network is trained to give: the velocity, the score, or the noise.
        weighting: of score and noise losses, by (d / sigma)^2 (``velocity``) or d / sigma^2 (``likelihood``) with d
            the factor of the score in the velocity.
        train_eps, sample_eps: how far training and sampling keep from the ends of [0, 1], where something divides by
            zero. None takes what is usual: 1e-5 and 1e-3 on ``vp``, where only t = 1 needs it; 1e-3 for the score and
            the noise; 0 for the velocity.
        beta_min, beta_max: of the ``vp`` path.
        min_noise: what the ``linear`` path keeps of the noise at t = 1; Lumina's audio models were trained with 1e-4.

    Raises:
        ValueError: for a weighting that the target does not have.
    """

    path: PathKind = "linear"
    target: Target = "velocity"
    weighting: Weighting = "none"
    train_eps: float | None = None
    sample_eps: float | None = None
    beta_min: float = 0.1
    beta_max: float = 20.0
    min_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.target == "velocity" and self.weighting != "none":
            raise ValueError(f"weighting {self.weighting!r} is for the targets score and noise, not for velocity")
        if not 0 <= self.min_noise < 1 or (self.min_noise and self.path != "linear"):
            raise ValueError(f"min_noise {self.min_noise} is for the linear path, from 0 to below 1")
        for name, eps in (("train_eps", self.train_eps), ("sample_eps", self.sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(f"{name} is {eps}, it must lie in [0, 0.5)")

    # --- The path ---------------------------------------------------------------------------------------------------

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at ``t``."""
        if self.path == "linear":
            lost = 1 - self.min_noise
            return Coefficients(t, 1 - lost * t, torch.ones_like(t), torch.full_like(t, -lost))
        if self.path == "gvp":
            quarter = math.pi / 2
            sine, cosine = torch.sin(quarter * t), torch.cos(quarter * t)
            return Coefficients(sine, cosine, quarter * cosine, -quarter * sine)
        s = 1 - t
        spread = self.beta_max - self.beta_min
        log_alpha = -0.25 * s**2 * spread - 0.5 * s * self.beta_min
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha = alpha * 0.5 * (s * spread + self.beta_min)
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def interpolate(self, data: Latents, noise: Latents, t: Tensor) -> Latents:
        """``x_t``; ``t`` (B,), or one time for all."""

        def mix(t: Tensor, data: Tensor, noise: Tensor) -> Tensor:
            c = self.coefficients(t)
            return c.alpha * data + c.sigma * noise

        return each(mix, t, data, noise)

    def derivative(self, data: Latents, noise: Latents, t: Tensor) -> Latents:
        """The velocity of ``x_t``: what a network of the target ``velocity`` learns."""

        def mix(t: Tensor, data: Tensor, noise: Tensor) -> Tensor:
            c = self.coefficients(t)
            return c.d_alpha * data + c.d_sigma * noise

        return each(mix, t, data, noise)

    # --- What an output says ----------------------------------------------------------------------------------------

    def velocity(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The velocity of the probability flow, of an output of the network for ``x`` at ``t``."""
        if self.target == "velocity":
            return output

        def convert(t: Tensor, output: Tensor, x: Tensor) -> Tensor:
            c = self.coefficients(t)
            score = output if self.target == "score" else -output / c.sigma
            return c.rate * x + c.score_factor * score

        return each(convert, t, output, x)

    def score(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The gradient of log p_t at ``x``; infinite at t = 1, where there is no noise."""
        if self.target == "score":
            return output

        def convert(t: Tensor, output: Tensor, x: Tensor) -> Tensor:
            c = self.coefficients(t)
            if self.target == "noise":
                return -output / c.sigma
            r = c.alpha / c.d_alpha
            return (r * output - x) / (c.sigma**2 - r * c.d_sigma * c.sigma)

        return each(convert, t, output, x)

    def noise(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The noise that ``x`` is thought to hold."""

        def convert(t: Tensor, output: Tensor, x: Tensor) -> Tensor:
            c = self.coefficients(t)
            if self.target == "noise":
                return output
            if self.target == "score":
                return -c.sigma * output
            r = c.alpha / c.d_alpha
            return (r * output - x) / (r * c.d_sigma - c.sigma)

        return each(convert, t, output, x)

    def data(self, output: Latents, x: Latents, t: Tensor) -> Latents:
        """The data that ``x`` is thought to come from: for previews, and for Tweedie's last step."""

        def convert(t: Tensor, output: Tensor, x: Tensor) -> Tensor:
            c = self.coefficients(t)
            if self.target == "velocity":
                return (c.d_sigma * x - c.sigma * output) / (c.alpha * c.d_sigma - c.sigma * c.d_alpha)
            score = output if self.target == "score" else -output / c.sigma
            return (x + c.sigma**2 * score) / c.alpha

        return each(convert, t, output, x)

    # --- Training ---------------------------------------------------------------------------------------------------

    def losses(self, output: Latents, data: Latents, noise: Latents, t: Tensor) -> Tensor:
        """(B,) squared error, the mean over everything of a picture, in fp32.

        Args:
            output: what the network gave for ``interpolate(data, noise, t)``.
            data, noise, t: what the state was made of; ``t`` (B,).
        """

        def squared(t: Tensor, output: Tensor, data: Tensor, noise: Tensor) -> Tensor:
            c = self.coefficients(t)
            if self.target == "velocity":
                return (output.float() - (c.d_alpha * data + c.d_sigma * noise)) ** 2
            # The score is -noise / sigma; times sigma it stays of order one up to the data.
            error = output.float() - noise if self.target == "noise" else output.float() * c.sigma + noise
            return self._weight(c) * error**2

        return means(each(squared, t, output, data, noise))

    def _weight(self, c: Coefficients) -> Tensor:
        if self.weighting == "velocity":
            return (c.score_factor / c.sigma) ** 2
        if self.weighting == "likelihood":
            return c.score_factor / c.sigma**2
        return torch.ones_like(c.sigma)

    def interval(self, stage: Stage, *, last_size: float = 0.0, early: bool = False) -> tuple[float, float]:
        """The times that training or sampling covers.

        Args:
            stage: training, the ODE, or the SDE.
            last_size: length of the SDE's last step, which is left out of the grid.
            early: also keep from t = 0, where the SDE's form needs it (``sbdm``).
        """
        usual = (1e-5, 1e-3) if self.path == "vp" else (0.0, 0.0) if self.target == "velocity" else (1e-3, 1e-3)
        given = self.train_eps if stage == "train" else self.sample_eps
        eps = given if given is not None else usual[stage != "train"]
        low = eps if self.path != "vp" and (early or self.target != "velocity") else 0.0
        return low, 1 - (last_size if stage == "sde" and last_size else eps)


@dataclass(frozen=True)
class TimeSampling:
    """How the times of training are drawn.

    Two shifts, of opposite direction, are in use, so each has its name: ``shift_data`` is Lumina's training option
    ``shift_k``, u -> k u / (1 + (k - 1) u), which favours times near the data for k > 1. ``shift_noise`` is the shift
    of its samplers and of SD3, u -> u / (u + k - k u), which favours times near the noise: ``shift_data`` of 1 / k.

    Attributes:
        kind: ``uniform``, ``lognorm`` (logit-normal: sigmoid of a normal number), ``range`` (uniform in [low, high])
            or one of the shifts.
        low, high: of ``range``.
        k: of the shifts.
        mean, std: of the normal number of ``lognorm``.

    Raises:
        ValueError: for a range or a shift that cannot be.
    """

    kind: Literal["uniform", "lognorm", "range", "shift_data", "shift_noise"] = "uniform"
    low: float = 0.0
    high: float = 1.0
    k: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times from {self.low} to {self.high}: they lie in [0, 1], the lower first")
        if self.k <= 0 or self.std <= 0:
            raise ValueError(f"k is {self.k} and std {self.std}: both must be above 0")

    @classmethod
    def parse(cls, name: str) -> TimeSampling:
        """Lumina's names: ``uniform``, ``lognorm``, ``uniform_0.2_0.9``, ``shift_3`` (towards the data)."""
        kind, *numbers = name.split("_")
        try:
            values = [float(n) for n in numbers]
        except ValueError:
            values = []
        if len(values) == len(numbers):
            if kind in ("uniform", "lognorm") and not values:
                return cls("uniform" if kind == "uniform" else "lognorm")
            if kind == "uniform" and len(values) == 2:
                return cls("range", low=values[0], high=values[1])
            if kind == "shift" and len(values) == 1:
                return cls("shift_data", k=values[0])
        raise ValueError(f"time sampling {name!r} is none of uniform, lognorm, uniform_A_B, shift_K")

    def times(self, drawn: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Times of numbers drawn: normal ones for ``lognorm``, uniform in [0, 1] for all others."""
        u = drawn
        if self.kind == "lognorm":
            u = torch.sigmoid(self.mean + self.std * drawn)
        elif self.kind == "range":
            u = self.low + (self.high - self.low) * drawn
        elif self.kind == "shift_data":
            u = self.k * drawn / (1 + (self.k - 1) * drawn)
        elif self.kind == "shift_noise":
            u = drawn / (drawn + self.k - self.k * drawn)
        return interval[0] + (interval[1] - interval[0]) * u

    def draw(self, count: int, generator: torch.Generator, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """(count,) times within ``interval`` (see :meth:`Transport.interval`), on the generator's device."""
        random = torch.randn if self.kind == "lognorm" else torch.rand
        return self.times(random(count, generator=generator, device=generator.device), interval)
