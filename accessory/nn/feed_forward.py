"""The feed-forward layer: gated in the LLaMA family (SwiGLU, Shazeer 2020; GeGLU for Gemma), plain in Falcon."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.linear import Linear
from accessory.nn.packed import Packed
from accessory.nn.quantized import Quantized

Activation = Literal["silu", "gelu_tanh", "gelu"]


class FeedForward(nn.Module):
    """``w2(act(w1 x) * w3 x)``: w1 is the gate, w3 the up and w2 the down projection, as in Meta's naming.

    Without ``gated`` there is no w3, and the layer is ``w2(act(w1 x))``.
    Slot ``fused``: w1 and w3 as one product (``backbone.fast``).
    """

    w3: Linear | None
    fused: Packed | Quantized | None

    def __init__(
        self, dim: int, hidden: int, activation: Activation = "silu", gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias)
        self.w2 = Linear(hidden, dim, bias)
        self.register_module("w3", Linear(dim, hidden, bias) if gated else None)
        self.activation = activation
        self.register_module("fused", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        w1, w3, fused = self.w1, self.w3, self.fused
        if w3 is None:
            return self.w2(activate(w1(x), self.activation))
        if fused is not None and fused.fits(w1.weight, w3.weight):
            gate, up = fused.joined(x).chunk(2, dim=-1)
            gate, up = w1.finish(gate, x), w3.finish(up, x)
        else:
            gate, up = w1(x), w3(x)
        return self.w2(activate(gate, self.activation) * up)


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The non-linearity; ``gelu`` is the exact form, ``gelu_tanh`` the approximation that Gemma was trained with."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of 4 x dim, times ``multiplier``, rounded up to ``multiple_of``."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)
