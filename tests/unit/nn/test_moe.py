"""Mixture of experts: the same as computing all of them and weighting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from accessory.nn import moe
from accessory.nn.grouped import joined
from accessory.nn.moe import (
    MoEConfig,
    MoEFeedForward,
    balance_loss,
    lay_out_experts,
    router_loss,
    routings,
    z_loss,
)


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


def test_without_renormalising_the_rest_of_the_softmax_is_lost() -> None:
    layer = MoEFeedForward(8, 16, num_experts=5, top=2, route_dim=8, renormalise=False)
    x = torch.randn(2, 3, 8)
    weights = layer.gate(x).softmax(-1)
    kept = weights.masked_fill(weights < weights.sort(-1, descending=True).values[..., 1:2], 0)
    expected = sum((kept[..., i : i + 1] * e(x) for i, e in enumerate(layer.experts)), torch.zeros(()))
    torch.testing.assert_close(layer(x), expected)
    layer.renormalise = True
    assert not torch.allclose(layer(x), expected)


@pytest.mark.parametrize("together", [False, True])
def test_one_grouped_product_is_the_loop(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    layer = MoEFeedForward(8, 16, num_experts=6, top=2, route_dim=8)
    with torch.no_grad():
        layer.gate.weight[3] -= 1e3 * torch.ones(8)  # an expert that nobody asks (for inputs that are positive)
    if together:
        lay_out_experts(layer)
    x = torch.rand(2, 7, 8, requires_grad=True)
    inputs = [x, *layer.parameters()]
    loop = layer(x)
    before = torch.autograd.grad(loop.square().sum(), inputs, allow_unused=True)
    monkeypatch.setattr(moe, "groupable", lambda x, weights: True)  # a GPU has a fast kernel, a CPU has one that works
    y = layer(x)
    torch.testing.assert_close(y, loop)
    after = torch.autograd.grad(y.square().sum(), inputs)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, atol=1e-5, rtol=1e-4)
    assert before[[n for n, _ in layer.named_parameters()].index("experts.3.w1.weight") + 1] is None
    # what hangs on an expert is not in the joint product, so the loop computes it
    layer.experts[0].w1.scale = torch.nn.Parameter(torch.full((16,), 3.0))
    assert not layer.grouped(x)
    assert not torch.allclose(layer(x), y)


def test_experts_that_lie_together_are_joined_without_a_copy() -> None:
    layer = MoEFeedForward(8, 16, num_experts=3, top=1, route_dim=8)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    assert joined(layer.weights("w1")).data_ptr() != layer.weights("w1")[0].data_ptr()
    lay_out_experts(layer)
    assert joined(layer.weights("w1")).data_ptr() == layer.weights("w1")[0].data_ptr()
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    with torch.no_grad():
        layer.weights("w1")[2].fill_(7.0)  # an optimiser's step is seen
    assert bool((joined(layer.weights("w1"))[2] == 7).all())
    layer.load_state_dict(state)
    assert torch.equal(joined(layer.weights("w1"))[2], state["experts.2.w1.weight"])


def test_the_balancing_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    routing = moe.Routing(logits, logits.argmax(-1, keepdim=True), torch.ones(3, 1))
    p = torch.tensor(2.0).sigmoid()
    first = (2 * p + (1 - p)) / 3  # mean probability of the first expert, which has two of the three tokens
    torch.testing.assert_close(balance_loss(routing), 2 / 3 * (2 * first + (1 - first)))
    assert balance_loss(routing, torch.tensor([True, False, True])) == pytest.approx(1.0)  # even
    even = z_loss(routing)
    torch.testing.assert_close(even, torch.log(torch.tensor(2.0).exp() + 1).square())
    config = MoEConfig(2, 1, balance=0.5, z=0.25)
    both = router_loss(config, [routing, routing])
    torch.testing.assert_close(both, 0.5 * balance_loss(routing) + 0.25 * even)
    with pytest.raises(ValueError, match="inside of routings"):
        router_loss(config, [])
    with pytest.raises(ValueError, match="top is 3"):
        MoEConfig(2, 3)


def test_a_checkpointed_block_reports_once() -> None:
    layer = MoEFeedForward(8, 16, num_experts=4, top=2, route_dim=8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        with routings(layer) as log:
            y = run(x)
        loss = y.square().sum() + router_loss(MoEConfig(4, 2, balance=1.0, z=1.0), log)
        gradients.append(torch.autograd.grad(loss, [x, layer.gate.weight]))
        assert len(log) == 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    layer(x)
    assert len(log) == 1
    assert layer.log is None


def test_no_tokens_are_no_error() -> None:
    layer = MoEFeedForward(8, 16, num_experts=4, top=2, route_dim=8)
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
