"""Low-rank deltas (LoRA, Hu et al. 2021) and folding them into the weight they hang on."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.nn.linear import Linear, stated
from accessory.nn.quantized import Quantized

# Largest difference that folding may cause, relative to the largest output, by the dtype of the weight.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class LowRank(nn.Module):
    """``factor * B(A x)``: A (rank, in) is random, B (out, rank) starts at zero, so a fresh delta adds nothing.

    ``alpha`` None means no factor, as in LLaMA2-Accessory; otherwise the factor is ``alpha / rank`` as in the peft
    library. ``dropout`` acts on the input while training.

    Tensor parallelism sets ``between``, what the ranks do between A and B to meet, and ``cut_input``, (part, parts) of
    the input where each rank has its own.
    """

    between: Callable[[Tensor], Tensor] | None = None
    cut_input: tuple[int, int] | None = None

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {dropout}")
        self.a = nn.Linear(in_features, rank, bias=False)
        self.b = nn.Linear(rank, out_features, bias=False)
        self.factor = 1.0 if alpha is None else alpha / rank
        self.dropout = dropout
        nn.init.trunc_normal_(self.a.weight, std=0.02)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the dtype of ``x``, whatever the dtype of the parameters."""
        z = F.linear(self._dropped(x), self.a.weight.to(x.dtype))
        y = F.linear(z if self.between is None else self.between(z), self.b.weight.to(x.dtype))
        return y if self.factor == 1.0 else y * self.factor

    def _dropped(self, x: Tensor) -> Tensor:
        if self.cut_input is None or not self.training or not self.dropout:
            return F.dropout(x, self.dropout, self.training)
        # Ranks draw alike: each takes its part of the mask that one process would draw.
        part, parts = self.cut_input
        mask = F.dropout(x.new_ones(*x.shape[:-1], x.shape[-1] * parts), self.dropout)
        return x * mask.chunk(parts, -1)[part]

    def matrix(self) -> Tensor:
        """The delta as one (out, in) matrix in fp32 (or wider)."""
        dtype = torch.promote_types(self.a.weight.dtype, torch.float32)
        return self.factor * (self.b.weight.to(dtype) @ self.a.weight.to(dtype))


def refuse_quantized(linear: Linear, name: str) -> None:
    """ValueError where ``linear`` (called ``name``) has no floating point weight to fold into."""
    held = stated(linear)
    kind = held.kind if isinstance(held, Quantized) else str(held.dtype)
    if isinstance(held, Quantized) or not held.is_floating_point():
        raise ValueError(
            f"cannot fold into a quantised weight: {name} is kept as {kind}; keep the delta beside it, or dequantise "
            "the model first (peft.quantize.dequantize), which takes the memory of the full weights"
        )


@torch.no_grad()
def folded(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out) of the plain layer that computes what ``linear`` computes with its slots.

    Computed in fp32 and rounded once to the dtype of the weight.

    Raises:
        ValueError: when the delta is not a :class:`LowRank`, or the weight is not a floating point matrix.
    """
    refuse_quantized(linear, "it")
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    weight, bias = linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
    if linear.delta is not None:
        if not isinstance(linear.delta, LowRank):
            raise ValueError(f"cannot fold a delta of type {type(linear.delta).__name__}, only LowRank")
        weight = weight + linear.delta.matrix().to(dtype)
    if linear.scale is not None:
        scale = linear.scale.to(dtype)
        weight = weight * scale[:, None]
        bias = None if bias is None else bias * scale
    return weight.to(linear.weight.dtype), None if bias is None else bias.to(linear.weight.dtype)


@torch.no_grad()
def folding_error(linear: Linear) -> float:
    """Largest output difference that :func:`merge` would cause on a fixed random input, relative to the output."""
    width = linear.weight.shape[1]
    # A generator of the CPU: the input is the same on every device.
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    trained = copy.copy(linear.delta)
    if trained is not None:
        trained.training = False  # a copy of the module, not of its weights: no dropout during the comparison
    before = F.linear(x, linear.weight, None if linear.bias is None else linear.bias.to(x.dtype))
    if trained is not None:
        before = before + trained(x)
    if linear.scale is not None:
        before = before * linear.scale.to(x.dtype)
    weight, bias = folded(linear)
    difference = (F.linear(x, weight, bias) - before).abs().max() / before.abs().max().clamp_min(1e-30)
    return 0.0 if difference.is_meta else difference.item()  # a model without numbers is folded for its shapes


def merge(linear: Linear) -> float:
    """Fold ``delta`` and ``scale`` into weight and bias and empty the slots; return the relative difference caused.

    Raises:
        ValueError: when the folded layer would not compute the same (nothing is changed then).
    """
    error, limit = folding_error(linear), TOLERANCE[linear.weight.dtype]
    if not (math.isfinite(error) and error <= limit):
        raise ValueError(f"folding would change the outputs by {error:.2g} of their maximum, the limit is {limit:g}")
    weight, bias = folded(linear)
    # New parameters, not new values under the old ones: whoever keeps a packed copy must be able to notice, and the old
    # memory may be a read-only file.
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None and bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    linear.delta, linear.scale = None, None
    return error
