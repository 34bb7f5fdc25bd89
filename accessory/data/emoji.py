"""Emoji in three drawing styles over one list of concepts: train on two styles, test on the third.

A concept is an emoji that all three styles draw, without skin tones, flags, components and joined sequences (families,
and one more woman and man for each profession: drawings that differ by hair only). Pictures of a style are
rendered once into a memory-mapped array, so that a sample costs one row of it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from accessory.data.assets import asset_dir, default_cache

STYLES = ("fluent", "openmoji", "noto")
TRAIN_STYLES = ("fluent", "openmoji")
TEST_STYLE = "noto"
STYLE_WORDS = {"fluent": "3d", "openmoji": "outlined", "noto": "flat"}
"""What a style is called where a picture in it is asked for."""
HELD_OUT = 20
"""One in so many pairs of style and concept is never drawn in training."""
DEFAULT_SIZE = 136
MIN_CONCEPTS = 1300
ASSET_OF_STYLE = {"fluent": "fluent-emoji-3d", "openmoji": "openmoji", "noto": "noto-color-emoji"}
GROUPS = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}
JOINER = "200D"
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Concept:
    """One emoji: code points without variation selectors (``1F408``), English name, keywords, group."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def _key(name: str) -> str:
    """File names and data differ in case and in variation selectors; this is what they have in common."""
    return "-".join(p for p in name.upper().split("-") if p != "FE0F")


def concepts(cache: Path | None = None) -> tuple[Concept, ...]:
    """All concepts sorted by hexcode (at least 1,300). AssetError when an emoji asset is not in the cache."""
    root = cache or default_cache()
    folders = tuple(str(asset_dir(n, root)) for n in ("emojibase-data", *ASSET_OF_STYLE.values()))
    return _concepts(str(root), folders)


@functools.lru_cache(maxsize=4)
def _concepts(root: str, folders: tuple[str, ...]) -> tuple[Concept, ...]:
    names = [Path(f).name for f in folders]
    stored = Path(root) / "prepared" / f"concepts-{digest([*names, 'no joined sequences'])}.json"
    if stored.is_file():
        rows = json.loads(stored.read_text(encoding="utf-8"))
        return tuple(Concept(**{**r, "tags": tuple(r["tags"])}) for r in rows)
    base = Path(folders[0])
    data = json.loads((base / "en" / "data.json").read_text(encoding="utf-8"))
    subgroups = json.loads((base / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]
    drawn = set.intersection(*(set(_source(style, Path(root))) for style in STYLES))
    found = {
        _key(row["hexcode"]): Concept(
            hexcode=_key(row["hexcode"]),
            label=row["label"],
            tags=tuple(row.get("tags", ())),
            group=GROUPS[row["group"]],
            subgroup=subgroups[str(row["subgroup"])],
        )
        for row in data
        if row.get("group") in GROUPS and _key(row["hexcode"]) in drawn and JOINER not in row["hexcode"].split("-")
    }
    result = tuple(found[k] for k in sorted(found))
    if len(result) < MIN_CONCEPTS:
        raise ValueError(f"only {len(result)} emoji are drawn by all of {STYLES}, expected at least {MIN_CONCEPTS}")
    write_atomically(stored, lambda p: p.write_text(json.dumps([asdict(c) for c in result]), encoding="utf-8"))
    return result


def held_out(style: str, hexcode: str) -> bool:
    """Whether a drawing is kept from training to draw; decided by its names alone, so it never changes sides."""
    return int.from_bytes(hashlib.sha256(f"{style} {hexcode}".encode()).digest()[:4]) % HELD_OUT == 0


def pictures(style: str, size: int = DEFAULT_SIZE, cache: Path | None = None) -> Pixels:
    """All concepts drawn in one style: uint8 RGBA (num_concepts, size, size, 4), read-only and memory-mapped.

    Rendered on first use (seconds), then opened. ValueError for a style or size that cannot be.
    """
    if style not in STYLES:
        raise ValueError(f"emoji style {style!r} is unknown; there are: {', '.join(STYLES)}")
    if not 16 <= size <= 512:
        raise ValueError(f"emoji size {size} is outside 16..512 pixels")
    root = cache or default_cache()
    known = concepts(root)
    mark = digest([c.hexcode for c in known] + [asset_dir(ASSET_OF_STYLE[style], root).name])
    stored = root / "prepared" / f"emoji-{style}-{size}-{mark}.npy"

    def draw() -> Pixels:
        source = _source(style, root)
        return np.stack([fit(source[c.hexcode](size), size) for c in known])

    return stored_pictures(stored, draw)


def stored_pictures(stored: Path, draw: Callable[[], Pixels]) -> Pixels:
    """The array in a file, memory-mapped and read-only; drawn and written first when the file is not there."""
    if not stored.is_file():

        def save(path: Path) -> None:
            with path.open("wb") as handle:
                np.save(handle, draw())

        write_atomically(stored, save)
    result: Pixels = np.load(stored, mmap_mode="r")
    return result


def digest(parts: list[str]) -> str:
    """Eight hexadecimal digits that change with any of the parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a private file, then give it its name: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, private = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(private))
        os.chmod(private, 0o644)  # a temporary file is its owner's only
        os.replace(private, path)
    finally:
        Path(private).unlink(missing_ok=True)


Draw = Callable[[int], Image.Image]


def _source(style: str, root: Path) -> dict[str, Draw]:
    """Per concept key, a function that draws it at about the size asked for (RGBA, any aspect)."""
    folder = asset_dir(ASSET_OF_STYLE[style], root)
    if style == "fluent":
        return {_key(p.stem): functools.partial(_open, p) for p in (folder / "assets").glob("*.webp")}
    if style == "openmoji":
        return {_key(p.stem): functools.partial(render_svg, p) for p in (folder / "color" / "svg").glob("*.svg")}
    fonts = sorted(folder.glob("**/NotoColorEmoji.ttf"))
    if fonts:
        return {k: functools.partial(_decode, png) for k, png in _font_bitmaps(fonts[0]).items()}
    return {_key(p.stem): functools.partial(_open, p) for p in folder.glob("img/google/64/*.png")}


def _open(path: Path, _: int) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGBA")


def _decode(png: bytes, _: int) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGBA")


def render_svg(path: Path, size: int) -> Image.Image:
    """A vector picture, RGBA, fitted into (size, size) with its aspect kept."""
    import resvg_py

    return _decode(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size)), size)


def _font_bitmaps(path: Path) -> dict[str, bytes]:
    """PNG bytes of a CBDT colour font per concept key: single code points by cmap, sequences by GSUB ligatures."""
    from fontTools.ttLib import TTFont

    font = TTFont(path, lazy=True)
    cmap: dict[int, str] = font.getBestCmap()
    point_of = {glyph: f"{point:04X}" for point, glyph in cmap.items()}
    glyph_of = {f"{point:04X}": glyph for point, glyph in cmap.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            inner = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(inner, "ligatures", {}).items():
                for ligature in ligatures:
                    glyphs = [first, *ligature.Component]
                    if all(g in point_of for g in glyphs):
                        glyph_of.setdefault(_key("-".join(point_of[g] for g in glyphs)), ligature.LigGlyph)
    strike = font["CBDT"].strikeData[0]
    return {key: bytes(strike[g].imageData) for key, g in glyph_of.items() if hasattr(strike.get(g), "imageData")}


def fit(picture: Image.Image, size: int) -> Pixels:
    """Scale into a square with transparent margins, aspect kept (size, size, 4)."""
    ratio = size / max(picture.size)
    shape = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    small = picture if shape == picture.size else picture.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(square)


def compose(rgba: Pixels | Image.Image, background_rgb: Colour = (255, 255, 255)) -> Image.Image:
    """RGBA (H,W,4) over one colour, as an RGB picture."""
    front = rgba if isinstance(rgba, Image.Image) else Image.fromarray(rgba)
    back = Image.new("RGB", front.size, background_rgb)
    back.paste(front, mask=front.getchannel("A"))
    return back


def plain(rgba: Pixels, size: int) -> Pixels:
    """The un-augmented test view: on white, uint8 (size, size, 3)."""
    picture = compose(rgba)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def augment(rgba: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A random training view of RGBA (H,H,4): uint8 (size, size, 3).

    Background, rotation, scale, shift, colour, and now and then grey, blur, few grey levels or a patch painted over.
    Never mirrored: left and right arrows are different concepts.
    """
    front = Image.fromarray(rgba)
    matrix = _affine(front.width, size, rng)
    alpha = front.getchannel("A")
    coloured = front.convert("RGB").convert("RGB", colour_matrix(rng))
    kind = rng.random()
    if kind < 0.8:  # one colour: compose first, then one transform of three channels
        back = (255, 255, 255) if kind < 0.5 else random_colour(rng)
        flat = Image.new("RGB", front.size, back)
        flat.paste(coloured, mask=alpha)
        view = flat.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=back)
    else:
        view = gradient(size, random_colour(rng), random_colour(rng), rng)
        coloured.putalpha(alpha)
        moved = coloured.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        view.paste(moved, mask=moved.getchannel("A"))
    extra = rng.random()
    if extra < 0.06:
        view = view.convert("L").convert("RGB")
    elif extra < 0.16:
        view = view.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2)) * size / 128))
    elif extra < 0.20:
        view = ImageOps.posterize(view, int(rng.integers(3, 6)))
    if rng.random() < 0.25:
        view.paste(random_colour(rng), _patch(size, rng))
    return np.asarray(view)


def _patch(size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box to paint over (random erasing, Zhong et al. 2020), so that no single part decides."""
    wide, tall = (int(v) for v in rng.uniform(0.12, 0.4, 2) * size)
    left, top = int(rng.integers(0, size - wide)), int(rng.integers(0, size - tall))
    return left, top, left + wide, top + tall


def blend(first: Pixels, second: Pixels, share: float) -> Pixels:
    """Two drawings of one thing laid over each other: RGBA (H,H,4), ``share`` of the first, colours by coverage."""
    a, b = first.astype(np.float32), second.astype(np.float32)
    wa, wb = share * a[..., 3:], (1 - share) * b[..., 3:]
    alpha = wa + wb
    colour = (a[..., :3] * wa + b[..., :3] * wb) / np.maximum(alpha, 1e-3)
    return np.concatenate([colour, alpha], axis=-1).astype(np.uint8)


def _affine(source: int, size: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Coefficients that map a target pixel to its source pixel, for Pillow's ``transform``."""
    # One in ten turns further: drawings of one thing differ in tilt more than 15 degrees.
    limit = 35.0 if rng.random() < 0.1 else 15.0
    angle = math.radians(float(rng.uniform(-limit, limit)))
    scale = float(rng.uniform(0.7, 1.1)) * size / source
    stretch = math.exp(float(rng.uniform(-0.15, 0.15)))
    room = 0.06 + max(0.0, (1 - scale * source / size) / 2)
    shift = rng.uniform(-room, room, 2) * size
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    a, b, d, e = cos * stretch, sin * stretch, -sin / stretch, cos / stretch
    x, y = size / 2 + float(shift[0]), size / 2 + float(shift[1])
    middle = source / 2
    return (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y)


LUMA = np.array([0.299, 0.587, 0.114])


def colour_matrix(rng: np.random.Generator) -> tuple[float, ...]:
    """Saturation, hue, contrast and brightness as one 3x4 matrix: all four are affine in RGB."""
    saturation, contrast = rng.uniform(0.5, 1.5), rng.uniform(0.75, 1.2)
    brightness, turn = rng.uniform(-25, 25), math.radians(float(rng.normal(0, 9)))
    # Turning about the grey axis changes hue (Rodrigues' formula).
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    hue = math.cos(turn) * np.eye(3) + math.sin(turn) * cross + (1 - math.cos(turn)) * np.outer(axis, axis)
    grey = np.tile(LUMA, (3, 1))
    mix = (saturation * np.eye(3) + (1 - saturation) * grey) @ hue * contrast
    offset = 127.5 * (1 - contrast) + brightness
    return tuple(float(v) for row in mix for v in (*row, offset))


def random_colour(rng: np.random.Generator) -> Colour:
    """Mostly light, sometimes any colour."""
    low = 180 if rng.random() < 0.6 else 0
    red, green, blue = (int(v) for v in rng.integers(low, 256, 3))
    return red, green, blue


def gradient(size: int, first: Colour, second: Colour, rng: np.random.Generator) -> Image.Image:
    """A picture that runs from one colour to another in a random direction."""
    corner = rng.random((2, 2, 1))
    small = np.asarray(first) * corner + np.asarray(second) * (1 - corner)
    return Image.fromarray(small.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
