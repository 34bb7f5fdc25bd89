"""Towers over the libraries that keep encoders: timm, open_clip, transformers. Built on random weights, never a hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accessory.vision.tower import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Tower,
    VisionTokens,
    bring_to,
    to_patches,
)


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
        cfg = getattr(body, "pretrained_cfg", None) or {}
        mean, std = mean or cfg.get("mean"), std or cfg.get("std")
        if mean is None or std is None:
            raise ValueError(f"{type(body).__name__} does not say its mean and std: give both")
        transformer = "return_prefix_tokens" in inspect.signature(body.forward_intermediates).parameters
        has_cls = transformer and getattr(body, "cls_token", None) is not None
        if has_cls and width != sum(info[i]["num_chs"] for i in taken):
            raise ValueError(f"grid {goal} folds the patches of a model with a class token, whose width would differ")
        super().__init__(size, width, goal, mean, std, has_cls, group)
        self.indices, self.norm, self.transformer = tuple(taken), norm, transformer
        head_norm = getattr(getattr(body, "head", None), "norm", None)
        body.prune_intermediate_layers(taken, prune_norm=not norm, prune_head=True)
        if head_norm is not None:  # timm drops it with the classifier
            body.head.norm = head_norm if norm and max(taken) == len(info) - 1 else nn.Identity()
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


class OpenClipTower(Tower):
    """A CLIP vision transformer of open_clip: every token after ``ln_post``, unprojected unless ``projected``.

    ``visual`` is open_clip's VisionTransformer; it is run through its own ``forward_intermediates``, which knows
    whether its blocks take the batch first (feeding it the other way round lets pictures attend to each other).
    Without ``projected`` its unused output projection is dropped.
    """

    def __init__(
        self,
        visual: nn.Module,
        *,
        projected: bool = False,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        group: str = "visual",
    ) -> None:
        body: Any = visual
        rows, cols = body.grid_size
        size = int(body.image_size[0])
        if tuple(body.image_size) != (size, size):
            raise ValueError(f"the vision transformer takes {tuple(body.image_size)}, tiles are square")
        if body.attn_pool is not None:
            raise ValueError("a vision transformer with attention pooling has no tokens after its last norm")
        width = body.proj.shape[1] if projected else body.ln_post.weight.shape[0]
        super().__init__(size, width, (rows, cols), mean, std, True, group)
        if not projected:
            body.proj = None
        self.projected = projected
        self.model = body

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Normalised pixels (N,3,S,S) to class token and patches."""
        found = self.model.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        cls, patches = found["image_intermediates_prefix"][-1][:, 0], found["image_intermediates"][-1]
        if self.projected:
            cls, patches = cls @ self.model.proj, patches @ self.model.proj
        return VisionTokens(cls, patches, self.grid)


def open_clip_tower(
    name: str,
    size: int,
    *,
    activation: Literal["gelu", "quick_gelu"] | None = None,
    projected: bool = False,
    config: Mapping[str, Any] | None = None,
    group: str = "visual",
    **timm_options: Any,
) -> Tower:
    """The vision half of an open_clip model: its transformer, or its timm trunk (ConvNeXt) with the last norm.

    ``activation`` None means what open_clip's config says; OpenAI's weights want "quick_gelu" whatever the config
    says. ``config`` is a config of open_clip's form in place of a named one. ``timm_options`` go to a trunk's
    :class:`TimmTower`.
    """
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    found = dict(config) if config is not None else open_clip.get_model_config(name)
    if found is None:
        raise ValueError(f"open_clip has no model {name!r}")
    if activation not in (None, "gelu", "quick_gelu"):
        raise ValueError(f"activation {activation!r} is not 'gelu' or 'quick_gelu'")
    cfg = CLIPVisionCfg(**{**found["vision_cfg"], "image_size": size})
    if cfg.timm_model_name:
        if activation == "quick_gelu" or projected:
            raise ValueError(f"{name!r} has a timm trunk: it has neither quick_gelu nor a projection of its tokens")
        options = {"mean": CLIP_MEAN, "std": CLIP_STD, "norm": True, "group": group, **timm_options}
        return TimmTower(cfg.timm_model_name, size, **options)
    if timm_options:
        raise ValueError(f"options {sorted(timm_options)} are for timm trunks, {name!r} is a vision transformer")
    quick = bool(found.get("quick_gelu", False)) if activation is None else activation == "quick_gelu"
    visual = _build_vision_tower(found["embed_dim"], cfg, quick_gelu=quick)
    return OpenClipTower(visual, projected=projected, group=group)


class QFormer(nn.Module):
    """BLIP-2's vision model, learned queries and Q-Former, without its language model; Blip2Model's key names."""

    def __init__(self, vision: nn.Module, qformer: nn.Module, num_queries: int) -> None:
        super().__init__()
        core: Any = qformer
        self.vision_model = vision
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, core.config.hidden_size))
        self.qformer = qformer

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N,3,S,S) to the queries' last hidden state (N,Q,C)."""
        seen = self.vision_model(pixel_values=pixels, return_dict=True).last_hidden_state
        queries = self.query_tokens.expand(seen.shape[0], -1, -1)
        mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        out = self.qformer(
            query_embeds=queries, encoder_hidden_states=seen, encoder_attention_mask=mask, return_dict=True
        )
        found: Tensor = out.last_hidden_state
        return found


class TransformersTower(Tower):
    """A vision model of transformers: Dinov2Model, SiglipVisionModel, or a :class:`QFormer`.

    DINOv2 gives a class token and patches, SigLIP patches, a Q-Former its queries as one row of "patches". The
    model's position table must be the tile's own size: ``weights.resize_positions`` brings a published one there.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float], group: str = "visual") -> None:
        body: Any = model
        if isinstance(model, QFormer):
            config, width = body.vision_model.config, body.query_tokens.shape[-1]
            grid, has_cls = (1, body.query_tokens.shape[1]), False
        else:
            config = body.config
            side = config.image_size // config.patch_size
            width, grid, has_cls = config.hidden_size, (side, side), hasattr(body.embeddings, "cls_token")
        super().__init__(config.image_size, width, grid, mean, std, has_cls, group)
        self.model = body

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Normalised pixels (N,3,S,S) to tokens, after the model's last norm."""
        if isinstance(self.model, QFormer):
            return VisionTokens(None, self.model(pixels), self.grid)
        x = self.model(pixel_values=pixels, return_dict=True).last_hidden_state
        return VisionTokens(x[:, 0], x[:, 1:], self.grid) if self.has_cls else VisionTokens(None, x, self.grid)


def transformers_tower(
    name: str,
    size: int,
    *,
    config: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
    num_queries: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    group: str = "visual",
) -> TransformersTower:
    """``name`` "dinov2", "siglip" or "qformer", over transformers' config classes filled from ``config``.

    For "qformer", ``config`` describes the vision model and ``qformer`` the Q-Former. The default mean and std are
    those of the published models: ImageNet's, 0.5, CLIP's.
    """
    values = {**(config or {}), "image_size": size}
    model: nn.Module
    if name == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        model, constants = Dinov2Model(Dinov2Config(**values)), (IMAGENET_MEAN, IMAGENET_STD)
    elif name == "siglip":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        model = SiglipVisionModel(SiglipVisionConfig(**{"vision_use_head": False, **values}))
        constants = ((0.5,) * 3, (0.5,) * 3)
    elif name == "qformer":
        from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

        vision = Blip2VisionModel(Blip2VisionConfig(**values))
        core = {"encoder_hidden_size": vision.config.hidden_size, **(qformer or {})}
        model = QFormer(vision, Blip2QFormerModel(Blip2QFormerConfig(**core)), num_queries)
        constants = (CLIP_MEAN, CLIP_STD)
    else:
        raise ValueError(f"transformers tower {name!r} is not one of 'dinov2', 'siglip', 'qformer'")
    return TransformersTower(model, mean=mean or constants[0], std=std or constants[1], group=group)


def build_tower(config: TowerConfig) -> Tower:
    """The tower that a config describes, in eval mode, with random weights; nothing is downloaded."""
    options = dict(config.options)
    if config.kind == "timm":
        return TimmTower(config.name, config.size, **options).eval()
    if config.kind == "open_clip":
        return open_clip_tower(config.name, config.size, **options).eval()
    if config.kind == "transformers":
        return transformers_tower(config.name, config.size, **options).eval()
    raise ValueError(f"tower kind {config.kind!r} is not one of 'timm', 'open_clip', 'transformers'")
