"""Encoders by name. Sizes are rows of data; nothing here is code of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from accessory.vision.mixture import Member, MixtureConfig, build_mixture
from accessory.vision.tower import CLIP_MEAN, CLIP_STD, Tower
from accessory.vision.towers import TowerConfig, build_tower

_LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # the published weights want (255x - 127) / 128

_DINO_G = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "mlp_ratio": 4,
    "patch_size": 14,
    "use_swiglu_ffn": True,
    "layer_norm_eps": 1e-6,
}
_BLIP_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_CLIP = Member("clip", TowerConfig("open_clip", "ViT-L-14", 224, {"activation": "gelu"}))
_DINO = Member("dinov2_vitg14", TowerConfig("transformers", "dinov2", 224, {"config": _DINO_G}))
_QFORMER = Member("qformer", TowerConfig("transformers", "qformer", 224, {"config": _BLIP_VISION, "group": "qformer"}))


def _convnext(size: int) -> TowerConfig:
    return TowerConfig("open_clip", "convnext_xxlarge", size, {"grid": (16, 16)})


def _resized(member: Member) -> Member:
    return Member(member.name, member.config, "bicubic")


_CONVNEXT_224 = Member("openclip_convnext_xxl", _convnext(256), "nearest")
_CONVNEXT_512 = Member("openclip_convnext_xxl", _convnext(512))
_SPHINX = MixtureConfig(224, (_CLIP, _CONVNEXT_224, _DINO), (_QFORMER,))
_PLUS = MixtureConfig(224, (_CONVNEXT_224, _DINO))
_LIGHT = MixtureConfig(512, (_CONVNEXT_512, _resized(_DINO)))
_MOE = MixtureConfig(512, (_resized(_CLIP), _CONVNEXT_512, _resized(_DINO)), (_resized(_QFORMER),))

_TINY_VIT = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
}
_TINY_CONVNEXT = {
    "model_args": {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 20)},
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
}
_TINY_QFORMER = {
    "config": {**_TINY_VIT, "intermediate_size": 24},
    "qformer": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "num_queries": 3,
    "group": "qformer",
}

PRESETS: dict[str, TowerConfig | MixtureConfig] = {
    # the last map (320 channels, stride 32) beside the stride-16 map folded 2x2 (448): 16 tokens of 768 a tile
    "efficientnet-lite0": TowerConfig(
        "timm", "tf_efficientnet_lite0", 128, {"indices": (-1, -2), "norm": False, "group": "visual", **_LITE}
    ),
    # OpenAI's weights were trained with QuickGELU
    "clip-l": TowerConfig("open_clip", "ViT-L-14", 224, {"activation": "quick_gelu"}),
    # the same after CLIP's own projection to 768, as `llama`, `llama_peft` and `llama_adapter` read it
    "clip-l-projected": TowerConfig("open_clip", "ViT-L-14", 224, {"activation": "quick_gelu", "projected": True}),
    # OpenCLIP's, which is ImageBind's own encoder of pictures (Girdhar et al. 2023, section 3.2); its class token is
    # their vector of a picture
    "clip-h-projected": TowerConfig("open_clip", "ViT-H-14", 224, {"projected": True}),
    # 32 tokens of 768
    "blip2": _QFORMER.config,
    # 289 tokens: 32 + 257 of 5632
    "sphinx": _SPHINX,
    # five and ten views, 289 tokens each
    "sphinx-1k": replace(_SPHINX, size=448, tiles=2),
    "sphinx-2k": replace(_SPHINX, size=672, tiles=3),
    # the parts at half the resolution: 289 and four times 97 tokens
    "sphinx-1k-pooled": replace(_SPHINX, size=448, tiles=2, pool=2),
    # 257 tokens of 4608, and five views of them
    "sphinx-light": _LIGHT,
    "sphinx-light-1k": replace(_LIGHT, size=1024, tiles=2),
    # SPHINX-X's two encoders over one tile of 224, which lets the data leave blank tiles out; and over all views of a
    # picture, as SPHINX-Plus and -Intern2 see one that fills its square
    "sphinx-x": _PLUS,
    "sphinx-plus": replace(_PLUS, size=448, tiles=2),
    "sphinx-plus-2k": replace(_PLUS, size=672, tiles=3),
    # 289 tokens, the four encoders over 512-pixel tiles
    "sphinx-moe": _MOE,
    "sphinx-moe-1k": replace(_MOE, size=1024, tiles=2),
    "tiny": TowerConfig("timm", "convnext_atto", 64, _TINY_CONVNEXT),
    "tiny-lite": TowerConfig("timm", "tf_efficientnet_lite0", 64, {"indices": (1, 0), "norm": False, **_LITE}),
    "tiny-clip": TowerConfig("open_clip", "tiny", 32, {"config": _TINY_CLIP}),
    "tiny-sphinx": MixtureConfig(
        32,
        (
            Member("clip", TowerConfig("open_clip", "tiny", 32, {"config": _TINY_CLIP})),
            Member("openclip_convnext_xxl", TowerConfig("timm", "convnext_atto", 64, _TINY_CONVNEXT), "nearest"),
            Member("dinov2_vitg14", TowerConfig("transformers", "dinov2", 32, {"config": _TINY_VIT})),
        ),
        (Member("qformer", TowerConfig("transformers", "qformer", 32, _TINY_QFORMER)),),
    ),
}
"""What a config file may name. The ``tiny-`` ones are for tests: same shapes of code, random weights, milliseconds."""


Activation = Literal["gelu", "quick_gelu"]


Config = TowerConfig | MixtureConfig


def find(config: str | Config, activation: Activation | None = None) -> Config:
    """A config by its preset's name, or the config itself; ``activation`` replaces that of its CLIP.

    OpenAI's CLIP was trained with QuickGELU (x * sigmoid(1.702 x)). LLaMA2-Accessory's single-CLIP models and SPHINX up
    to November 2023 ran it so; later code, which is what reads the released SPHINX files, builds CLIP with GELU and
    fills in the same weights. The presets say what the published code does with the published files: QuickGELU in
    ``clip-l*``, GELU in ``sphinx*``. Which one a SPHINX file was trained with is not recorded: try both on it.

    Raises:
        ValueError: listing the names for an unknown one, or for an ``activation`` where there is no CLIP.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"vision preset {config!r} is not one of {', '.join(sorted(PRESETS))}")
        config = PRESETS[config]
    if activation is None:
        return config
    if isinstance(config, TowerConfig):
        return _activated(config, activation)
    if not any(m.name == "clip" for m in config.channel):
        raise ValueError(f"activation {activation!r} is for CLIP, which this mixture lacks")
    members = [replace(m, config=_activated(m.config, activation)) if m.name == "clip" else m for m in config.channel]
    return replace(config, channel=tuple(members))


def _activated(config: TowerConfig, activation: Activation) -> TowerConfig:
    if config.kind != "open_clip" or "grid" in config.options:
        raise ValueError(f"activation {activation!r} is for a CLIP transformer, the tower is {config.name!r}")
    return replace(config, options={**config.options, "activation": activation})


def build(config: str | Config, activation: Activation | None = None, bgr: bool = False) -> Tower:
    """A tower in eval mode with random weights from a preset's name or a config, see :func:`find`; ``bgr`` is that of
    :class:`accessory.vision.tower.Tower`.

    Under ``torch.device("meta")`` even the full presets build at once.
    """
    config = find(config, activation)
    tower = build_mixture(config) if isinstance(config, MixtureConfig) else build_tower(config)
    for part in tower.modules():
        if isinstance(part, Tower):
            part.bgr = bgr
    return tower
