"""Dialogues with drawn pictures, and a tiny model that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from accessory.data.collate import collate
from accessory.data.tiling import TilingConfig
from accessory.models.build import Model
from accessory.schema import Batch, Picture, Sample, Turn
from accessory.vision.mixture import Member, MixtureConfig
from accessory.vision.tower import CLIP_MEAN, CLIP_STD
from accessory.vision.towers import TowerConfig
from tests.tiny import tiny_model

TILING = TilingConfig(size=64, grid="aspect", max_grid=2)
_VIT = {"patch_size": 14, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6}
_CLIP = {"embed_dim": 384, "vision_cfg": {"layers": 3, "width": 384, "head_width": 64, "patch_size": 14}}
_CONVNEXT = {
    "model_args": {"depths": (1, 1, 2, 1), "dims": (48, 96, 192, 384)}, "mean": CLIP_MEAN, "std": CLIP_STD,
    "grid": (16, 16),
}  # fmt: skip
_QFORMER = {
    "config": {**_VIT, "intermediate_size": 1536},
    "qformer": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768},
    "num_queries": 8,
    "group": "qformer",
}
SMALL_SPHINX = MixtureConfig(
    448,
    (
        Member("clip", TowerConfig("open_clip", "small", 224, {"config": _CLIP})),
        Member("openclip_convnext_xxl", TowerConfig("timm", "convnext_atto", 256, _CONVNEXT), "nearest"),
        Member("dinov2_vitg14", TowerConfig("transformers", "dinov2", 224, {"config": _VIT})),
    ),
    (Member("qformer", TowerConfig("transformers", "qformer", 224, _QFORMER)),),
    tiles=2,
)
"""SPHINX-1k's four encoders over five views, small enough to be measured in a second."""


def picture(seed: int, width: int = 64, height: int = 64) -> Picture:
    """Noise: no two are alike in any tile."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels))


def sample(*parts: str | Picture, answer: str = "a red cat") -> Sample:
    return Sample((Turn("user", parts), Turn("assistant", (answer,))))


def mixed() -> list[Sample]:
    """Text alone; one picture; two pictures, one of them wide (so with skips); a picture amid the words."""
    return [
        sample("What is this?"),
        sample(picture(1), "What is this?"),
        sample(picture(2), "and", picture(3, 96, 48), "How many birds are there?", answer="three birds"),
        sample("Where is the apple", picture(4, 40, 80), "in this?"),
    ]


def model(folder: Path, **options: object) -> Model:
    """A tiny model whose wide pictures are cut into tiles, with blank ones skipped."""
    return tiny_model(folder, **{"tiling": TILING, **options})  # type: ignore[arg-type]


def batch(made: Model, samples: list[Sample]) -> Batch:
    return collate([made.encoder.encode(s) for s in samples], made.tokenizer.pad_id)
