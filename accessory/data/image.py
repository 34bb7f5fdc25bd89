"""Opening pictures safely and squaring them the way SPHINX does."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384
"""A picture is padded to a square, so that a line of few pixels can fill the memory."""
# What decoders raise on broken bytes beside OSError and ValueError.
_BROKEN = (OSError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError, MemoryError,
           RecursionError, struct.error, zlib.error)  # fmt: skip
FILL = (122, 116, 104)
"""Padding colour: 255 times the CLIP mean, rounded down, so that padding is about zero after normalisation."""


def open_picture(source: str | Path | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A fully decoded RGB picture, upright (EXIF) and on white where it was transparent.

    ValueError, naming the source, for missing, unreadable, truncated or over-large pictures; the size is checked
    before any pixel is decoded. An animation gives its first frame.
    """
    name = "bytes" if isinstance(source, bytes) else "picture" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                image = source
            else:
                image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels or max(width, height) > MAX_SIDE:
                raise ValueError(f"{name}: {width}x{height} pixels, the limit is {max_pixels}, of a side {MAX_SIDE}")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture in one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: too many pixels, the limit is {max_pixels}") from error
    except _BROKEN as error:
        raise ValueError(f"{name}: cannot be read ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns it white.
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey / 65535.0 * 255.0).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def pad_to_square(image: Image.Image, fill: tuple[int, int, int] = FILL) -> Image.Image:
    """The picture in the middle of a square of its longer side; odd offsets round down, as in SPHINX."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the picture at ``size`` pixels a side: the shorter side resized to it, the longer cut.

    Offsets are rounded half to even, as torchvision's ``CenterCrop`` does.
    """
    width, height = image.size
    short = min(width, height)
    image = resize(image, width * size // short, height * size // short)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic with antialiasing (Pillow's filter, the one of the published recipes)."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture to float (3,H,W) in [0,1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255.0)
