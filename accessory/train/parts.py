"""Objectives of several parts: what they know before a window, how strongly each part pulls, and what rests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from accessory.parallel import groups
from accessory.parallel.layout import Layout
from accessory.schema import Batch


@runtime_checkable
class PartObjective(Protocol):
    """An objective whose parts have denominators of their own (tokens, pictures).

    ``window`` is told all micro-batches of an update before the first is computed, so that each part can be divided by
    its number over all of them and all ranks; ``parts`` are the weighted losses of the last call, still in its
    graph, the same names on every rank; their gradient norms are taken every ``norms_every`` updates (0: never).
    """

    parts: Mapping[str, Tensor]
    norms_every: int

    def window(self, batches: Sequence[Batch], device: torch.device) -> None: ...


@runtime_checkable
class RestingObjective(Protocol):
    """An objective that may leave some parameters out of an update altogether: ``resting`` names them, from the metrics
    of the update summed over all ranks."""

    def resting(self, sums: Mapping[str, float]) -> Sequence[str]: ...


class PartNorms:
    """Gradients of the parts, summed over the micro-batches of an update."""

    def __init__(self, parameters: Mapping[str, Tensor], layout: Layout) -> None:
        if layout.plan.data == "fsdp":
            raise ValueError("norms_every needs whole parameters on every data rank: set train.parallel.data to ddp")
        self._names, self._parameters, self._layout = list(parameters), list(parameters.values()), layout
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """After the forward pass of a micro-batch, before its backward pass."""
        for name, part in parts.items():
            found: Sequence[Any] = [None] * len(self._parameters)
            if part.requires_grad:
                found = torch.autograd.grad(part, self._parameters, retain_graph=True, allow_unused=True)
            sums = self._sums.setdefault(name, [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters])
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total.add_(gradient)

    def norms(self, count: float) -> dict[str, float]:
        """``grad_norm/PART`` of the gradients over all ranks, divided by ``count``."""
        found = {}
        for name, sums in self._sums.items():
            groups.all_reduce_many(sums)
            found[f"grad_norm/{name}"] = dict(zip(self._names, torch._foreach_norm(sums), strict=True))
        return {name: float(norm) / count for name, norm in self._layout.norms(found).items()}
