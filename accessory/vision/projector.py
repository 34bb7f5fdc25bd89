"""From the encoders' widths to the backbone's, and the learned vectors that stand around or for a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.vision.tower import TokenGroup

Kind = Literal["linear_norm", "mlp", "linear"]


class Projector(nn.Module):
    """Projects each token group and joins them: (N, T_tile, D).

    Parameters are named ``<group>_proj.<n>``, so that group "visual" under "linear_norm" has SPHINX's names.
    ``skip`` (D) stands for a blank tile; ``start_img`` and ``end_img`` (D) exist only with ``start_end``.
    """

    def __init__(
        self, groups: Sequence[TokenGroup], dim: int, kind: Kind = "linear_norm", start_end: bool = False
    ) -> None:
        super().__init__()
        names = [g.name for g in groups]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"token groups need distinct names and at least one, got {names}")
        self.groups, self.dim, self.kind, self.start_end = tuple(groups), dim, kind, start_end
        for group in groups:
            self.add_module(f"{group.name}_proj", _projection(group.width, dim, kind))
        self.skip = nn.Parameter(torch.randn(dim) * 0.02)
        if start_end:
            self.start_img = nn.Parameter(torch.randn(dim) * 0.02)
            self.end_img = nn.Parameter(torch.randn(dim) * 0.02)

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile, without start and end."""
        return sum(g.num_tokens for g in self.groups)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """One (N, tokens, width) tensor a group, in group order, to (N, T_tile, D); ValueError on other shapes."""
        if len(tokens) != len(self.groups):
            raise ValueError(f"got {len(tokens)} token groups, the projector has {[g.name for g in self.groups]}")
        out = []
        for group, x in zip(self.groups, tokens, strict=True):
            if tuple(x.shape[1:]) != (group.num_tokens, group.width):
                want = f"(N, {group.num_tokens}, {group.width})"
                raise ValueError(f"token group {group.name!r} has shape {tuple(x.shape)}, expected {want}")
            layer = self.get_submodule(f"{group.name}_proj")
            out.append(layer(x.to(self.skip.dtype)))
        return torch.cat(out, dim=1)


def _projection(width: int, dim: int, kind: Kind) -> nn.Sequential:
    if kind == "linear_norm":
        return nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, dim))
    raise ValueError(f"projector kind {kind!r} is not one of 'linear_norm', 'mlp', 'linear'")
