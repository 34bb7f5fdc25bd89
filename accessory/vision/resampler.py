"""What a picture brings to a prefix: LLaMA-Adapter's resampler of features, ImageBind-LLM's network of one vector."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.norm import RMSNorm

Kind = Literal["queries", "bind", "bind_legacy"]


class Resampler(nn.Module):
    """Features (N,P,C) to (N, prefix_len, D): learned queries are put before the projected features, vision
    transformer blocks mix them, and the queries' outputs are projected to the backbone's width and normed.

    Parameters carry LLaMA-Adapter's names: ``clip_proj``, ``clip_proj_norm``, ``visual_query``, ``visual_blocks.n``
    (timm's Block), ``visual_proj``, ``visual_proj_norm``. ``eps`` is the blocks' LayerNorm epsilon: 1e-5 in the
    published models, while today's timm would default to 1e-6.
    """

    kind: Kind = "queries"

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
        self.features, self.prefix_len, self.heads, self.width, self.depth = features, prefix_len, heads, width, depth
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


class Bind(Resampler):
    """ImageBind-LLM's network (Han et al. 2023): one vector of a picture to the one token of a prefix.

    The first of the features (N,P,C), normalised to length 1, goes through a linear layer to D and ``depth`` residual
    blocks ``x + f2(silu(f1 n(x)) * f3 n(x))`` of width ``width``. Parameters carry the published names. ``legacy``: as
    the first files have it, with LayerNorm and biases in place of RMSNorm. ``near``: a :class:`Neighbours` that moves
    the vector first.
    """

    near: Neighbours | None

    def __init__(self, features: int, dim: int, *, width: int = 16384, depth: int = 3, legacy: bool = False) -> None:
        nn.Module.__init__(self)  # another network in the same place: nothing of the base's is built
        self.features, self.prefix_len, self.heads, self.width, self.depth = features, 1, 1, width, depth
        self.kind = "bind_legacy" if legacy else "bind"
        self.image_bind_proj = nn.Linear(features, dim)
        for i in range(1, depth + 1):
            self.add_module(f"image_bind_norm_{i}", nn.LayerNorm(dim) if legacy else RMSNorm(dim, eps=1e-6))
            self.add_module(f"image_bind_f1_{i}", nn.Linear(dim, width, bias=legacy))
            self.add_module(f"image_bind_f2_{i}", nn.Linear(width, dim, bias=legacy))
            self.add_module(f"image_bind_f3_{i}", nn.Linear(dim, width, bias=legacy))
        self.register_module("near", None)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N,P,C), of which the first is taken, to tokens (N, 1, D)."""
        if features.ndim != 3 or features.shape[-1] != self.features:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, P, {self.features})")
        vector = F.normalize(features[:, 0].float(), dim=-1)
        if self.near is not None and not self.training:
            vector = self.near(vector)
        x: Tensor = self.image_bind_proj(vector.to(self.image_bind_proj.weight.dtype))
        for i in range(1, self.depth + 1):
            norm, f1, f2, f3 = (self.get_submodule(f"image_bind_{part}_{i}") for part in ("norm", "f1", "f2", "f3"))
            y = norm(x)
            x = x + f2(F.silu(f1(y)) * f3(y))
        return x[:, None]


class Neighbours(nn.Module):
    """ImageBind-LLM's cache: a vector is moved towards those of pictures that were seen in training.

    The mean of the ``count`` nearest of ``vectors`` (N,C), weighted by the softmax of their cosines times
    ``temperature`` and normalised, takes the share ``blend``; the sum is normalised again. Meant for sounds and other
    inputs, whose vectors lie elsewhere than pictures' do.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, count: int = 10, temperature: float = 20.0, blend: float = 0.5) -> None:
        super().__init__()
        if vectors.ndim != 2 or not 1 <= count <= len(vectors):
            raise ValueError(f"the cache has shape {tuple(vectors.shape)}, expected (N, C) with N at least {count}")
        self.count, self.temperature, self.blend = count, temperature, blend
        self.register_buffer("vectors", F.normalize(vectors, dim=-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B,C) of length 1 to vectors of length 1."""
        if x.shape[-1] != self.vectors.shape[-1]:
            raise ValueError(f"vectors have width {x.shape[-1]}, those of the cache {self.vectors.shape[-1]}")
        found = (x.to(self.vectors.dtype) @ self.vectors.t()).float().topk(self.count)
        weights = (found.values * self.temperature).softmax(-1)
        mean = (weights[..., None] * self.vectors[found.indices].float()).sum(1)
        return F.normalize((1 - self.blend) * x + self.blend * F.normalize(mean, dim=-1), dim=-1)


def make(
    kind: Kind,
    features: int,
    dim: int,
    *,
    length: int,
    width: int,
    depth: int,
    heads: int,
    vectors: Tensor | None = None,
) -> Resampler:
    """A :class:`Resampler`, or a :class:`Bind` with ``vectors`` as its cache.

    Raises:
        ValueError: for sizes that do not go together, and a cache where none is used.
    """
    if kind == "queries":
        if vectors is not None:
            raise ValueError("resampler.neighbours is for kind bind; kind queries looks nothing up")
        return Resampler(features, dim, length, width=width, depth=depth, heads=heads)
    if length != 1:
        raise ValueError(f"resampler.length is {length}, kind {kind} makes 1 token")
    made = Bind(features, dim, width=width, depth=depth, legacy=kind == "bind_legacy")
    made.near = None if vectors is None else Neighbours(vectors)
    return made
