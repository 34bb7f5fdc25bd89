"""LLaMA-Adapter's visual resampler: a picture's features condensed into the tokens of a prefix."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Resampler(nn.Module):
    """Features (N,P,C) to (N, prefix_len, D): learned queries are put before the projected features, vision
    transformer blocks mix them, and the queries' outputs are projected to the backbone's width and normed.

    Parameters carry LLaMA-Adapter's names: ``clip_proj``, ``clip_proj_norm``, ``visual_query``, ``visual_blocks.n``
    (timm's Block), ``visual_proj``, ``visual_proj_norm``. ``eps`` is the blocks' LayerNorm epsilon: 1e-5 in the
    published models, while today's timm would default to 1e-6.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        prefix_len: int = 10,
        *,
        width: int = 768,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        if prefix_len < 1 or width % heads:
            raise ValueError(
                f"prefix_len {prefix_len} must be at least 1 and width {width} a multiple of heads {heads}"
            )
        self.features, self.prefix_len, self.heads = features, prefix_len, heads
        self.clip_proj = nn.Linear(features, width)
        self.clip_proj_norm = nn.LayerNorm(width)
        self.visual_query = nn.Embedding(prefix_len, width)
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.visual_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.visual_proj = nn.Linear(width, dim)
        self.visual_proj_norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N,P,C), P tokens of one picture, to prefix tokens (N, prefix_len, D)."""
        if features.ndim != 3 or features.shape[-1] != self.features:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, P, {self.features})")
        x = self.clip_proj_norm(self.clip_proj(features.to(self.clip_proj.weight.dtype)))
        x = torch.cat([self.visual_query.weight.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.visual_blocks:
            x = block(x)
        out: Tensor = self.visual_proj_norm(self.visual_proj(x[:, : self.prefix_len]))
        return out
