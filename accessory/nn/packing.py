"""Filling a network's inference slots: products packed for the CPU, fused where they share an input."""

from typing import Any

import torch
from torch import nn

from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed
from accessory.nn.quantized import Quantized, join


@torch.no_grad()
def pack(model: nn.Module, attention: type[nn.Module]) -> None:
    """Fill the slots of every layer of the class ``attention`` (wq wk wv wo, ``fused``) and of every feed-forward.

    Quantised weights are re-ordered for the kernels of this machine and joined likewise. Layers of classes other than
    :class:`Linear` (tensor parallel) are left alone.
    """
    for module in model.modules():
        if isinstance(module, Quantized):
            module.optimize()
    for module in list(model.modules()):
        layer: Any = module  # its class decides what it has
        if isinstance(module, attention) and _plain(layer.wq, layer.wk, layer.wv):
            layer.fused = Packed((layer.wq.weight, layer.wk.weight, layer.wv.weight))
            layer.wo.kernel = packed(layer.wo) or layer.wo.kernel
        elif isinstance(module, attention) and layer.fused is None:
            layer.fused = _joined(layer.wq, layer.wk, layer.wv)
        elif isinstance(module, FeedForward):
            _pack_feed_forward(module)


def _pack_feed_forward(module: FeedForward) -> None:
    w1, w2, w3 = module.w1, module.w2, module.w3
    if w3 is None:
        w1.kernel, w2.kernel = packed(w1) or w1.kernel, packed(w2) or w2.kernel
    elif _plain(w1, w3):
        module.fused = Packed((w1.weight, w3.weight))
        w2.kernel = packed(w2) or w2.kernel
    elif module.fused is None:
        module.fused = _joined(w1, w3)


def unpack(model: nn.Module, attention: type[nn.Module]) -> None:
    """Empty what :func:`pack` filled, and the slots of single linears."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, (attention, FeedForward)):
            layer.fused = None
        elif isinstance(module, Quantized):
            module.release()
        elif isinstance(module, Linear) and isinstance(module.kernel, Packed):
            module.kernel = None


def packed(linear: Linear) -> Packed | None:
    """The packed product of a plain linear, None for any other class and where the weight is quantised."""
    return Packed((linear.weight,)) if _plain(linear) else None


def _joined(*linears: Linear) -> Quantized | None:
    kernels = [linear.kernel for linear in linears]
    quantized = [k for k in kernels if isinstance(k, Quantized)]
    return join(quantized) if len(quantized) == len(kernels) else None


def _plain(*linears: object) -> bool:
    return all(type(linear) is Linear and not isinstance(linear.kernel, Quantized) for linear in linears)
