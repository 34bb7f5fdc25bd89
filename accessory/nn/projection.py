"""Projections of features from one width to another, as DreamLLM's projector zoo has them."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.linear import Linear

Kind = Literal["linear", "mlp", "conv", "sam"]
SINGLE = 16  # side of the grid that a lone vector is spread over before a convolution


class Projection(nn.Module):
    """``linear``: one layer. ``mlp``: ``depth`` layers with exact GELU between them.

    ``conv``: a 3x3 convolution over the square grid of the tokens. ``sam``: a map four times as wide and high as the
    grid of tokens that comes out, through two strided convolutions of ``hidden`` channels and a linear layer.
    Parameters are ``layers.<n>``, counted without the activations.
    """

    def __init__(
        self,
        kind: Kind,
        in_features: int,
        out_features: int,
        *,
        depth: int = 2,
        bias: bool = True,
        hidden: tuple[int, int] = (512, 1024),
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("linear", "mlp"):
            if kind == "mlp" and depth < 2:
                raise ValueError(f"an mlp has a depth of at least 2, got {depth}")
            widths = [in_features] + [out_features] * (depth if kind == "mlp" else 1)
            made: list[nn.Module] = [Linear(a, b, bias) for a, b in pairwise(widths)]
        elif kind == "conv":
            made = [nn.Conv2d(in_features, out_features, 3, padding=1, bias=bias)]
        elif kind == "sam":
            first, second = hidden
            made = [nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in ((in_features, first), (first, second))]
            made.append(Linear(second, out_features))
        else:
            raise ValueError(f"projection kind {kind!r} is not one of 'linear', 'mlp', 'conv', 'sam'")
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out); ``conv`` takes (B, P, in) with P square, or one vector (in) for a grid of 256;
        ``sam`` takes a map (B, in, rows, cols) and gives (B, rows * cols / 16, out)."""
        if self.kind == "sam":
            x = self.layers[1](self.layers[0](x))
            return self.layers[2](x.flatten(2).transpose(1, 2))
        if self.kind == "conv":
            return self._convolve(x)
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            x = x.expand(1, SINGLE * SINGLE, -1)
        side = int(x.shape[1] ** 0.5 + 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"a convolution needs a square grid of tokens, there are {x.shape[1]}")
        # (B, P, C) row-major to (B, C, side, side) and back
        y = self.layers[0](x.transpose(1, 2).unflatten(2, (side, side)))
        return y.flatten(2).transpose(1, 2)
