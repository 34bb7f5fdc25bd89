"""Root-mean-square normalisation (Zhang and Sennrich 2019), as LLaMA uses it, and layer normalisation."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["rms", "layer"]


class RMSNorm(nn.Module):
    """``x / rms(x) * (offset + weight)``, computed in fp32 and cast back before the weight, as in Meta's code.

    ``offset`` is 1 for Gemma, whose published weights are stored minus one, and whose product stays in fp32.
    """

    def __init__(self, dim: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D)."""
        width = (x.shape[-1],)
        if self.offset:
            return (F.rms_norm(x.float(), width, eps=self.eps) * (self.offset + self.weight.float())).to(x.dtype)
        # A half-precision input is normalised in fp32 inside the call, and comes back in its own dtype. A norm that
        # trains is fp32 in a bf16 model.
        return F.rms_norm(x, width, eps=self.eps) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with weight and bias, as in Falcon; a norm that trains may be fp32 in a bf16 model."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D)."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
