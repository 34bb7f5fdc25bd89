"""Faster sampling with the same forward: the products of a FlagDiT packed for the CPU, fused where they share input."""

from __future__ import annotations

from torch import nn

from accessory.diffusion.dit_block import DiTAttention
from accessory.nn.packing import pack, unpack


def accelerate(model: nn.Module) -> nn.Module:
    """Fill the inference slots of ``model`` in place, and return it; its state dict does not change.

    Costs a second copy of the weights of the blocks, which is used only while gradients are off. A weight that is
    replaced or written later is noticed: its layer computes from the weight itself until this is called again.
    Call :func:`release` before moving the model to another device or dtype.
    """
    pack(model, DiTAttention)
    return model


def release(model: nn.Module) -> nn.Module:
    """Empty what :func:`accelerate` filled, in place, and give its memory back."""
    unpack(model, DiTAttention)
    return model
