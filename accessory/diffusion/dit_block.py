"""One block of the Lumina diffusion transformers: self-attention with gated text, feed-forward, modulation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.diffusion.dit_config import FeedForwardSpec, FlagDiTConfig
from accessory.nn.attention import attend
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.moe import MoEFeedForward
from accessory.nn.norm import RMSNorm
from accessory.nn.packed import Packed
from accessory.nn.rope import rotate

Keys = tuple[Tensor, Tensor]
"""Keys and values of text, (R, K, L, A) each."""


@dataclass(frozen=True)
class View:
    """What self-attention is told about the sequences of a call.

    Attributes:
        rope: (B or 1, T, A/2) complex factors.
        mask: (B, 1, 1, S) boolean, True at keys that may be seen; None when all may. S counts shared keys too.
        scale: (B or 1, 1, 1, 1) what queries are multiplied with for proportional attention, or None.
        halves: where attention is shared, the parts of the batch whose first picture is seen by all of theirs; else 0.
    """

    rope: Tensor
    mask: Tensor | None = None
    scale: Tensor | None = None
    halves: int = 0


@dataclass(frozen=True)
class Text:
    """What blocks are told about text: R rows, one for each of the B pictures, then one for every prompt of a region.

    Attributes:
        features: (R, L, C), for blocks to make keys of; None when ``keys`` has them.
        mask: (R, 1, 1, L) boolean with at least one True a row; None when all is text.
        keys: of every layer, made before.
        heads: for every layer the heads whose gate is wide enough; None for all, of a layer or of all layers.
        share: (B, 1, T or 1, 1) what a picture's own text counts at each token; None for 1.
        regions: rows of prompts, and what they count at each token of the first B' pictures, (B', 1, T, 1).
    """

    features: Tensor | None
    mask: Tensor | None = None
    keys: tuple[Keys, ...] | None = None
    heads: tuple[Tensor | None, ...] | None = None
    share: Tensor | None = None
    regions: tuple[tuple[int, Tensor], ...] = ()

    def attend(self, q: Tensor, keys: Keys) -> Tensor:
        """What queries (B, H, T, A) read in the text of their picture and of their regions."""
        y = self._rows(q, keys, 0, len(q))
        if self.share is not None:
            y = y * self.share
        if self.regions:
            ruled = len(self.regions[0][1])
            top = y[:ruled]
            for row, share in self.regions:
                top = top + share * self._rows(q[:ruled], keys, row, row + 1)
            y = torch.cat([top, y[ruled:]])
        return y

    def _rows(self, q: Tensor, keys: Keys, start: int, end: int) -> Tensor:
        size = (len(q), -1, -1, -1)
        k, v = (part[start:end].expand(size) for part in keys)
        mask = None if self.mask is None else self.mask[start:end].expand(size)
        return attend(q, k, v, mask, causal=False)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose parameters may be kept in fp32 beside half-precision inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D)."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class DiTAttention(nn.Module):
    """Bidirectional attention whose heads also read text, each through a gate that starts shut (LLaMA-Adapter's).

    Queries and keys are normalised over all heads together, and rotated; text keys are not rotated.
    Slot ``fused``: query, key and value projections as one product (``diffusion.dit_fast``).
    """

    q_norm: LayerNorm | None
    k_norm: LayerNorm | None
    ky_norm: LayerNorm | None
    fused: Packed | None

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, text_dim: int | None, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        narrow = n_kv_heads * self.head_dim
        self.wq = Linear(dim, dim)
        self.wk = Linear(dim, narrow)
        self.wv = Linear(dim, narrow)
        self.wo = Linear(dim, dim)
        if text_dim is not None:
            self.wk_y = Linear(text_dim, narrow)
            self.wv_y = Linear(text_dim, narrow)
            self.gate = nn.Parameter(torch.zeros(n_heads))
        self.q_norm = LayerNorm(dim) if qk_norm else None
        self.k_norm = LayerNorm(narrow) if qk_norm else None
        self.ky_norm = LayerNorm(narrow) if qk_norm and text_dim is not None else None
        self.register_module("fused", None)

    def heads(self, x: Tensor) -> Tensor:
        """Split (B, T, heads * A) into (B, T, heads, A)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def read(self, y: Tensor) -> Keys:
        """Keys and values of text features (R, L, C)."""
        k, v = self.wk_y(y), self.wv_y(y)
        if self.ky_norm is not None:
            k = self.ky_norm(k)
        return self.heads(k).transpose(1, 2), self.heads(v).transpose(1, 2)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, A), keys and values (B, K, T, A) of (B, T, D); queries and keys are rotated."""
        wq, wk, wv, fused = self.wq, self.wk, self.wv, self.fused
        if fused is not None and fused.fits(wq.weight, wk.weight, wv.weight):
            q, k, v = fused(x)
            q, k, v = wq.finish(q, x), wk.finish(k, x), wv.finish(v, x)
        else:
            q, k, v = wq(x), wk(x), wv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # (B, T, heads * A) -> (B, heads, T, A)
        q = rotate(self.heads(q), rope).transpose(1, 2)
        k = rotate(self.heads(k), rope).transpose(1, 2)
        return q, k, self.heads(v).transpose(1, 2)

    def forward(
        self, x: Tensor, view: View, text: Text | None = None, keys: Keys | None = None, heads: Tensor | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        ``keys``: this layer's keys and values of ``text``. ``heads``: the only heads that read it; None for all.
        """
        q, k, v = self.project(x, view.rope)
        seen_k, seen_v = (_shared(k, view.halves), _shared(v, view.halves)) if view.halves else (k, v)
        y = attend(q if view.scale is None else q * view.scale, seen_k, seen_v, view.mask, causal=False)
        if text is not None and keys is not None:
            y = y + self._read_text(q, text, keys, heads)
        return self.wo(y.transpose(1, 2).flatten(2))

    def _read_text(self, q: Tensor, text: Text, keys: Keys, heads: Tensor | None) -> Tensor:
        gate = self.gate.to(q.dtype).tanh()[:, None, None]  # (H, 1, 1)
        if heads is None:
            return gate * text.attend(q, keys)
        # Query head h is served by key head h // (H / K).
        served = heads // (q.shape[1] // keys[0].shape[1])
        found = text.attend(q[:, heads], (keys[0][:, served], keys[1][:, served]))
        found = gate[heads] * found
        return found.new_zeros(q.shape).index_copy(1, heads, found)


def _shared(x: Tensor, halves: int) -> Tensor:
    """(B, K, T, A) to (B, K, 2 T, A): each picture's own, then those of the first picture of its half."""
    first = x.unflatten(0, (halves, -1))[:, :1].expand(-1, len(x) // halves, -1, -1, -1).flatten(0, 1)
    return torch.cat([x, first], dim=2)


def modulated(norm: RMSNorm | None, eps: float, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` of (B, T, D) with (B, 1, D); ``norm`` None has no weight.

    The weight joins the scale, which saves a pass over the tokens.
    """
    factor = 1 + scale if norm is None else (1 + scale) * norm.weight.to(scale.dtype)
    y = F.rms_norm(x, (x.shape[-1],), eps=eps) * factor
    return y if shift is None else y + shift


class DiTBlock(nn.Module):
    """Attention and feed-forward layers, each shifted, scaled and gated by the conditioning vector."""

    def __init__(self, config: FlagDiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.norm_eps
        self.norms = config.norms
        self.attention = DiTAttention(dim, config.n_heads, config.kv_heads, config.text_dim, config.qk_norm)
        self.specs = (FeedForwardSpec("attention", "attention_norm"), *config.feed_forwards)
        for spec in self.specs:
            if spec is not self.specs[0]:
                self.add_module(spec.name, _feed_forward(config, spec))
            for name in (f"{spec.norm}1", f"{spec.norm}2") if config.norms == "sandwich" else (spec.norm,):
                self.add_module(name, RMSNorm(dim, config.norm_eps))
        if config.text_dim is not None:
            self.attention_y_norm = RMSNorm(config.text_dim, config.norm_eps)
        self.width = 3 if config.norms == "pre" else 2
        modulation = Linear(config.adaln_width, self.width * len(self.specs) * dim, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def read(self, features: Tensor) -> Keys:
        """Keys and values of text features (R, L, C); they depend on nothing else."""
        return self.attention.read(self.attention_y_norm(features))

    def forward(self, x: Tensor, c: Tensor, time: Tensor, view: View, text: Text | None, layer: int) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        ``c``: (B, W) conditioning vector. ``time``: (B, W) its part that comes of the time alone, for time experts.
        ``layer``: which of ``text``'s keys and heads are this block's.
        """
        # (B, 1, D) each, in the order (shift,) scale, gate for every sub-layer.
        parts = self.adaLN_modulation(c)[:, None].chunk(self.width * len(self.specs), dim=-1)
        for i, spec in enumerate(self.specs):
            *shift, scale, gate = parts[self.width * i : self.width * (i + 1)]
            h = modulated(self._norm(spec, before=True), self.eps, x, scale, shift[0] if shift else None)
            if i == 0:
                h = self._attention(h, view, text, layer)
            elif spec.route is None:
                h = self.get_submodule(spec.name)(h)
            else:
                h = self.get_submodule(spec.name)(h, time if spec.route == "time" else h)
            after = self._norm(spec, before=False)
            x = x + (gate * h if after is None else gate.tanh() * after(h))
        return x

    def _attention(self, h: Tensor, view: View, text: Text | None, layer: int) -> Tensor:
        heads = None if text is None or text.heads is None else text.heads[layer]
        if text is None or (heads is not None and not len(heads)):
            return self.attention(h, view)
        if text.keys is not None:
            keys = text.keys[layer]
        else:
            assert text.features is not None, "text has neither features nor keys"
            keys = self.read(text.features)
        return self.attention(h, view, text, keys, heads)

    def _norm(self, spec: FeedForwardSpec, before: bool) -> RMSNorm | None:
        if self.norms == "sandwich":
            name = f"{spec.norm}{1 if before else 2}"
        elif before == (self.norms == "pre"):
            name = spec.norm
        else:
            return None
        norm = getattr(self, name)
        assert isinstance(norm, RMSNorm)
        return norm


def _feed_forward(config: FlagDiTConfig, spec: FeedForwardSpec) -> nn.Module:
    if spec.route is None or config.experts is None:
        return FeedForward(config.dim, config.hidden)
    number = getattr(config.experts, spec.route)
    route_dim = config.adaln_width if spec.route == "time" else config.dim
    return MoEFeedForward(config.dim, config.hidden, number, config.experts.top, route_dim)
