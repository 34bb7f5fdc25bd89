"""From the encoders' widths to the backbone's, and the learned vectors that stand around or for a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.vision.tower import TokenGroup

Kind = Literal["linear_norm", "mlp", "linear"]


class VisualWords(nn.Module):
    """One token a tile: the mean of a learned table's rows, weighted by how well each fits the whole tile.

    A linear classifier over the tile's mean token gives the weights, so a language model reads what it shows as a word
    of its own: the structural alignment of visual and textual embeddings of Ovis (Lu et al. 2024) for one pooled token.
    ``sharpness`` multiplies the logits: a picture unlike those of the training is still shown as one word rather than a
    blend of many, which no language model can read.
    """

    def __init__(self, width: int, dim: int, num_words: int, sharpness: float = 1.0) -> None:
        super().__init__()
        if sharpness <= 0:
            raise ValueError(f"sharpness of visual words must be positive, got {sharpness}")
        self.sharpness = sharpness
        self.head = nn.Linear(width, num_words)
        self.table = nn.Parameter(torch.randn(num_words, dim) * 0.02)

    def scores(self, tokens: Tensor) -> Tensor:
        """Logits (N, num_words) of tower tokens (N, P, width)."""
        return self.head(tokens.to(self.table.dtype).mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, P, width) to (N, 1, D)."""
        return ((self.scores(tokens) * self.sharpness).softmax(-1) @ self.table)[:, None]


class Projector(nn.Module):
    """Projects each token group and joins them: (N, T_tile, D). Groups of one name share a projection.

    With ``words`` > 0 a last token follows, :class:`VisualWords` over the first group. Parameters are named
    ``<group>_proj.<n>``, so that group "visual" under "linear_norm" has SPHINX's names.
    ``skip`` (D) stands for a blank tile; ``start_img`` and ``end_img`` (D) exist only with ``start_end``.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        dim: int,
        kind: Kind = "linear_norm",
        start_end: bool = False,
        words: int = 0,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        widths = {g.name: g.width for g in groups}
        if not widths or any(g.width != widths[g.name] for g in groups):
            said = [(g.name, g.width) for g in groups]
            raise ValueError(f"a projector needs token groups, and groups of one name one width, got {said}")
        if words < 0:
            raise ValueError(f"words must not be negative, got {words}")
        self.groups, self.dim, self.kind, self.start_end = tuple(groups), dim, kind, start_end
        for name, width in widths.items():
            self.add_module(f"{name}_proj", _projection(width, dim, kind))
        self.words = VisualWords(groups[0].width, dim, words, sharpness) if words else None
        self.skip = nn.Parameter(torch.randn(dim) * 0.02)
        if start_end:
            self.start_img = nn.Parameter(torch.randn(dim) * 0.02)
            self.end_img = nn.Parameter(torch.randn(dim) * 0.02)

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile, without start and end."""
        return self.num_projected + int(self.words is not None)

    @property
    def num_projected(self) -> int:
        """Those that are projected one by one; they come first."""
        return sum(g.num_tokens for g in self.groups)

    def runs(self, runs: Sequence[int]) -> tuple[int, ...]:
        """Positions of every view of a tile, for the ``runs`` of its tower."""
        return (*runs[:-1], runs[-1] + int(self.words is not None))

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """One (N, tokens, width) tensor a group, in group order, to (N, T_tile, D); ValueError on other shapes."""
        if len(tokens) != len(self.groups):
            raise ValueError(f"got {len(tokens)} token groups, the projector has {[g.name for g in self.groups]}")
        same: dict[str, list[Tensor]] = {}
        for group, x in zip(self.groups, tokens, strict=True):
            if tuple(x.shape[1:]) != (group.num_tokens, group.width):
                want = f"(N, {group.num_tokens}, {group.width})"
                raise ValueError(f"token group {group.name!r} has shape {tuple(x.shape)}, expected {want}")
            same.setdefault(group.name, []).append(x)
        projected = {}  # all views of a group in one product
        for name, views in same.items():
            x = views[0] if len(views) == 1 else torch.cat(views, dim=1)
            y: Tensor = self.get_submodule(f"{name}_proj")(x.to(self.skip.dtype))
            projected[name] = iter(y.split([v.shape[1] for v in views], dim=1))
        out = [next(projected[group.name]) for group in self.groups]
        if self.words is not None:
            out.append(self.words(tokens[0]))
        return torch.cat(out, dim=1)


def _projection(width: int, dim: int, kind: Kind) -> nn.Sequential:
    if kind == "linear_norm":
        return nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, dim))
    raise ValueError(f"projector kind {kind!r} is not one of 'linear_norm', 'mlp', 'linear'")
