"""Pictures that people bring: limits checked before anything is decoded, local files only, clear errors."""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from accessory.data.image import FORMATS, open_picture
from accessory.schema import Part, Picture, Role, Turn

Source = str | Path | bytes | Image.Image
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File names that an upload dialogue offers; what a file really is, its content decides."""

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Limits:
    """What one turn may bring: bytes a file, pixels a picture, pictures, and formats by Pillow's names."""

    max_bytes: int = 10_000_000
    max_pixels: int = 30_000_000
    max_pictures: int = 8
    formats: tuple[str, ...] = FORMATS


def open_upload(source: Source, limits: Limits) -> Image.Image:
    """One RGB picture from a local path, bytes or a PIL image.

    Raises:
        ValueError: naming the file and the limit, for anything that is no regular local file, too large in bytes or
            pixels, of another format, or broken.
    """
    if isinstance(source, Image.Image):
        return open_picture(source, max_pixels=limits.max_pixels)
    name, data = ("the picture", source) if isinstance(source, bytes) else (str(source), _read(source, limits))
    if len(data) > limits.max_bytes:
        raise ValueError(f"{name}: {len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            kind = opened.format
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture in one of {', '.join(limits.formats)}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read ({error})") from error
    if kind not in limits.formats:
        raise ValueError(f"{name}: a {kind} picture, accepted are {', '.join(limits.formats)}")
    try:
        return open_picture(data, max_pixels=limits.max_pixels)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('bytes: ')}") from error


def open_uploads(sources: Sequence[Source], limits: Limits) -> tuple[Image.Image, ...]:
    """All pictures of a turn; ValueError also for too many of them."""
    if len(sources) > limits.max_pictures:
        raise ValueError(f"{len(sources)} pictures in one turn, the limit is {limits.max_pictures}")
    return tuple(open_upload(s, limits) for s in sources)


def _read(source: str | Path, limits: Limits) -> bytes:
    name = str(source)
    head = name[:16].lower()
    if head.startswith("data:") or ":/" in head:
        raise ValueError(f"{name[:80]!r} is no local path: pictures are read from local files only, never by URL")
    if "\0" in name:
        raise ValueError(f"{name[:80]!r} is no path")
    path = Path(source).expanduser()
    try:
        # Not blocking, so that a pipe with the name of a picture cannot hang us before its kind is known.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ValueError(f"no picture at {name} ({error.strerror})") from error
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise ValueError(f"{name} is not a file")
    with os.fdopen(descriptor, "rb") as file:
        if about.st_size > limits.max_bytes:
            raise ValueError(f"{name}: {about.st_size} bytes, the limit is {limits.max_bytes}")
        return file.read(limits.max_bytes + 1)


def user_turn(text: str, images: Sequence[Source], limits: Limits) -> Turn:
    """A user's turn, pictures before the text (as in training); ValueError when there is neither."""
    if not text.strip() and not images:
        raise ValueError("an empty question: say something or bring a picture")
    if isinstance(images, str | bytes):
        raise ValueError(f"images is a list of pictures, got {images[:80]!r} alone: write it in brackets")
    pictures = tuple(Picture(image) for image in open_uploads(images, limits))
    return Turn("user", (*pictures, text) if text.strip() else pictures)


def turns_of(messages: Sequence[Mapping[str, Any]], limits: Limits) -> tuple[Turn, ...]:
    """Turns of messages ``{"role", "content"}``; content is text or a list of text and picture parts.

    A picture part is ``{"type": "image", "image": path or PIL}`` or ``{"type": "image_url", "image_url": {"url":
    "data:image/..."}}`` (a local path too, never a web address).
    """
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"messages[{i}] must have a role and a content, got {message!r:.80}")
        role = _ROLES.get(str(message["role"]))
        if role is None:
            raise ValueError(f"messages[{i}].role {message['role']!r} is not one of {', '.join(_ROLES)}")
        parts = tuple(_parts(message["content"], f"messages[{i}].content", limits))
        turns.append(Turn(role, parts))
        if len(turns[-1].pictures) > limits.max_pictures:
            raise ValueError(
                f"messages[{i}] holds {len(turns[-1].pictures)} pictures, the limit is {limits.max_pictures}"
            )
    return tuple(turns)


def _parts(content: object, where: str, limits: Limits) -> Iterator[Part]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where} must be text or a list of parts, got {content!r:.80}")
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
            continue
        value = part.get(kind) if kind in ("image", "image_url") else None
        value = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(value, str | Path | bytes | Image.Image):
            raise ValueError(f"{where}[{j}] must be a text, image or image_url part, got {part!r:.80}")
        if isinstance(value, str) and value[:5].lower() == "data:":
            value = _data_url(value, f"{where}[{j}]", limits)
        yield Picture(open_upload(value, limits))


def _data_url(url: str, where: str, limits: Limits) -> bytes:
    head, _, body = url.partition(",")
    if not (head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        raise ValueError(f"{where} must be of the form data:image/...;base64,..., got {head[:40]!r}")
    if len(body) * 3 // 4 > limits.max_bytes + 2:
        raise ValueError(f"{where}: about {len(body) * 3 // 4} bytes, the limit is {limits.max_bytes}")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: base64 that cannot be decoded ({error})") from error
