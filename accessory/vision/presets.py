"""Encoders by name. Sizes are rows of data; nothing here is code of its own."""

from __future__ import annotations

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
    # 289 tokens: 32 + 257 of 5632. CLIP runs with GELU as the published code does; its training may have used
    # QuickGELU, so "activation" is worth an A/B on those weights
    "sphinx": MixtureConfig(
        224, (_CLIP, Member("openclip_convnext_xxl", _convnext(256), "nearest"), _DINO), (_QFORMER,)
    ),
    # 257 tokens of 4608
    "sphinx-light": MixtureConfig(512, (Member("openclip_convnext_xxl", _convnext(512)), _resized(_DINO))),
    # 289 tokens, the four encoders over 512-pixel tiles
    "sphinx-moe": MixtureConfig(
        512,
        (_resized(_CLIP), Member("openclip_convnext_xxl", _convnext(512)), _resized(_DINO)),
        (_resized(_QFORMER),),
    ),
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


def build(config: str | TowerConfig | MixtureConfig) -> Tower:
    """A tower in eval mode with random weights from a preset's name or a config.

    ValueError lists the names for an unknown one. Under ``torch.device("meta")`` even the full presets build at once.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"vision preset {config!r} is not one of {', '.join(sorted(PRESETS))}")
        config = PRESETS[config]
    return build_mixture(config) if isinstance(config, MixtureConfig) else build_tower(config)
