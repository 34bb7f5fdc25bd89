"""Faster sampling with the same forward: the products of a FlagDiT packed for the CPU, fused where they share input."""

from __future__ import annotations

import torch
from torch import nn

from accessory.diffusion.dit_block import DiTAttention
from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed


@torch.no_grad()
def accelerate(model: nn.Module) -> nn.Module:
    """Fill the inference slots of ``model`` in place, and return it; its state dict does not change.

    Costs a second copy of the weights of the blocks, which is used only while gradients are off. A weight that is
    replaced or written later is noticed: its layer computes from the weight itself until this is called again.
    Call :func:`release` before moving the model to another device or dtype.
    """
    for module in list(model.modules()):
        if isinstance(module, DiTAttention) and _plain(module.wq, module.wk, module.wv):
            module.fused = Packed((module.wq.weight, module.wk.weight, module.wv.weight))
            module.wo.kernel = _packed(module.wo)
        elif isinstance(module, FeedForward) and _plain(module.w1, module.w3):
            module.fused = Packed((module.w1.weight, module.w3.weight))
            module.w2.kernel = _packed(module.w2)
    return model


def release(model: nn.Module) -> nn.Module:
    """Empty what :func:`accelerate` filled, in place, and give its memory back."""
    for module in model.modules():
        if isinstance(module, DiTAttention | FeedForward):
            module.fused = None
        elif isinstance(module, Linear):
            module.kernel = None
    return model


def _plain(*linears: object) -> bool:
    return all(type(linear) is Linear for linear in linears)


def _packed(linear: Linear) -> Packed | None:
    return Packed((linear.weight,)) if _plain(linear) else None
