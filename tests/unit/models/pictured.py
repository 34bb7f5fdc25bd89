"""Dialogues with drawn pictures, and a tiny model that reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from accessory.data.collate import collate
from accessory.data.tiling import TilingConfig
from accessory.models.build import Model, ProjectorConfig, ResamplerConfig
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, TrainSpec, TuningSpec
from accessory.schema import Batch, Picture, Sample, Turn
from accessory.vision.mixture import Member, MixtureConfig
from accessory.vision.tower import CLIP_MEAN, CLIP_STD
from accessory.vision.towers import TowerConfig
from tests.tiny import disturb, tiny_model

TILING = TilingConfig(size=64, grid="aspect", max_grid=2)
FORMS: dict[str, tuple[TuningSpec, ...]] = {
    "v1 caption": (PrefixSpec(length=3, layers=1, init_std=0.1),),
    "v2 multimodal7b": (
        PrefixSpec(length=3, layers=1, new_gate=True, init_std=0.1),
        BiasSpec(("wq", "wo", "w1", "w2", "w3")),
        NormSpec(),
        LoraSpec(rank=2),
    ),
    "v2 paper": (PrefixSpec(length=2, layers=1, early=3, init_std=0.1), BiasSpec(), NormSpec()),
    "attention-free": (PrefixSpec(length=1, init_std=0.1),),
    "with a projector": (PrefixSpec(length=3, init_std=0.1),),
}
"""What hangs on the two blocks of a model that sees through its prefixes."""
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


def adapted(folder: Path, form: str = "v1 caption", *, train: bool = False, **options: object) -> Model:
    """A tiny LLaMA-Adapter with open gates and loud pictures; without a projector its pictures take no position."""
    length = 1 if form == "attention-free" else 3
    made = tiny_model(
        folder,
        train=True,
        **{
            "tuning": (*FORMS[form], TrainSpec(("resampler.*",))),
            "projector": ProjectorConfig("linear_norm") if form == "with a projector" else None,
            "resampler": ResamplerConfig(length=length, width=16, depth=2, heads=2),
            **options,
        },  # type: ignore[arg-type]
    )
    disturb(made.net, 0.5)
    assert made.net.resampler is not None
    made.net.resampler.visual_proj_norm.weight.data *= 5
    return made if train else replace(made, net=made.net.requires_grad_(False).eval())
