"""One pre-norm transformer block, its two halves in turn or side by side."""

from typing import Literal

from torch import Tensor, nn

from accessory.nn.cache import KVCache
from accessory.nn.ragged import Ragged

Order = Literal["sequential", "parallel", "parallel_one_norm"]
"""``parallel`` has a norm for each half (Falcon 40B), ``parallel_one_norm`` one for both (Falcon 7B)."""


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``+ feed_forward(norm(x))``. Receives built modules; knows no sizes.

    ``parallel``: both halves read ``x`` itself; then ``ffn_norm`` may be None, and the feed-forward layer reads what
    attention reads.
    """

    ffn_norm: nn.Module | None

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        attention_norm: nn.Module,
        ffn_norm: nn.Module | None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        if ffn_norm is None and not parallel:
            raise ValueError("a block without a norm of its own for the feed-forward layer must be parallel")
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.register_module("ffn_norm", ffn_norm)
        self.parallel = parallel

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | Ragged | None,
        cache: KVCache | None = None,
        layer: int = 0,
        context: Tensor | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); arguments as in :class:`accessory.nn.attention.Attention`."""
        normed = self.attention_norm(x)
        attended = x + self.attention(normed, rope, mask, cache, layer, context)
        if self.ffn_norm is None:
            return attended + self.feed_forward(normed)
        return attended + self.feed_forward(self.ffn_norm(x if self.parallel else attended))
