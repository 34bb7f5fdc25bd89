"""At which times a sampler looks, in both conventions that are in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Grid:
    """Points of time from noise to data. N points are N - 1 steps.

    Times are Lumina's: t from 0 (noise) to 1 (data). SD3 and diffusers count sigma = 1 - t from 1 to 0
    (:meth:`sigmas`); ``shift`` means the same to both: t -> t / (t + s - s t) is
    sigma -> s sigma / (1 + (s - 1) sigma). Above 1 it spends more steps near the noise, as larger pictures want.

    Attributes:
        points: how many, both ends included. For schedulers of epsilon and v networks: how many evaluations.
        kind: ``shifted`` (evenly spaced, then shifted) or ``sigmoid``.
        shift: of ``shifted``; 1 leaves the points evenly spaced. Demos of Lumina use 4.
        mu, alpha, beta: of ``sigmoid``: of points evenly spaced in u, those below ``mu`` follow a logistic curve of
            slope ``alpha``, those above one of slope ``beta``, both 1/2 at ``mu``; then the ends are pinned to 0 and 1.
            The defaults are the numbers of Lumina-Next's few-step recipe, the curve is our reading of it.
        strength: share of the points that run. Below 1 the first are left out and sampling starts from a picture
            with noise (image to image); 0 leaves nothing to do. The rule is Lumina's.
        start: exact time to start from, for editing. Points before it are left out.

    Raises:
        ValueError: for numbers out of range, or when both ``strength`` and ``start`` are given.
    """

    points: int = 30
    kind: Literal["shifted", "sigmoid"] = "shifted"
    shift: float = 1.0
    mu: float = 0.6
    alpha: float = 6.0
    beta: float = 20.0
    strength: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"a grid of {self.points} points: it needs 2 for one step")
        if self.shift <= 0:
            raise ValueError(f"the time shift is {self.shift}, it must be above 0")
        if self.kind == "sigmoid" and self.shift != 1:
            raise ValueError(f"a sigmoid grid has no shift, {self.shift} was given")
        if self.alpha <= 0 or self.beta <= 0 or not 0 < self.mu < 1:
            raise ValueError(
                f"sigmoid grid: mu {self.mu} must be in (0, 1), alpha {self.alpha} and beta {self.beta} > 0"
            )
        if not 0 <= self.strength <= 1 or not 0 <= self.start < 1:
            raise ValueError(f"strength {self.strength} must be in [0, 1], start {self.start} in [0, 1)")
        if self.strength < 1 and self.start > 0:
            raise ValueError(f"strength {self.strength} and start {self.start} say the same: give one of them")

    @property
    def whole(self) -> bool:
        """Whether sampling starts from pure noise."""
        return self.strength == 1 and self.start == 0

    def times(self, interval: tuple[float, float] = (0.0, 1.0)) -> list[float]:
        """Rising times within ``interval`` (see ``Transport.interval``); fewer than two when nothing is to be done."""
        low, high = interval
        spaced = [i / (self.points - 1) for i in range(self.points)]
        if self.kind == "sigmoid":
            times = [low + (high - low) * self._sigmoid(u) for u in spaced]
        else:
            s = self.shift
            times = [t / (t + s - s * t) for t in (low + (high - low) * u for u in spaced)]
        if self.start > 0:
            return [self.start, *(t for t in times if t > self.start)]
        return times[self.skipped :]

    @property
    def skipped(self) -> int:
        """How many points ``strength`` leaves out."""
        # Without the small number 10 x (1 - 0.9) would be 0.
        return math.floor(self.points * (1 - self.strength) + 1e-9)

    def sigmas(self) -> list[float]:
        """The same points as SD3 and diffusers name them: sigma from 1 (noise) down to 0."""
        return [1 - t for t in self.times()]

    def _sigmoid(self, u: float) -> float:
        def curve(u: float) -> float:
            slope = self.alpha if u < self.mu else self.beta
            return 1 / (1 + math.exp(-slope * (u - self.mu)))

        first, last = curve(0.0), curve(1.0)
        return (curve(u) - first) / (last - first)
