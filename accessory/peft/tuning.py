"""Tuning in place: biases, scales, norms, and parameters named by a pattern (LLaMA-Adapter V2, section 3.1)."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from accessory.nn.linear import Linear, stated
from accessory.nn.norm import RMSNorm


def added_dtype(linear: Linear, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of what is hung on ``linear``: ``dtype`` if stated, else its weight's, fp32 on integer weights."""
    if dtype is not None:
        return dtype
    found = stated(linear).dtype
    return found if found.is_floating_point else torch.float32


def beside(linear: Linear) -> torch.device | None:
    """Where what is added to ``linear`` lies: on its device, or on the default one while its weight is on meta."""
    device = stated(linear).device
    return None if device.type == "meta" else device


def add_bias(linear: Linear, dtype: torch.dtype | None = None) -> bool:
    """Make the bias trainable, adding a zero one where the layer has none. Returns whether it was added."""
    if linear.bias is not None:
        linear.bias.requires_grad_(True)
        return False
    w = stated(linear)
    linear.bias = nn.Parameter(torch.zeros(w.shape[0], dtype=added_dtype(linear, dtype), device=beside(linear)))
    return True


def add_scale(linear: Linear, dtype: torch.dtype | None = None) -> None:
    """Fill the ``scale`` slot with trainable ones.

    Raises:
        ValueError: when the slot is taken.
    """
    if linear.scale is not None:
        raise ValueError("the layer already has a scale")
    w = stated(linear)
    linear.scale = nn.Parameter(torch.ones(w.shape[0], dtype=added_dtype(linear, dtype), device=beside(linear)))


def train_norms(module: nn.Module) -> int:
    """Make every parameter of every norm inside ``module`` trainable; returns how many."""
    norms = [m for m in module.modules() if isinstance(m, RMSNorm | nn.LayerNorm | nn.GroupNorm)]
    parameters = [p for norm in norms for p in norm.parameters()]
    for p in parameters:
        p.requires_grad_(True)
    return len(parameters)


def train_matching(model: nn.Module, patterns: Sequence[str]) -> int:
    """Make every parameter whose full name matches one of ``patterns`` (shell style) trainable; returns how many.

    Raises:
        ValueError: for a pattern that matches nothing, with the first parts of the names that exist.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in named if fnmatchcase(name, pattern)}
        if not matches:
            known = sorted({name.split(".")[0] for name in named})
            raise ValueError(f"pattern {pattern!r} matches no parameter; names begin with {', '.join(known)}")
        chosen |= matches
    for name in chosen:
        named[name].requires_grad_(True)
    return len(chosen)


def promote(net: nn.Module) -> None:
    """Keep what trains in fp32, so that a small step is not lost in bf16's eight bits."""
    for p in net.parameters():
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
