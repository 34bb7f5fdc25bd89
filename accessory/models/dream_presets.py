"""Bridges by name. Sizes are rows of data; nothing here is code of its own."""

from __future__ import annotations

from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream_config import DreamConfig, Residual, TapConfig
from accessory.models.dream_spans import NullPolicy

PRESETS: dict[str, DreamConfig] = {
    # 64 queries, final normed states at them, one linear layer to SD 2.1's 1024 channels; no condition was ever dropped
    "dreamllm": DreamConfig(
        num_queries=64,
        tap=TapConfig(layers=(None,), positions="queries"),
        connector=ConnectorConfig(kind="linear", width=1024, bias=False),
        joint=True,
        drop=NullPolicy(all=0.0),
    ),
    # 77 queries of the adapter itself read the prompt's states; sequence and pooled vector of SDXL
    "chatillusion": DreamConfig(
        num_queries=0,
        tap=TapConfig(layers=(None,), positions="prompt"),
        connector=ConnectorConfig(kind="gen_adapter", width=2048, depth=2, heads=64, num_tokens=77),
        heads=HeadsConfig(sequence="mlp", width=2048, pooled=1280),
    ),
    # Starts as the plain text encoder of a denoiser that was trained on final normed states (Flag-DiT of Lumina-T2I;
    # residual.tap -2 for Lumina-Next), and learns what queries and earlier layers add. Wants at least 25 blocks.
    "default": DreamConfig(
        num_queries=64,
        tap=TapConfig(layers=(-1, -7, -13, -19, -25), mix="softmax", norm=True, positions="both"),
        connector=ConnectorConfig(kind="encoder", width=512, depth=4, heads=8),
        heads=HeadsConfig(sequence="linear", zero_init=True),
        residual=Residual(tap=None),
        hide_queries_from_future=True,
    ),
}
"""What a config file may name; ``null_ids`` and ``trigger`` come from the tokenizer at hand."""


def preset(name: str) -> DreamConfig:
    """A bridge by name; ValueError lists the names for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"dream preset {name!r} is not one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
