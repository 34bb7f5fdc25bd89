"""Trading compute for memory, and start-up time for speed, block by block. Parameter names do not change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only the input of each block for the backward pass and compute the rest again there."""
    for block in blocks:
        # An instance attribute instead of a wrapper module, so that state dicts keep their keys.
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block on its first call; equal blocks share the compiled code."""
    for block in blocks:
        block.compile(dynamic=True)
