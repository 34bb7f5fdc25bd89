"""Filling a network's inference slots: products packed for the CPU, fused where they share an input."""

from typing import Any

import torch
from torch import nn

from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed


@torch.no_grad()
def pack(model: nn.Module, attention: type[nn.Module]) -> None:
    """Fill the slots of every layer of the class ``attention`` (wq wk wv wo, ``fused``) and of every feed-forward.

    Weights of classes other than :class:`Linear` (tensor parallel, quantised) are left alone.
    """
    for module in list(model.modules()):
        layer: Any = module  # its class decides what it has
        if isinstance(module, attention) and _plain(layer.wq, layer.wk, layer.wv):
            layer.fused = Packed((layer.wq.weight, layer.wk.weight, layer.wv.weight))
            layer.wo.kernel = packed(layer.wo)
        elif isinstance(module, FeedForward) and module.w3 is None:
            module.w1.kernel, module.w2.kernel = packed(module.w1), packed(module.w2)
        elif isinstance(module, FeedForward) and module.w3 is not None and _plain(module.w1, module.w3):
            module.fused = Packed((module.w1.weight, module.w3.weight))
            module.w2.kernel = packed(module.w2)


def unpack(model: nn.Module, attention: type[nn.Module]) -> None:
    """Empty what :func:`pack` filled, and the slots of single linears."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, (attention, FeedForward)):
            layer.fused = None
        elif isinstance(module, Linear):
            module.kernel = None


def packed(linear: Linear) -> Packed | None:
    """The packed product of a plain linear, None for any other class."""
    return Packed((linear.weight,)) if _plain(linear) else None


def _plain(*linears: object) -> bool:
    return all(type(linear) is Linear for linear in linears)
