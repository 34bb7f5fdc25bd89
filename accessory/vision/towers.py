"""Towers over the libraries that keep encoders: timm, open_clip, transformers. Built on random weights, never a hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accessory.vision.tower import Tower, VisionTokens, bring_to, to_patches


@dataclass(frozen=True)
class TowerConfig:
    """An encoder as data: the library, its name there, the tile side in pixels, and the wrapper's options."""

    kind: Literal["timm", "open_clip", "transformers"]
    name: str
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)


class TimmTower(Tower):
    """A timm model: maps of the stages ``indices`` brought to one grid and joined on channels.

    Convnets count stages as timm's ``feature_info`` does, vision transformers count blocks; negative counts from the
    end. ``grid`` defaults to the coarsest map's: finer maps are folded into channels, coarser ones repeated. Blocks
    after the last index and the classifier are dropped. ``norm`` applies the model's final norm and keeps it.
    A class token, where the model has one, is joined over the indices too; register tokens are left out.
    """

    def __init__(
        self,
        model: str | nn.Module,
        size: int,
        indices: Sequence[int] = (-1,),
        *,
        norm: bool = True,
        grid: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        group: str = "visual",
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            import timm

            model = timm.create_model(model, pretrained=False, **dict(model_args or {}))
        body: Any = model
        info = [dict(i) for i in body.feature_info]
        taken = [_absolute(i, len(info)) for i in indices]
        maps = [_map_size(size, info[i]["reduction"]) for i in taken]
        goal = grid or (min(maps), min(maps))
        width = sum(_joined_width(info[i]["num_chs"], side, goal) for i, side in zip(taken, maps, strict=True))
        cfg = body.pretrained_cfg
        transformer = "return_prefix_tokens" in inspect.signature(body.forward_intermediates).parameters
        has_cls = transformer and getattr(body, "cls_token", None) is not None
        if has_cls and width != sum(info[i]["num_chs"] for i in taken):
            raise ValueError(f"grid {goal} folds the patches of a model with a class token, whose width would differ")
        super().__init__(size, width, goal, mean or cfg["mean"], std or cfg["std"], has_cls, group)
        self.indices, self.norm, self.transformer = tuple(taken), norm, transformer
        body.prune_intermediate_layers(taken, prune_norm=not norm, prune_head=True)
        head_norm = getattr(getattr(body, "head", None), "norm", None)
        if head_norm is not None and (not norm or max(taken) != len(info) - 1):
            body.head.norm = nn.Identity()
        # CPU convolutions train about 1.4x faster in this layout
        self.model = body if transformer else body.to(memory_format=torch.channels_last)
        self.train()  # a fresh timm model's batch norm would still move its statistics

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Normalised pixels (N,3,S,S) to tokens."""
        order = sorted(set(self.indices))
        extra: dict[str, Any] = {"return_prefix_tokens": True} if self.transformer else {}
        if not self.transformer:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        found = self.model.forward_intermediates(
            pixels, indices=order, norm=self.norm, stop_early=True, intermediates_only=True, **extra
        )
        found = [f if isinstance(f, tuple) else (f, None) for f in found]
        by_index = dict(zip(order, found, strict=True))
        if self.norm and not self.transformer:
            last = order[-1]
            by_index[last] = (self._head_norm(by_index[last][0]), None)
        x = torch.cat([bring_to(by_index[i][0], self.grid) for i in self.indices], dim=1)
        cls = torch.cat([by_index[i][1][:, 0] for i in self.indices], dim=-1) if self.has_cls else None
        if x.shape[1:] != (self.width, *self.grid):
            raise ValueError(f"the model gave maps {tuple(x.shape)}, expected (N, {self.width}, {self.grid})")
        return VisionTokens(cls, to_patches(x), self.grid)

    def _head_norm(self, x: Tensor) -> Tensor:
        """ConvNeXt keeps its last norm inside the classifier head, after the pooling that is not done here."""
        norm = getattr(getattr(self.model, "head", None), "norm", None)
        return x if norm is None else norm(x)


def _absolute(index: int, count: int) -> int:
    if not -count <= index < count:
        raise ValueError(f"index {index} is outside the model's {count} feature stages")
    return index % count


def _map_size(size: int, reduction: int) -> int:
    if size % reduction:
        raise ValueError(f"tile side {size} is no multiple of {reduction}, the stride of a chosen stage")
    return size // reduction


def _joined_width(channels: int, side: int, goal: tuple[int, int]) -> int:
    """Channels after :func:`bring_to`; checked here on shapes alone, so a bad grid fails at construction."""
    return bring_to(torch.empty(1, channels, side, side, device="meta"), goal).shape[1]


def build_tower(config: TowerConfig) -> Tower:
    """The tower that a config describes, in eval mode, with random weights; nothing is downloaded."""
    options = dict(config.options)
    if config.kind == "timm":
        return TimmTower(config.name, config.size, **options).eval()
    raise ValueError(f"tower kind {config.kind!r} is not one of 'timm', 'open_clip', 'transformers'")
