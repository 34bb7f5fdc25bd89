"""Mixture of experts: the same as computing all of them and weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.nn.moe import MoEFeedForward


def dense(layer: MoEFeedForward, x: Tensor, route: Tensor) -> Tensor:
    """Every expert at every token, weighted by a softmax in which all but the best logits are left out."""
    logits = layer.gate(route)
    threshold = logits.sort(-1, descending=True).values[..., layer.top - 1 : layer.top]
    weights = logits.masked_fill(logits < threshold, float("-inf")).softmax(-1)
    weights = weights if route.ndim == 3 else weights[:, None]
    return sum((weights[..., i : i + 1] * e(x) for i, e in enumerate(layer.experts)), torch.zeros(()))


def test_the_best_experts_are_weighted_by_their_own_softmax() -> None:
    layer = MoEFeedForward(8, 16, num_experts=5, top=2, route_dim=6)
    x = torch.randn(3, 7, 8, requires_grad=True)
    for route in (torch.randn(3, 7, 6), torch.randn(3, 6)):
        y = layer(x, route)
        torch.testing.assert_close(y, dense(layer, x, route))
        ours = torch.autograd.grad(y.square().sum(), [x, layer.gate.weight])
        theirs = torch.autograd.grad(dense(layer, x, route).square().sum(), [x, layer.gate.weight])
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_row_shares_its_experts_and_tokens_do_not() -> None:
    layer = MoEFeedForward(8, 16, num_experts=6, top=1, route_dim=8)
    x = torch.randn(1, 9, 8)
    used: set[int] = set()
    for i, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, i=i: used.add(i))
    layer(x, x[:, 0])
    assert len(used) == 1
    used.clear()
    layer(x, x)
    assert len(used) > 1
