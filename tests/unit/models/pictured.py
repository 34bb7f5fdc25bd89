"""Dialogues with drawn pictures, and a tiny model that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from accessory.data.collate import collate
from accessory.data.tiling import TilingConfig
from accessory.models.build import Model
from accessory.schema import Batch, Picture, Sample, Turn
from tests.tiny import tiny_model

TILING = TilingConfig(size=64, grid="aspect", max_grid=2)


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
