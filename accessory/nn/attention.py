"""Grouped-query attention with a slot for a zero-init prefix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.cache import KVCache
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed
from accessory.nn.quantized import Quantized
from accessory.nn.ragged import Ragged
from accessory.nn.rope import rotate

SHORT = 512 * 512  # most scores a head for which the explicit formula is not slower on a CPU


class Attention(nn.Module):
    """LLaMA's attention: H query heads share K key/value heads of width A.

    Slot ``prefix``: a module called as ``prefix(q, attention, context)`` with rotated queries (B, H, T, A) that returns
    (B, H, T, A), added before the output projection (``peft.prefix.ZeroInitPrefix``).
    Slot ``fused``: the query, key and value projections as one product (``backbone.fast``).
    Head counts are never stored: reshapes infer them, so a tensor-parallel rank runs the same code on its slice.
    """

    prefix: nn.Module | None
    fused: Packed | Quantized | None

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = Linear(dim, n_heads * head_dim, bias=qkv_bias)
        self.wk = Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wv = Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wo = Linear(n_heads * head_dim, dim, bias=out_bias)
        self.register_module("prefix", None)
        self.register_module("fused", None)

    def heads(self, x: Tensor) -> Tensor:
        """Split (B, T, heads * A) into (B, T, heads, A)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, A), keys and values (B, K, T, A) of (B, T, D); queries and keys are rotated."""
        wq, wk, wv, fused = self.wq, self.wk, self.wv, self.fused
        if fused is None or not fused.fits(wq.weight, wk.weight, wv.weight):
            q, k, v = wq(x), wk(x), wv(x)
        elif wq.bare and wk.bare and wv.bare:
            # Nothing stands between the product and the rotation, so queries and keys are turned as one tensor.
            joined = self.heads(fused.joined(x))
            h, n, _ = (rows // self.head_dim for rows in fused.rows)
            turned = rotate(joined[:, :, : h + n], rope).transpose(1, 2)
            return turned[:, :h], turned[:, h:], joined[:, :, h + n :].transpose(1, 2)
        else:
            q, k, v = fused(x)
            q, k, v = wq.finish(q, x), wk.finish(k, x), wv.finish(v, x)
        # (B, T, heads * A) -> (B, heads, T, A)
        q = rotate(self.heads(q), rope).transpose(1, 2)
        k = rotate(self.heads(k), rope).transpose(1, 2)
        return q, k, self.heads(v).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | Ragged | None,
        cache: KVCache | None = None,
        layer: int = 0,
        context: Tensor | None = None,
    ) -> Tensor:
        """Attend within (B, T, D) and the cached positions.

        ``rope``: complex (B, T, A/2). ``mask``: boolean, broadcastable to (B, H, T, S), True = may attend;
        None = plain causal from position 0, or a single newest query that sees everything; a layout of sequences in
        one row (1, T, D), for each of which ``context`` has a row.
        ``context``: (B, M, D) extra tokens for the prefix.
        """
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, mask)
        prefix = self.prefix
        if prefix is not None and context is not None and isinstance(mask, Ragged):
            y = y + mask.each(lambda group, q: prefix(q, self, context[group.rows]), q)
        elif prefix is not None:
            y = y + prefix(q, self, context)
        return self.wo(y.transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Ragged | None, causal: bool = True) -> Tensor:
    """Scaled dot-product attention of (B, H, T, A) over (B, K, S, A).

    ``mask`` None means causal (see above), or no mask at all where ``causal`` is False.
    """
    if isinstance(mask, Ragged):
        flash = mask.flash(q, k, v)
        return mask.each(lambda group, q, k, v: attend(q, k, v, group.mask), q, k, v) if flash is None else flash
    h, n = q.shape[1], k.shape[1]
    if q.shape[2] == 1 and h != n and (mask is None or mask.shape[1] == 1):
        # One query a head: the heads of a group become rows of one product, and their shared keys are read once.
        grouped = F.scaled_dot_product_attention(q.reshape(q.shape[0], n, h // n, -1), k, v, attn_mask=mask)
        return grouped.reshape(q.shape)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] > 1 and q.shape[2] * k.shape[2] <= SHORT:
        return explicit(q, k, v, mask, causal)
    causal = causal and mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=h != n)


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    """The same as :func:`attend` by its formula, with all scores in memory.

    In bf16 on a CPU the fused kernel costs more than these products for short sequences: at 32 rows of 36 tokens
    nearly three times as much forward and nine times as much with the backward pass.
    """
    b, h, t, a = q.shape
    n, s = k.shape[1], k.shape[2]
    g = h // n
    # (B, H, T, A) -> (B * K, G * T, A): the heads of a group share keys, so they are rows of one product.
    rows = (q * a**-0.5).reshape(b * n, g * t, a)
    scores = torch.bmm(rows, k.reshape(b * n, s, a).transpose(1, 2)).view(b, n, g, t, s)
    if mask is None and causal and t > 1:
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        # (B or 1, H or 1, T or 1, S) -> (B or 1, K or 1, G or 1, T or 1, S)
        scores = scores + (bias[:, :, None] if mask.shape[1] == 1 else bias.unflatten(1, (n, g)))
    weights = scores.softmax(-1).view(b * n, g * t, s)
    return torch.bmm(weights, v.reshape(b * n, s, a)).view(b, h, t, a)
