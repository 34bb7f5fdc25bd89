"""The one linear layer: a weight, and the slots that tuning methods fill."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.packed import Packed
from accessory.nn.quantized import Quantized


class Linear(nn.Linear):
    """``y = scale * (W x + b + delta(x))`` where ``scale`` and ``delta`` are empty slots until something is attached.

    The slots are registered here and not declared as class attributes: a class attribute of the same name would
    shadow a sub-module that is assigned later, and the layer would silently ignore it.

    ``delta``: any module mapping (..., in_features) to (..., out_features), e.g. ``peft.lora.LowRank``.
    ``scale``: a parameter (out_features) or None (LLaMA-Adapter V2's scale tuning).
    ``kernel``: another way to compute ``W x``: packed, without gradients (``backbone.fast`` fills it), or quantised
    (``peft.quantize``), in which case ``weight`` is None.
    """

    delta: nn.Module | None
    scale: nn.Parameter | None
    kernel: Packed | Quantized | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_module("delta", None)
        self.register_parameter("scale", None)
        self.register_module("kernel", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        kernel = self.kernel
        if kernel is not None and kernel.fits(self.weight):
            return self.finish(kernel.joined(x), x)
        # What tuning adds may be kept in fp32 on a bf16 layer, so it is cast on use.
        y = product(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        return self._adapt(y, x)

    @property
    def bare(self) -> bool:
        """Whether the output is ``W x`` and nothing else."""
        return self.bias is None and self.delta is None and self.scale is None

    def plain(self, x: Tensor) -> Tensor:
        """``W x`` alone, whatever bias, delta or scale the layer has."""
        kernel = self.kernel
        return kernel.joined(x) if kernel is not None and kernel.fits(self.weight) else product(x, self.weight)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The output for input ``x`` from a product ``y = W x`` that was computed elsewhere."""
        return self._adapt(y if self.bias is None else y + self.bias.to(y.dtype), x)

    def _adapt(self, y: Tensor, x: Tensor) -> Tensor:
        if self.delta is not None:
            y = y + self.delta(x)
        if self.scale is not None:
            y = y * self.scale.to(y.dtype)
        return y


def stated(linear: Linear) -> Tensor | Quantized:
    """What states shape (out, in), dtype and device of a linear: its weight, or the kernel that stands for it."""
    weight: Tensor | None = linear.weight
    if weight is not None:
        return weight
    assert isinstance(linear.kernel, Quantized)
    return linear.kernel


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``W x + b``: (..., in) -> (..., out).

    While a graph for a CPU is traced, the product of a single vector is spelled as the sum that it is: the compiler
    makes a loop of it that reads the weights at memory speed, which the matrix kernels do not reach for one row.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    # as_strided keeps the compiler from computing the vector (a norm, a gate) anew for every row of the weight.
    row = x.float().as_strided(x.shape[-1:], (1,))
    y = (weight.float() * row).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias
