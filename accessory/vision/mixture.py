"""Several encoders as one tower: joined on channels over a common grid, or as token groups of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """A mixture over tiles of side ``size``: ``channel`` members are joined on channels in this order, ``extra``
    members give token groups in front of the joined one."""

    size: int
    channel: tuple[Member, ...]
    extra: tuple[Member, ...] = ()


class Mixture(Tower):
    """Towers over one tile.

    ``channel`` towers are brought to the finest common grid by repeating cells and joined on channels, class tokens
    too; a tower without one lends the mean of its patches where another has one. ``extra`` towers are token groups
    named after their ``group``, in front. ``resize`` says per name how the tile reaches a tower.
    """

    def __init__(
        self,
        size: int,
        channel: dict[str, Tower],
        extra: dict[str, Tower] | None = None,
        resize: dict[str, Resize] | None = None,
    ) -> None:
        extra = extra or {}
        towers = {**channel, **extra}
        if not channel or len(towers) != len(channel) + len(extra):
            raise ValueError(f"a mixture needs channel towers and distinct names, got {[*channel]} and {[*extra]}")
        grid = max((t.grid for t in channel.values()), key=lambda g: g[0] * g[1])
        width = sum(t.width for t in channel.values())
        has_cls = any(t.has_cls for t in channel.values())
        # the members own the constants, so the mixture's are neutral
        super().__init__(size, width, grid, (0.0,) * 3, (1.0,) * 3, has_cls)
        self.resize: dict[str, Resize] = {name: (resize or {}).get(name, "none") for name in towers}
        for name, tower in towers.items():
            _check_resize(name, self.resize[name], size, tower.size)
        for name, tower in channel.items():
            if grid[0] % tower.grid[0] or grid[1] % tower.grid[1]:
                raise ValueError(f"{name}'s grid {tower.grid} cannot be repeated to the common grid {grid}")
        self.channel, self.extra = tuple(channel), tuple(extra)
        self.members = nn.ModuleDict(towers)

    @property
    def groups(self) -> tuple[TokenGroup, ...]:
        """The extra towers' groups, then the joined one, "visual"."""
        return (*(g for name in self.extra for g in self.member(name).groups), *super().groups)

    def member(self, name: str) -> Tower:
        """A tower by its name."""
        found = self.members[name]
        assert isinstance(found, Tower)
        return found

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels as they are, in float32: each member normalises its own copy."""
        return pixels.float()

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Un-normalised pixels (N,3,S,S) to the joined tokens, without the extra groups."""
        maps: list[Tensor] = []
        classes: list[Tensor] = []
        for name in self.channel:
            seen = self.member(name)(self._input(name, pixels))
            maps.append(bring_to(to_map(seen.patches, seen.grid), self.grid))
            classes.append(seen.patches.mean(dim=1) if seen.cls is None else seen.cls)
        cls = torch.cat(classes, dim=-1) if self.has_cls else None
        return VisionTokens(cls, to_patches(torch.cat(maps, dim=1)), self.grid)

    def tokens(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """One (N, tokens, width) tensor a group: the extra ones, then the joined one."""
        self.check(pixels)
        raw = pixels.float()
        extra = [t for name in self.extra for t in self.member(name).tokens(self._input(name, raw))]
        return (*extra, self(pixels).sequence())

    def _input(self, name: str, pixels: Tensor) -> Tensor:
        rule, size = self.resize[name], self.member(name).size
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, 3, size, size)
        if rule == "none" or size == self.size:
            return pixels
        if rule == "nearest":
            return F.interpolate(pixels, size=(size, size), mode="nearest")
        return F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)


def _check_resize(name: str, rule: str, size: int, wanted: int) -> None:
    if rule not in ("none", "nearest", "bicubic"):
        raise ValueError(f"resize rule {rule!r} of {name} is not one of 'none', 'nearest', 'bicubic'")
    if rule == "none" and size != wanted:
        raise ValueError(f"{name} takes tiles of {wanted}, the mixture has {size}: name a resize rule")


def build_mixture(config: MixtureConfig) -> Mixture:
    """The mixture that a config describes, in eval mode, with random weights."""
    members: Sequence[Member] = (*config.channel, *config.extra)
    if len({m.name for m in members}) != len(members):
        raise ValueError(f"members of a mixture need distinct names, got {[m.name for m in members]}")
    mixture = Mixture(
        config.size,
        {m.name: build_tower(m.config) for m in config.channel},
        {m.name: build_tower(m.config) for m in config.extra},
        {m.name: m.resize for m in members},
    )
    return mixture.eval()
