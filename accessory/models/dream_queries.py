"""What stands at the queries' positions of a dream span: learned vectors, noise, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.nn.projection import Projection

_WAVES = 4  # octaves of sine and cosine that a place is written in, for each of two axes
_DEFAULTS = {"noisy": 1.0, "mixed": 0.02}


@dataclass(frozen=True)
class QueryConfig:
    """``learned``: a vector for each query (DreamLLM, MetaQuery). ``mixed``: the same with noise on top. ``noisy``:
    noise and what an MLP says of the query's place in ``grid`` (rows, columns; null: one row) instead of a vector, so
    that queries cannot settle on the one task that they were trained for (WeMMU).

    ``sigma``: standard deviation of the noise; null: 1 for ``noisy``, 0.02 for ``mixed``, with which the learned
    vectors begin. ``seed``: of the noise where a picture brings none of its own: at inference, and in the null
    condition of training too.
    """

    kind: Literal["learned", "mixed", "noisy"] = "learned"
    sigma: float | None = None
    grid: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind != "noisy" and self.grid is not None:
            raise ValueError(f"query.grid {self.grid} is for query.kind 'noisy', not {self.kind!r}")
        if self.kind == "learned" and self.sigma is not None:
            raise ValueError(
                f"query.sigma {self.sigma} is for query.kind 'mixed' or 'noisy'; learned ones have no noise"
            )
        if self.sigma is not None and self.sigma < 0:
            raise ValueError(f"query.sigma {self.sigma} must be at least 0")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"query.grid {self.grid} must be at least 1 x 1")


class QueryNoise(nn.Module):
    """What is added to the ``learned`` vectors, of which ``noisy`` queries have none.

    Args:
        config: see :class:`QueryConfig`.
        count: Q, how many queries.
        dim: D, the width of the language model.
    """

    fixed: Tensor
    waves: Tensor
    places: nn.Module | None

    def __init__(self, config: QueryConfig, count: int, dim: int) -> None:
        super().__init__()
        self.config, self.count, self.dim = config, count, dim
        self.learned = 0 if config.kind == "noisy" else count
        self.sigma = _DEFAULTS.get(config.kind, 0.0) if config.sigma is None else config.sigma
        places = None
        if config.kind != "learned":
            drawn = torch.randn(count, dim, generator=torch.Generator("cpu").manual_seed(config.seed), device="cpu")
            self.register_buffer("fixed", drawn, persistent=False)
        if config.kind == "noisy":
            self.register_buffer("waves", waves(*(config.grid or (1, count))), persistent=False)
            places = Projection("mlp", self.waves.shape[1], dim)
        self.register_module("places", places)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor | None:
        """Noise (N, Q, D) of N pictures, each from its own generator; None where queries have none."""
        if self.config.kind == "learned":
            return None
        drawn = [torch.randn(self.count, self.dim, generator=g, device=g.device).to(self.fixed) for g in generators]
        return torch.stack(drawn) if drawn else self.fixed.new_zeros(0, self.count, self.dim)

    def forward(self, learned: Tensor, spans: int, noise: Tensor | None = None) -> Tensor:
        """Vectors (N, Q, D) of the queries of N ``spans``, from ``learned`` (Q, D) or (0, D) and ``noise`` of
        :meth:`draw`; without it every span has that of ``seed``.

        Raises:
            ValueError: for noise of another number of spans, or where queries take none.
        """
        if self.config.kind == "learned":
            if noise is not None:
                raise ValueError("noise is given, but query.kind is 'learned'")
            return learned.expand(spans, -1, -1)
        noise = self.fixed.expand(spans, -1, -1) if noise is None else noise
        if noise.shape != (spans, self.count, self.dim):
            raise ValueError(f"noise of shape {tuple(noise.shape)} for {spans} spans of {self.count} queries")
        noise = (noise * self.sigma).to(learned)
        return noise + (learned if self.places is None else self.places(self.waves.to(learned)))


def waves(rows: int, columns: int) -> Tensor:
    """(rows * columns, 16): each place of a grid, row by row, as sines and cosines of its two coordinates in [0, 1]."""
    axes = [(torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / n for n in (rows, columns)]
    # (rows, columns, 2), each coordinate at four octaves
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[..., None] * (math.pi * 2.0 ** torch.arange(_WAVES))
    return torch.cat((at.sin(), at.cos()), -1).flatten(0, 1).flatten(1)
