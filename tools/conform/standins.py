"""Towers of the cases: the encoders that a case describes, or stand-ins with numbers of its own."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.models.published import LlamaType
from accessory.vision.mixture import Member, MixtureConfig, build_mixture
from accessory.vision.presets import PRESETS
from accessory.vision.tower import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Tower, VisionTokens
from accessory.vision.towers import TimmTower, open_clip_tower, transformers_tower

IO = dict[str, Tensor]


class Pooled(Tower):
    """Average-pooled pixels through an affine map, with the last batch it saw.

    ``name`` says which encoder it stands for: the grid, the class token and the width are that one's.
    """

    def __init__(self, name: str, size: int, io: IO) -> None:
        grid = {"convnext": (size // 32, size // 32), "qformer": (4, 8)}.get(name, (16, 16))
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if name == "dinov2" else (CLIP_MEAN, CLIP_STD)
        self.io = {k.rpartition(".")[2]: io.pop(k) for k in list(io) if k.startswith(f"in.standin.{name}.")}
        group = "qformer" if name == "qformer" else "visual"
        width = self.io["w"].shape[1]
        rows = (1, 32) if name == "qformer" else grid
        super().__init__(size, width, rows, mean, std, name in ("clip", "dinov2"), group)
        self.cells = grid
        self.seen: Tensor | None = None

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Row-major tokens of the pooled pixels (N,3,S,S)."""
        self.seen = pixels
        cells = F.adaptive_avg_pool2d(pixels, self.cells).flatten(2).transpose(1, 2)
        w, b = self.io["w"], self.io["b"]
        cls = None
        if self.has_cls:
            cls = cells.mean(1) @ self.io.get("w_cls", w) + self.io.get("b_cls", b)
        return VisionTokens(cls, cells @ w + b, self.grid)


class Given(Tower):
    """Whatever the picture, these tokens (N,P,C)."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(1, tokens.shape[2], (1, tokens.shape[1]), (0.0,) * 3, (1.0,) * 3, group="qformer")
        self.given = tokens

    def encode(self, pixels: Tensor) -> VisionTokens:
        """The tokens."""
        return VisionTokens(None, self.given[: len(pixels)], self.grid)


SHORT = {"openclip_convnext_xxl": "convnext", "dinov2_vitg14": "dinov2"}
"""What the cases call an encoder, by the prefix of its weights."""


def make_tower(config: dict[str, Any], row: LlamaType, io: IO) -> Tower:
    """The tower of a case, with random weights where it has real encoders."""
    preset = PRESETS[cast(str, row.tower)]
    if isinstance(preset, MixtureConfig):
        real = config.get("encoders")

        def make(member: Member) -> Tower:
            name, size = SHORT.get(member.name, member.name), member.config.size
            return Pooled(name, size, io) if real is None else _real(name, size, real, config)

        return build_mixture(preset, make)
    if "blip2_config" in config:
        return _qformer(config["blip2_config"]).eval()
    if row.encoders == ("qformer",):
        return Given(io.pop("in.qformer_last_hidden"))
    vision = config.get("clip_vision_cfg") or config["clip"]["vision"]
    embed = config.get("clip_embed_dim") or config["clip"]["embed"]
    quick = "quick_gelu" if config.get("clip_quick_gelu", True) else "gelu"
    return _clip(vision, embed, quick, projected=True).eval()


def _clip(vision: dict[str, Any], embed: int, activation: Any, projected: bool) -> Tower:
    found = {"embed_dim": embed, "vision_cfg": vision}
    return open_clip_tower("case", vision["image_size"], activation=activation, projected=projected, config=found)


def _qformer(found: dict[str, Any]) -> Tower:
    vision = dict(found["vision_config"])
    size = vision.pop("image_size")
    core, queries = found["qformer_config"], found["num_query_tokens"]
    return transformers_tower(
        "qformer", size, config=vision, qformer=core, num_queries=queries, group="qformer"
    )  # fmt: skip


def _real(name: str, size: int, real: dict[str, Any], config: dict[str, Any]) -> Tower:
    if name == "clip":
        quick = "quick_gelu" if config["clip_quick_gelu"] else "gelu"
        return _clip(real["clip"]["vision"], real["clip"]["embed"], quick, projected=False)
    if name == "qformer":
        return _qformer(real["blip2"])
    if name == "convnext":
        return TimmTower(
            "convnext_xxlarge", size, grid=(16, 16), mean=CLIP_MEAN, std=CLIP_STD, model_args=real["convnext"]
        )  # fmt: skip
    sizes = real["dinov2"]
    settings = {
        "hidden_size": sizes["embed_dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "mlp_ratio": 4,
        "patch_size": 14,
        "use_swiglu_ffn": True,
        "layer_norm_eps": 1e-6,
    }
    return transformers_tower("dinov2", size, config=settings)


def to_pixels(normalised: Tensor) -> Tensor:
    """The cases' pictures are normalised with CLIP's constants; ours are in [0, 1]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return normalised * std + mean


def from_pixels(pixels: Tensor) -> Tensor:
    """The inverse of :func:`to_pixels`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
