"""Mixture-of-experts feed-forward layer (Shazeer et al. 2017), routed by whatever it is told to look at."""

import torch
from torch import Tensor, nn

from accessory.nn.feed_forward import FeedForward
from accessory.nn.linear import Linear


class MoEFeedForward(nn.Module):
    """The ``top`` experts of the largest router logits, weighted by a softmax over those logits alone.

    No capacity limit and no balancing loss, as in Mixtral and Next-DiT MoE.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top: int, route_dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(dim, hidden) for _ in range(num_experts))
        self.gate = Linear(route_dim, num_experts)
        self.top = top

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        ``route`` (B, T, R) chooses experts for every token, (B, R) for all tokens of a row together.
        """
        shared = route.ndim == 2
        # One row for every choice: (B, T, D) or (B * T, 1, D).
        rows = x if shared else x.flatten(0, 1)[:, None]
        logits = self.gate(route if shared else route.flatten(0, 1))
        best, chosen = logits.topk(self.top, dim=-1)
        weights = best.softmax(-1, dtype=torch.float32).to(x.dtype)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, rank = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                found = expert(rows[row]) * weights[row, rank, None, None]
                out = out.index_add(0, row, found.to(out.dtype))
        return out.view_as(x)
