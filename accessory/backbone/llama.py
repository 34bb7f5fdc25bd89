"""The LLaMA family, once: every published member is a value of :class:`LlamaConfig`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention
from accessory.nn.block import Block, Order
from accessory.nn.cache import KVCache
from accessory.nn.feed_forward import Activation, FeedForward, ffn_width
from accessory.nn.linear import Linear, product
from accessory.nn.moe import MoEConfig, MoEFeedForward
from accessory.nn.norm import LayerNorm, Norm, RMSNorm
from accessory.nn.packed import Packed
from accessory.nn.quantized import QuantizedTable
from accessory.nn.ragged import Ragged
from accessory.nn.rope import RopeScaling, table

if TYPE_CHECKING:
    from accessory.backbone.compiled import CompiledStep


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options. ``ffn_dim`` None applies Meta's rule; ``window`` is Mistral's; ``norm_offset``,
    ``embed_scale`` and ``activation`` are Gemma's; ``qkv_bias`` is Qwen's, with ``out_bias`` InternLM's; ``moe`` is
    Mixtral's; ``norm`` "layer", ``gated`` False, ``order`` and ``mlp_bias`` are Falcon's."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 32000
    ffn_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    max_length: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    window: int | None = None
    embed_scale: float | None = None
    activation: Activation = "silu"
    out_bias: bool = False
    mlp_bias: bool = False
    norm: Norm = "rms"
    gated: bool = True
    order: Order = "sequential"
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}; set head_dim")
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd; rotary embedding needs pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.norm == "layer" and self.norm_offset:
            raise ValueError(f"norm_offset {self.norm_offset} belongs to norm 'rms', not 'layer'")
        if self.moe is not None and not self.gated:
            raise ValueError("experts are gated: moe excludes gated=False")

    @property
    def kv_heads(self) -> int:
        """K: key/value heads (equal to the query heads where not stated)."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """A: width of one head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.ffn_dim or ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)


Tap = int | tuple[int, ...] | None


class Llama(nn.Module):
    """A sequence of vectors in, a sequence of vectors out: no ids, no images and no loss in :meth:`forward`.

    Slot ``output_kernel``: the tied table as output projection, packed (:mod:`accessory.backbone.fast`).
    Slot ``step``: the forward and :meth:`logits` for one more token, compiled (:mod:`accessory.backbone.compiled`).
    """

    tok_embeddings: nn.Embedding | QuantizedTable
    output: Linear | None
    output_kernel: Packed | None
    step: "CompiledStep | None"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(
            Block(
                Attention(c.dim, c.n_heads, c.kv_heads, c.head_width, c.qkv_bias, c.out_bias),
                _feed_forward(c),
                _norm(c),
                None if c.order == "parallel_one_norm" else _norm(c),
                parallel=c.order != "sequential",
            )
            for _ in range(c.n_layers)
        )
        self.norm = _norm(c)
        # Registered either way, so that "tied" is visible as a missing key and not as a second copy of the table.
        self.register_module("output", None if c.tie_embeddings else Linear(c.dim, c.vocab_size))
        self.register_module("output_kernel", None)
        self.step = None

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: (B, T) -> (B, T, D). Placeholders (negative ids) get row 0, to be overwritten."""
        x = self.tok_embeddings(ids.clamp_min(0))
        return x if self.config.embed_scale is None else x * torch.tensor(self.config.embed_scale, dtype=x.dtype)

    def logits(self, h: Tensor) -> Tensor:
        """Vocabulary scores of final states: (B, T, D) -> (B, T, V)."""
        if self.output is not None:
            return self.output(h)
        if isinstance(self.tok_embeddings, QuantizedTable):
            return self.tok_embeddings.kernel.joined(h)
        tied = self.tok_embeddings.weight
        if self.output_kernel is not None and self.output_kernel.fits(tied):
            return self.output_kernel(h)[0]
        return product(h, tied)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that the model computes in."""
        table = self.tok_embeddings
        return table.kernel.scales if isinstance(table, QuantizedTable) else table.weight

    def cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache of the right shape, dtype and device for ``batch`` rows of ``max_length`` positions."""
        w, c = self.like, self.config
        return KVCache(c.n_layers, batch, max_length, c.kv_heads, c.head_width, w.dtype, w.device)

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | Ragged | None = None,
        cache: KVCache | None = None,
        tap: int | None = None,
        context: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | Ragged | None = None,
        cache: KVCache | None = None,
        tap: tuple[int, ...],
        context: Tensor | None = None,
    ) -> tuple[Tensor, ...]: ...

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | Ragged | None = None,
        cache: KVCache | None = None,
        tap: Tap = None,
        context: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the blocks on (B, T, D).

        ``positions``: (B, T); by default they count on from the cache, and only real positions count when a ``mask``
        is given. ``mask``: True on real positions, (B, S) over cached and new positions, or a full boolean
        (B, 1, T, S) that replaces the causal rule; or the layout of sequences that share the row (1, T, D), to each of
        which a row of ``context`` belongs. ``tap``: None for final normed states; k for the un-normed output of block
        k (negative from the end; later blocks do not run); a tuple for several. ``context``: (B, M, D) tokens for the
        prefixes; a cache remembers them for the steps that follow.
        """
        t, past = x.shape[1], 0 if cache is None else cache.length
        if cache is not None:
            context = cache.context if context is None else context
            cache.context = context
        if positions is None:
            positions = default_positions(mask, past, t, x.device)
        c = self.config
        rope = table(positions.expand(x.shape[0], t), c.head_width, c.rope_theta, c.rope_scaling)
        if isinstance(mask, Ragged):
            if cache is not None:
                raise ValueError("sequences that share a row are read at once, without a cache")
            allowed: Tensor | Ragged | None = mask if mask.masks else isolated(mask, c.window)
        else:
            allowed = attention_mask(mask, past, t, c.window, x.device)
        wanted = tap_layers(tap, c.n_layers)
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.layers):
            if wanted and i > max(wanted):
                break
            x = block(x, rope, allowed, cache, i, context)
            if i in wanted:
                outputs[i] = x
        if cache is not None:
            cache.advance(t)
        if tap is None:
            return self.norm(x)
        return outputs[wanted[0]] if isinstance(tap, int) else tuple(outputs[i] for i in wanted)


def _norm(c: LlamaConfig) -> nn.Module:
    return LayerNorm(c.dim, c.norm_eps) if c.norm == "layer" else RMSNorm(c.dim, c.norm_eps, c.norm_offset)


def _feed_forward(c: LlamaConfig) -> nn.Module:
    if c.moe is None:
        return FeedForward(c.dim, c.hidden_width, c.activation, c.gated, c.mlp_bias)
    m = c.moe
    width = c.hidden_width
    return MoEFeedForward(c.dim, width, m.experts, m.top, c.dim, m.renormalise, c.activation, c.mlp_bias)


def tap_layers(tap: Tap, n_layers: int) -> tuple[int, ...]:
    """Block indices named by ``tap``, counted from the front.

    Raises:
        ValueError: for an index that the model does not have.
    """
    if tap is None:
        return ()
    layers = (tap,) if isinstance(tap, int) else tap
    for i in layers:
        if not -n_layers <= i < n_layers:
            raise ValueError(f"tap {i} is outside a model of {n_layers} blocks")
    return tuple(i % n_layers for i in layers)


def default_positions(mask: Tensor | Ragged | None, past: int, t: int, device: torch.device) -> Tensor:
    """Positions (1 or B, T) of ``t`` new tokens after ``past`` cached ones; padding does not count."""
    if isinstance(mask, Ragged):
        return mask.positions
    if mask is None or mask.ndim != 2:
        return torch.arange(past, past + t, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -t:]


def isolated(rows: Ragged, window: int | None) -> Ragged:
    """The layout with a sliding window where sequences are longer than it."""
    if window is None or max(rows.lengths) <= window:
        return rows
    return rows.masked(lambda _, t: attention_mask(None, 0, t, window, rows.mask.device))


def attention_mask(mask: Tensor | None, past: int, t: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean (1 or B, 1, T, past + T), or None where plain causal attention says the same."""
    if mask is not None and mask.ndim == 4:
        return mask
    s = past + t
    if mask is not None and mask.shape[1] != s:
        raise ValueError(f"mask covers {mask.shape[1]} positions, the sequence with its cache has {s}")
    windowed = window is not None and s > window
    if mask is None and not windowed and (past == 0 or t == 1):
        return None
    query = torch.arange(past, s, device=device)[:, None]
    key = torch.arange(s, device=device)[None]
    allowed = key <= query
    if windowed and window is not None:
        allowed &= key > query - window
    if mask is None:
        return allowed[None, None]
    # A padding query would see nothing and turn into NaN; it may see itself, and nobody reads it.
    return (allowed & mask[:, None, :] | (key == query))[:, None]
