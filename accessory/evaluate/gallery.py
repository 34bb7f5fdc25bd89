"""Real drawings in an encoder's eyes, to find in them what a generated picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from accessory.data import emoji
from accessory.evaluate.retrieval import described, pooled
from accessory.models.build import TowerSource, build_tower
from accessory.vision.tower import Tower

Cosine = Literal["plain", "centred"]
COSINES: tuple[Cosine, ...] = ("plain", "centred")


def encoder(device: torch.device | str = "cpu", cache: Path | None = None) -> Tower:
    """The default encoder as published, frozen. AssetError when its weights are not in the cache."""
    return build_tower(TowerSource(), cache).to(device).eval().requires_grad_(False)


class Gallery:
    """All concepts in all styles (plain views) as mean tokens of a frozen encoder, compared by cosine.

    ``centred`` first subtracts the mean of the real drawings: of the gallery's style from the gallery and from what was
    drawn in that style; of their own style from real drawings of others. Unlike the mean of a test set
    (:func:`accessory.evaluate.retrieval.nearest_accuracy`) that is known for a single picture, too.
    """

    def __init__(self, tower: Tower, cache: Path | None = None) -> None:
        self.tower, self.cache = tower, cache
        self.known = emoji.concepts(cache)
        self.features = {style: pooled(tower, style, cache) for style in emoji.STYLES}
        self.means = {style: rows.mean(0) for style, rows in self.features.items()}
        units = {style: F.normalize(rows, dim=-1) for style, rows in self.features.items()}
        centred = {style: F.normalize(rows - self.means[style], dim=-1) for style, rows in self.features.items()}
        self.units: dict[Cosine, dict[str, Tensor]] = {"plain": units, "centred": centred}
        # Styles one after the other, as the flat numbers below count.
        self.all = torch.cat([units[style] for style in emoji.STYLES])
        pairs = [(style, concept.hexcode) for style in emoji.STYLES for concept in self.known]
        self.trained = torch.tensor([not emoji.held_out(*pair) for pair in pairs])

    def __len__(self) -> int:
        """Drawings of one style."""
        return len(self.known)

    def drawing(self, style: str, row: int, size: int = 128) -> Image.Image:
        """The plain view of one real drawing."""
        rgba = np.asarray(emoji.pictures(style, cache=self.cache)[row])
        return Image.fromarray(emoji.plain(rgba, size))

    def describe(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (n, C) of pictures of any size."""
        return described(self.tower, pictures)

    def rank(
        self, features: Tensor, style: str, accepted: Sequence[int], cosine: Cosine, origin: str | None = None
    ) -> int:
        """Place, from 1, of the best accepted concept among all drawings of a style, by likeness to ``features`` (C).

        Equals come before it. ``origin``: the style whose mean is subtracted, where it is not ``style``.
        """
        if cosine == "centred":
            features = features - self.means[origin or style]
        likeness = self.units[cosine][style] @ F.normalize(features, dim=-1)
        right = torch.zeros(len(self), dtype=torch.bool)
        right[list(accepted)] = True
        return 1 + int((likeness[~right] >= likeness[right].max()).sum())

    def nearest(self, features: Tensor, styles: Sequence[str] = emoji.STYLES) -> tuple[str, str]:
        """Label and style of the most similar drawing in some styles, plain cosine."""
        likeness = torch.stack([self.units["plain"][style] @ F.normalize(features, dim=-1) for style in styles])
        at = int(likeness.argmax())
        return self.known[at % len(self)].label, styles[at // len(self)]

    def likeness(self, features: Tensor, style: str, accepted: Sequence[int]) -> tuple[float, float]:
        """Plain cosine to the most similar accepted drawing in the style, and to that of the most similar drawing that
        training saw, the accepted ones in this style left out."""
        likeness = self.all @ F.normalize(features, dim=-1)
        own = torch.tensor(accepted) + emoji.STYLES.index(style) * len(self)
        others = self.trained.clone()
        others[own] = False
        return float(likeness[own].max()), float(likeness[others].max())
