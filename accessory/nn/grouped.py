"""Products of many small groups of rows, each with a weight of its own, as one call."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16  # bytes that the rows of both factors must be a multiple of, for the GPU's kernel


class _Joined(torch.autograd.Function):
    """E weights as one tensor: a view where they lie one behind the other in memory, a copy otherwise."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        first = weights[0]
        step = first.numel()
        storage = first.untyped_storage().data_ptr()
        if all(
            w.untyped_storage().data_ptr() == storage
            and w.storage_offset() == first.storage_offset() + i * step
            and w.is_contiguous()
            for i, w in enumerate(weights)
        ):
            return first.as_strided((len(weights), *first.shape), (step, *first.stride()))
        return torch.stack(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0].unbind(0)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """(E, out, in) of E weights (out, in), with gradients to each of them; no copy after :func:`lay_out`."""
    apply: Any = _Joined.apply
    result: Tensor = apply(*weights)
    return result


@torch.no_grad()
def lay_out(weights: Sequence[torch.nn.Parameter]) -> None:
    """Move E parameters of one shape into one block of memory, one behind the other; their values stay.

    Loading, optimiser steps and gradients in place keep them there; moving the model to another device or dtype
    does not, and then :func:`joined` copies again.
    """
    block = torch.stack([w.detach() for w in weights])
    for weight, place in zip(weights, block.unbind(0), strict=True):
        weight.data = place


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``W_e x`` for rows sorted by group: (N, in), (E, out, in) -> (N, out); ``counts`` (E) rows belong to each."""
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return product


def groupable(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether :func:`grouped_product` has a fast kernel: bf16 on a GPU, with rows of a width that it can read."""
    if not x.is_cuda or not hasattr(F, "grouped_mm"):
        return False
    wide = all(side * w.element_size() % ALIGNED == 0 for w in weights for side in w.shape)
    return wide and all(t.dtype == torch.bfloat16 for t in (x, *weights))
