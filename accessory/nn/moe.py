"""Mixture-of-experts feed-forward layer (Shazeer et al. 2017), routed by whatever it is told to look at."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from accessory.nn.feed_forward import Activation, FeedForward, activate
from accessory.nn.grouped import groupable, grouped_product, joined, lay_out
from accessory.nn.linear import Linear


@dataclass(frozen=True)
class MoEConfig:
    """Experts of every feed-forward layer of a language model.

    ``top`` of them are used for each token, weighted by a softmax over all router logits of which these are taken and
    (``renormalise``, as in Mixtral) divided by their sum. ``balance`` and ``z`` are the weights of :func:`balance_loss`
    and :func:`z_loss` in training, each a mean over the layers.
    """

    experts: int = 8
    top: int = 2
    renormalise: bool = True
    balance: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.experts:
            raise ValueError(f"moe.top is {self.top}, it must be between 1 and moe.experts = {self.experts}")
        if self.balance < 0 or self.z < 0:
            raise ValueError(f"moe.balance {self.balance} and moe.z {self.z} may not be negative")


class Routing(NamedTuple):
    """What one layer decided for N tokens: router logits (N, E), experts (N, top) and their weights (N, top)."""

    logits: Tensor
    chosen: Tensor
    weights: Tensor


class MoEFeedForward(nn.Module):
    """The ``top`` experts of the largest router logits, weighted by a softmax over those logits alone.

    No capacity limit: every token reaches its experts, as in Mixtral and Next-DiT MoE. Tokens are sorted by expert, so
    that each expert sees one block of rows; where the hardware has a kernel for it (bf16 on a GPU, nothing hung on the
    experts), all of them are one grouped product. Without ``renormalise`` the softmax is over all logits. With
    ``run_idle`` (FSDP sets it) an expert runs on no rows too: its gradient is then zero and not missing, so that ranks
    on which others are idle reduce the same tensors.
    """

    run_idle: bool = False

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top: int,
        route_dim: int,
        renormalise: bool = True,
        activation: Activation = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(dim, hidden, activation, bias=bias) for _ in range(num_experts))
        self.gate = Linear(route_dim, num_experts)
        self.top = top
        self.renormalise = renormalise
        self.activation = activation
        self.log: list[Routing] | None = None  # filled inside of :func:`routings`

    def forward(self, x: Tensor, route: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        ``route`` (B, T, R) chooses experts for every token, (B, R) for all tokens of a row together; None is ``x``.
        """
        route = x if route is None else route
        rows = x.flatten(0, 1)
        logits = self.gate(route.flatten(0, -2))  # (N, E), N choices
        best, chosen = logits.topk(self.top, dim=-1)
        if self.renormalise:  # the same as a softmax over all logits, divided by the sum of those that were taken
            weights = best.softmax(-1, dtype=torch.float32)
        else:
            weights = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
        if self.log is not None:
            self.log.append(Routing(logits, chosen, weights))
        if route.ndim == 2:  # one choice for the T tokens of a row
            chosen, weights = (t.repeat_interleave(x.shape[1], 0) for t in (chosen, weights))
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        found = self._experts(rows[order // self.top], counts)
        # Back into the order of the tokens, (B * T, top, D), without an addition whose order could vary.
        found = found[order.argsort()].unflatten(0, (-1, self.top))
        return (found * weights.to(found.dtype)[..., None]).sum(1).to(x.dtype).view_as(x)

    def _experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(N, D) sorted by expert, ``counts`` (E) for each, through their experts."""
        if self.grouped(rows):
            w1, w2, w3 = (joined(self.weights(name)) for name in ("w1", "w2", "w3"))
            hidden = activate(grouped_product(rows, w1, counts), self.activation) * grouped_product(rows, w3, counts)
            return grouped_product(hidden, w2, counts)
        parts = rows.split(counts.tolist())
        idle = self.run_idle and torch.is_grad_enabled()
        found = [expert(part) for expert, part in zip(self.experts, parts) if idle or len(part)]
        return torch.cat(found) if found else rows

    def weights(self, name: str) -> list[nn.Parameter]:
        """The weights ``name`` of all experts."""
        return [expert.get_submodule(name).get_parameter("weight") for expert in self.experts]

    def linears(self) -> list[Linear]:
        """The linears of all experts."""
        return [getattr(expert, name) for expert in self.experts for name in ("w1", "w2", "w3")]

    def grouped(self, rows: Tensor) -> bool:
        """Whether all experts can be computed as one product for ``rows`` (N, D)."""
        linears = self.linears()
        plain = all(type(linear) is Linear and linear.bare for linear in linears)
        weights = [linear.weight for linear in linears]
        return plain and all(w is not None for w in weights) and groupable(rows, weights)  # quantised ones have none


def lay_out_experts(model: nn.Module) -> None:
    """Put the experts of every layer of ``model`` side by side in memory, so that grouped products copy nothing.

    Quantised experts are computed one by one, and stay where they are.
    """
    for module in model.modules():
        if isinstance(module, MoEFeedForward) and all(m.weight is not None for m in module.linears()):
            for name in ("w1", "w2", "w3"):
                lay_out(module.weights(name))


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect what the expert layers of ``model`` decide in forward passes inside of the block, in their order.

    A block that activation checkpointing computes again in the backward pass, outside, is not counted twice.
    """
    layers = [m for m in model.modules() if isinstance(m, MoEFeedForward)]
    log: list[Routing] = []
    for layer in layers:
        layer.log = log
    try:
        yield log
    finally:
        for layer in layers:
            layer.log = None


def balance_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """``E / (N k) * sum_e count_e * mean_e`` (Fedus et al. 2021, section 2.2; Mixtral in LLaMA2-Accessory).

    ``count_e``: tokens that were given to expert e, ``mean_e``: its mean probability over the N tokens; 1 where both
    are even. ``mask`` (N): True on the tokens that count.
    """
    logits, chosen = (t if mask is None else t[mask] for t in routing[:2])
    experts = logits.shape[1]
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    means = logits.softmax(-1, dtype=torch.float32).mean(0)
    return (counts * means).sum() * experts / chosen.numel()


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean square of the log of the router's normaliser (Zoph et al. 2022, equation 5), which keeps logits small."""
    logits = routing.logits if mask is None else routing.logits[mask]
    return logits.float().logsumexp(-1).square().mean()


def router_loss(config: MoEConfig, log: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """What routing adds to the loss of a batch: both losses with their weights, each a mean over the layers.

    Raises:
        ValueError: when no layer reported.
    """
    if not log:
        raise ValueError("no expert layer reported its routing; was the model computed inside of routings()?")
    parts = [config.balance * balance_loss(r, mask) + config.z * z_loss(r, mask) for r in log]
    return torch.stack(parts).mean()
