"""One pre-norm transformer block."""

from torch import Tensor, nn

from accessory.nn.cache import KVCache


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``+ feed_forward(norm(x))``. Receives built modules; knows no sizes."""

    def __init__(
        self, attention: nn.Module, feed_forward: nn.Module, attention_norm: nn.Module, ffn_norm: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
        context: Tensor | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); arguments as in :class:`accessory.nn.attention.Attention`."""
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer, context)
        return x + self.feed_forward(self.ffn_norm(x))
