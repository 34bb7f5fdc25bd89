"""Flags and what is known about their countries."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accessory.data import emoji
from accessory.data.assets import asset_dir, default_cache


@dataclass(frozen=True)
class Country:
    """A member state of the United Nations: two-letter code, common name, capital, part of the world."""

    code: str
    name: str
    capital: str
    region: str


def countries(cache: Path | None = None) -> tuple[Country, ...]:
    """Member states that have a flag picture, sorted by code. AssetError when the data are not in the cache.

    Territories are left out: several fly another state's flag, so their question would have two answers.
    """
    root = cache or default_cache()
    return _countries(str(asset_dir("world-countries", root)), str(asset_dir("flag-icons", root)))


@functools.lru_cache(maxsize=4)
def _countries(facts: str, icons: str) -> tuple[Country, ...]:
    rows = json.loads((Path(facts) / "countries.json").read_text(encoding="utf-8"))
    found = [
        Country(row["cca2"].lower(), row["name"]["common"], row["capital"][0], row["subregion"] or row["region"])
        for row in rows
        if row["unMember"] and row["capital"]
    ]
    return tuple(sorted((c for c in found if _icon(icons, c.code).is_file()), key=lambda c: c.code))


def _icon(icons: str, code: str) -> Path:
    return Path(icons) / "flags" / "4x3" / f"{code}.svg"


def flag_pictures(size: int = emoji.DEFAULT_SIZE, cache: Path | None = None) -> emoji.Pixels:
    """Flags in the order of :func:`countries`: uint8 RGBA (num_countries, size, size, 4), mapped, margins clear."""
    root = cache or default_cache()
    known = countries(root)
    icons = asset_dir("flag-icons", root)
    digest = emoji.digest([icons.name, *(c.code for c in known)])
    stored = root / "prepared" / f"flags-{size}-{digest}.npy"

    def draw() -> emoji.Pixels:
        return np.stack([emoji.fit(emoji.render_svg(_icon(str(icons), c.code), size), size) for c in known])

    return emoji.stored_pictures(stored, draw)
