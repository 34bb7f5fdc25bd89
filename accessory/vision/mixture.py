"""Several encoders as one tower: joined on channels over a common grid, or as token groups of their own; and one tower
over several views of a picture, as SPHINX sees large ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accessory.vision.tower import TokenGroup, Tower, VisionTokens, bring_to, to_map, to_patches
from accessory.vision.towers import TowerConfig, build_tower

Resize = Literal["none", "nearest", "bicubic"]


@dataclass(frozen=True)
class Member:
    """One encoder of a mixture and how the common tile becomes its input.

    "none" asks for equal sizes; "nearest" and "bicubic" (no antialiasing) are what the published models used.
    ``name`` is the member's prefix in published checkpoints.
    """

    name: str
    config: TowerConfig
    resize: Resize = "none"


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture over pictures of side ``size``: ``channel`` members are joined on channels in this order, ``extra``
    members give token groups in front of the joined one. ``tiles`` and ``pool`` as in :class:`Mixture`."""

    size: int
    channel: tuple[Member, ...]
    extra: tuple[Member, ...] = ()
    tiles: int = 1
    pool: int = 1


class Mixture(Tower):
    """Towers over one picture, or over several views of it.

    ``channel`` towers are brought to the finest common grid by repeating cells and joined on channels, class tokens
    too; a tower without one lends the mean of its patches where another has one. ``extra`` towers are token groups
    named after their ``group``, in front. ``resize`` says per name how a view reaches a tower.

    With ``tiles`` k > 1 a picture is seen 1 + k*k times: whole, then cut into k rows of k parts (see
    :func:`cut_views`); every view gets the same groups, one view after the other. ``pool`` averages the patches of the
    parts over squares of that side, class and extra tokens stay.
    """

    def __init__(
        self,
        size: int,
        channel: dict[str, Tower],
        extra: dict[str, Tower] | None = None,
        resize: dict[str, Resize] | None = None,
        tiles: int = 1,
        pool: int = 1,
    ) -> None:
        extra = extra or {}
        towers = {**channel, **extra}
        if not channel or len(towers) != len(channel) + len(extra):
            raise ValueError(f"a mixture needs channel towers and distinct names, got {[*channel]} and {[*extra]}")
        if tiles < 1 or size % tiles:
            raise ValueError(f"tiles {tiles} must be at least 1 and divide the mixture's size {size}")
        grid = max((t.grid for t in channel.values()), key=lambda g: g[0] * g[1])
        if pool < 1 or grid[0] % pool or grid[1] % pool:
            raise ValueError(f"pool {pool} must be at least 1 and divide the grid {grid}")
        width = sum(t.width for t in channel.values())
        has_cls = any(t.has_cls for t in channel.values())
        # the members own the constants, so the mixture's are neutral
        super().__init__(size, width, grid, (0.0,) * 3, (1.0,) * 3, has_cls)
        self.tiles, self.pool = tiles, pool
        self.resize: dict[str, Resize] = {name: (resize or {}).get(name, "none") for name in towers}
        for name, tower in towers.items():
            _check_resize(name, self.resize[name], size // tiles, tower.size)
        for name, tower in channel.items():
            if grid[0] % tower.grid[0] or grid[1] % tower.grid[1]:
                raise ValueError(f"{name}'s grid {tower.grid} cannot be repeated to the common grid {grid}")
        self.channel, self.extra = tuple(channel), tuple(extra)
        self.members = nn.ModuleDict(towers)

    @property
    def views(self) -> int:
        """How often a picture is seen."""
        return 1 if self.tiles == 1 else 1 + self.tiles**2

    @property
    def groups(self) -> tuple[TokenGroup, ...]:
        """Of every view, the extra towers' groups, then the joined one, "visual"."""
        return tuple(group for view in self._views() for group in view)

    @property
    def runs(self) -> tuple[int, ...]:
        """Tokens of every view."""
        return tuple(sum(g.num_tokens for g in view) for view in self._views())

    def _views(self) -> list[tuple[TokenGroup, ...]]:
        extra = tuple(g for name in self.extra for g in self.member(name).groups)
        (joined,) = super().groups
        cells = self.grid[0] * self.grid[1] // self.pool**2
        part = replace(joined, num_tokens=cells + int(self.has_cls))
        return [(*extra, joined)] + [(*extra, part)] * (self.views - 1)

    def member(self, name: str) -> Tower:
        """A tower by its name."""
        found = self.members[name]
        assert isinstance(found, Tower)
        return found

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels as they are, in float32: each member normalises its own copy."""
        return pixels.float()

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Un-normalised pixels (N,3,S,S) to the joined tokens of all views, picture by picture: (N * views, ...)."""
        maps: list[Tensor] = []
        classes: list[Tensor] = []
        for name in self.channel:
            seen = self.member(name)(self._input(name, pixels))
            maps.append(bring_to(to_map(seen.patches, seen.grid), self.grid))
            classes.append(seen.patches.mean(dim=1) if seen.cls is None else seen.cls)
        cls = torch.cat(classes, dim=-1) if self.has_cls else None
        return VisionTokens(cls, to_patches(torch.cat(maps, dim=1)), self.grid)

    def tokens(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """One (N, tokens, width) tensor a group of :attr:`groups`."""
        self.check(pixels)
        raw, shape = pixels.float(), (pixels.shape[0], self.views)
        extra = [t for name in self.extra for t in self.member(name).tokens(self._input(name, raw))]
        extra = [t.unflatten(0, shape) for t in extra]
        joined = self(pixels)
        whole = joined.sequence().unflatten(0, shape)
        parts = whole if self.pool == 1 else self._pooled(joined).unflatten(0, shape)
        out: list[Tensor] = []
        for view in range(self.views):
            out += [t[:, view] for t in extra]
            out.append((parts if view else whole)[:, view])
        return tuple(out)

    def _pooled(self, seen: VisionTokens) -> Tensor:
        """The sequence over a grid that is ``pool`` times coarser."""
        patches = to_patches(F.avg_pool2d(to_map(seen.patches, seen.grid), self.pool))
        return replace(seen, patches=patches).sequence()

    def _input(self, name: str, pixels: Tensor) -> Tensor:
        """The views (N * views, 3, s, s) that a member takes, of pictures (N,3,S,S)."""
        rule, size = self.resize[name], self.member(name).size
        side = size if rule == "bicubic" else self.size // self.tiles
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, 3, size, size)
        views = cut_views(pixels, self.tiles, side)
        return views if side == size else F.interpolate(views, size=(size, size), mode="nearest")


def cut_views(pixels: Tensor, tiles: int, side: int) -> Tensor:
    """Views (N * V, 3, side, side) of pictures (N,3,S,S), picture by picture.

    V is 1 for one tile: the whole picture. Otherwise the whole picture and then ``tiles`` rows of as many parts of the
    picture at ``tiles * side`` pixels. Resizing is bicubic without antialiasing, as in the published models.
    """
    whole = _bicubic(pixels, side)
    if tiles == 1:
        return whole
    parts = _bicubic(pixels, tiles * side).unflatten(3, (tiles, side)).unflatten(2, (tiles, side))
    # (N, 3, rows, side, columns, side) -> (N, rows * columns, 3, side, side)
    parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([whole[:, None], parts], dim=1).flatten(0, 1)


def _bicubic(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)


def _check_resize(name: str, rule: str, size: int, wanted: int) -> None:
    if rule not in ("none", "nearest", "bicubic"):
        raise ValueError(f"resize rule {rule!r} of {name} is not one of 'none', 'nearest', 'bicubic'")
    if rule == "none" and size != wanted:
        raise ValueError(f"{name} takes tiles of {wanted}, the mixture has {size}: name a resize rule")


def build_mixture(config: MixtureConfig, make: Callable[[Member], Tower] | None = None) -> Mixture:
    """The mixture that a config describes, in eval mode, with random weights.

    ``make`` builds a member (by default what its config says).
    """
    members: Sequence[Member] = (*config.channel, *config.extra)
    if len({m.name for m in members}) != len(members):
        raise ValueError(f"members of a mixture need distinct names, got {[m.name for m in members]}")
    made = {m.name: build_tower(m.config) if make is None else make(m) for m in members}
    mixture = Mixture(
        config.size,
        {m.name: made[m.name] for m in config.channel},
        {m.name: made[m.name] for m in config.extra},
        {m.name: m.resize for m in members},
        config.tiles,
        config.pool,
    )
    return mixture.eval()
