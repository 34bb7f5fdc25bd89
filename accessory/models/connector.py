"""From states of a language model to what a denoiser reads: the mix of layers, the connector, the output heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention, attend
from accessory.nn.block import Block
from accessory.nn.feed_forward import FeedForward, ffn_width
from accessory.nn.linear import Linear
from accessory.nn.norm import RMSNorm
from accessory.nn.projection import Projection
from accessory.nn.rope import table

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class ConnectorConfig:
    """``linear`` and ``mlp`` (``depth`` layers) look at every position alone; ``encoder`` is ``depth`` bidirectional
    blocks that skip padding; ``gen_adapter`` is ChatIllusion's: ``num_tokens`` learned queries of its own through
    ``depth`` cross-attentions.

    ``width``: channels that come out. ``bias``: of ``linear`` and ``mlp``.
    """

    kind: Literal["linear", "mlp", "encoder", "gen_adapter"] = "encoder"
    width: int = 512
    depth: int = 4
    heads: int = 8
    num_tokens: int = 77
    bias: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1 or self.heads < 1 or self.num_tokens < 1:
            raise ValueError(f"connector: depth, heads and num_tokens are at least 1, got {self}")
        if self.kind in ("encoder", "gen_adapter") and self.width % (2 * self.heads):
            raise ValueError(f"connector.width {self.width} is not an even multiple of connector.heads {self.heads}")


@dataclass(frozen=True)
class HeadsConfig:
    """``sequence``: none, ``linear``, or ``mlp`` (with ReLU) to ``width`` channels (None: those of the backbone).

    ``pooled``: width of a vector made of the masked mean, None for none. ``zero_init``: both start as zero, so that
    training starts from the denoiser's own behaviour (DeepGen).
    """

    sequence: Literal["none", "linear", "mlp"] = "none"
    width: int | None = None
    pooled: int | None = None
    zero_init: bool = False


class Mix(nn.Module):
    """Several layers' states as one: the last, side by side, or a learned softmax (which starts as the mean).

    ``norm`` brings the layers to one scale first, each with an RMS norm of its own: un-normed states grow with depth.
    """

    weights: nn.Parameter | None

    def __init__(self, num_layers: int, dim: int, mix: Literal["last", "concat", "softmax"], norm: bool) -> None:
        super().__init__()
        if num_layers < 1 or (mix == "last" and num_layers > 1):
            raise ValueError(f"tap.mix {mix!r} does not take {num_layers} layers")
        self.mix = mix
        self.width = dim * num_layers if mix == "concat" else dim
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(num_layers if norm else 0))
        self.register_parameter("weights", nn.Parameter(torch.zeros(num_layers)) if mix == "softmax" else None)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """(..., D) of every layer to (..., width)."""
        if len(self.norms):
            states = [norm(x) for norm, x in zip(self.norms, states, strict=True)]
        if self.weights is not None:
            stacked = torch.stack(tuple(states), -1)
            return stacked @ self.weights.softmax(0).to(stacked.dtype)
        return states[0] if self.mix == "last" else torch.cat(tuple(states), -1)


class CrossAttention(nn.Module):
    """Queries attend to keys and values, then a linear layer; no residual, no feed-forward, no self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wo = Linear(width, width, bias=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, M, W) over keys and values (B, L, W); ``mask`` (B, L) is False on padding."""
        # (B, L, W) -> (B, H, L, W / H)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.wo(attend(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2))


class GenAdapter(nn.Module):
    """ChatIllusion's adapter: learned queries read the states of the prompt."""

    def __init__(self, in_features: int, config: ConnectorConfig) -> None:
        super().__init__()
        w = config.width
        self.queries = nn.Parameter(torch.randn(config.num_tokens, w) * 0.02)
        for name, width in (("q", w), ("k", in_features), ("v", in_features)):
            self.add_module(name, Linear(width, w, bias=True))
            self.add_module(f"{name}_norm", nn.LayerNorm(w))
        self.blocks = nn.ModuleList(CrossAttention(w, config.heads) for _ in range(config.depth))

    def _path(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, in) and its mask (B, L) to (B, M, W)."""
        q = self._path("q", self.queries).expand(len(x), -1, -1)
        k, v = self._path("k", x), self._path("v", x)
        for block in self.blocks:
            q = block(q, k, v, mask)
        return q


class BidirectionalEncoder(nn.Module):
    """LLaMA blocks without the causal rule; padding is neither seen nor counted as a position."""

    def __init__(self, in_features: int, config: ConnectorConfig) -> None:
        super().__init__()
        w, self.head_dim = config.width, config.width // config.heads
        self.input = Linear(in_features, w, bias=True)
        self.blocks = nn.ModuleList(
            Block(
                Attention(w, config.heads, config.heads, self.head_dim),
                FeedForward(w, ffn_width(w, 32, None)),
                RMSNorm(w),
                RMSNorm(w),
            )
            for _ in range(config.depth)
        )
        self.norm = RMSNorm(w)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, in) and its mask (B, L) to (B, L, W); rows of padding come out as anything."""
        x = self.input(x)
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        rope = table(positions, self.head_dim, ROPE_BASE)
        # A row of nothing but padding may see itself: it would turn into NaN otherwise.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        allowed = (mask[:, None, :] | itself)[:, None]
        for block in self.blocks:
            x = block(x, rope, allowed)
        return self.norm(x)


class Connector(nn.Module):
    """One of the kinds of :class:`ConnectorConfig` behind one call."""

    def __init__(self, in_features: int, config: ConnectorConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.body: nn.Module
        if config.kind in ("linear", "mlp"):
            kind: Literal["linear", "mlp"] = "linear" if config.kind == "linear" else "mlp"
            self.body = Projection(kind, in_features, config.width, depth=config.depth, bias=config.bias)
        else:
            self.body = (GenAdapter if config.kind == "gen_adapter" else BidirectionalEncoder)(in_features, config)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, L, in) and their mask (B, L) to features (B, M, W) and theirs (B, M); M is L but for
        ``gen_adapter``, where it is the number of its queries."""
        x = x.to(next(self.parameters()).dtype)
        if self.kind in ("linear", "mlp"):
            return self.body(x), mask
        y = self.body(x, mask)
        return y, mask if self.kind == "encoder" else mask.new_ones(y.shape[:2])


class Heads(nn.Module):
    """Sequence and pooled outputs of a connector ``in_features`` wide."""

    pooled: nn.Module | None

    def __init__(self, in_features: int, width: int, config: HeadsConfig) -> None:
        super().__init__()
        if config.sequence == "none" and width != in_features:
            raise ValueError(f"heads.sequence none: connector.width {in_features} is not the output width {width}")
        if config.zero_init and config.sequence == "none" and config.pooled is None:
            raise ValueError("heads.zero_init needs a head: sequence is none and pooled is null")
        layers: list[nn.Module] = []
        if config.sequence == "mlp":
            layers = [Linear(in_features, in_features, bias=True), nn.ReLU()]
        if config.sequence != "none":
            layers.append(Linear(in_features, width, bias=True))
        self.sequence = nn.Sequential(*layers)
        pooled = None if config.pooled is None else Linear(in_features, config.pooled, bias=True)
        self.register_module("pooled", pooled)
        for last in (*layers[-1:], pooled):
            if config.zero_init and isinstance(last, Linear):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, M, W) and their mask (B, M) to (B, M, width) and (B, pooled) or None."""
        head = self.pooled
        return self.sequence(y), None if head is None else head(masked_mean(y, mask))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean (B, C) of (B, L, C) over the positions where ``mask`` (B, L) is True; padding may hold anything."""
    total = x.masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp_min(1).to(total.dtype)
