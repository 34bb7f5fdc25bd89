"""Root-mean-square normalisation (Zhang and Sennrich 2019), as LLaMA uses it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        h = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        if self.offset:
            return (h * (self.offset + self.weight.float())).to(x.dtype)
        return h.to(x.dtype) * self.weight.to(x.dtype)  # a norm that trains is fp32 in a bf16 model
