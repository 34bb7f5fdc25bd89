"""Encoders by name."""

from __future__ import annotations

from accessory.vision.tower import Tower
from accessory.vision.towers import TowerConfig, build_tower

_LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # the published weights want (255x - 127) / 128

PRESETS: dict[str, TowerConfig] = {
    # the last map (320 channels, stride 32) beside the stride-16 map folded 2x2 (448): 16 tokens of 768 a tile
    "efficientnet-lite0": TowerConfig(
        "timm", "tf_efficientnet_lite0", 128, {"indices": (-1, -2), "norm": False, "group": "visual", **_LITE}
    ),
}
"""What a config file may name."""


def build(config: str | TowerConfig) -> Tower:
    """A tower with random weights from a preset's name or a config; ValueError lists the names for an unknown one."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"vision preset {config!r} is not one of {', '.join(sorted(PRESETS))}")
        config = PRESETS[config]
    return build_tower(config)
