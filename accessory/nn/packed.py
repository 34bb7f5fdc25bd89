"""Weights laid out for the CPU's matrix kernels, for inference only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN chooses the layout for a number of rows; 8 was as good as any at 1, 64 and 512 rows, and twice as fast as
# unpacked weights (which are re-ordered at every call) at 8.
_ROWS = 8


class Packed(nn.Module):
    """``W x`` for one linear, or for several that read the same input as one product; no bias, no gradient.

    A copy of the weights, so it is valid only for the parameters it was made of, at the values they had:
    :meth:`fits` is False otherwise, and the caller computes from its own weights.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """``weights``: (out_i, in) each, on one device and of one dtype."""
        super().__init__()
        # In a tuple, so that they are not parameters of this module too.
        self._sources = tuple(weights)
        self._versions = tuple(w._version for w in weights)
        self.rows = [w.shape[0] for w in weights]
        joined = torch.cat([w.detach() for w in weights])
        self._opaque = packable(joined)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(joined, _ROWS) if self._opaque else joined

    def fits(self, *weights: Tensor) -> bool:
        """Whether this is the product of exactly these unchanged ``weights``, and no gradient is wanted."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False  # a compiler lays the product out itself
        for weight, source, version in zip(weights, self._sources, self._versions, strict=True):
            if weight is not source or weight._version != version:
                return False
        return True

    def joined(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., sum of out_i): the products side by side, ``rows`` wide each."""
        if self._opaque:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return F.linear(x, self._weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in) -> (..., out_i) for every weight."""
        y = self.joined(x)
        return (y,) if len(self.rows) == 1 else y.split(self.rows, dim=-1)


def packable(weight: Tensor) -> bool:
    """Whether oneDNN packs ``weight`` on this machine: on the CPU, in a dtype that it has kernels for."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
