"""Boxes and points in words, the way SPHINX writes them, and back.

Coordinates are fractions of the padded square (the picture amid a square of its longer side), x before y. A box is
``[x1,y1,x2,y2]``; several boxes of one name share a bracket and are parted by ``;``. A name that is located stands in
``<p>...</p>`` before its bracket.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Point = tuple[float, float]
BoxForm = Literal["xyxy", "xywh", "square"]
"""How a file writes boxes: pixel corners, pixel corner and extent, or fractions of the padded square."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_BRACKET = re.compile(r"\[((?:" + _FOUR + r";?)+)\]")
_ONE_BOX = re.compile(_FOUR)
_NAMED = re.compile(r"<p>(.*?)</p>(?:\s*(\[[-\d.,;\s]*\]))?", re.S)
_POINT = re.compile(r"\[" + _NUMBER + "," + _NUMBER + r"\]")
_MARK_SHARE = 24  # a mark's number is so many times smaller than the picture's longer side


@dataclass(frozen=True)
class Located:
    """A name and where it is: none, one or several boxes."""

    name: str
    boxes: tuple[Box, ...]


def to_square(box: Sequence[float], width: int, height: int, form: BoxForm = "xyxy") -> Box:
    """A box of a ``width`` x ``height`` picture as fractions of its padded square.

    Raises:
        ValueError: for anything but four numbers, a box without extent, or one that lies outside of the picture.
    """
    if len(box) != 4:
        raise ValueError(f"a box has four numbers, got {list(box)!r}")
    x1, y1, x2, y2 = (float(v) for v in box)
    if form == "square":
        values = (x1, y1, x2, y2)
        limit: tuple[float, float] = (1.0, 1.0)
    else:
        if form == "xywh":
            x2, y2 = x1 + x2, y1 + y2
        values, limit = (x1, y1, x2, y2), (float(width), float(height))
    x1, y1, x2, y2 = values
    if not (0 <= x1 < x2 <= limit[0] and 0 <= y1 < y2 <= limit[1]):
        raise ValueError(f"the box {list(box)} ({form}) is empty or outside of its picture of {limit[0]} x {limit[1]}")
    return values if form == "square" else (*_point(x1, y1, width, height), *_point(x2, y2, width, height))


def point_to_square(point: Sequence[float], width: int, height: int, form: BoxForm = "xyxy") -> Point:
    """A point as :func:`to_square` does it with boxes."""
    if len(point) != 2:
        raise ValueError(f"a point has two numbers, got {list(point)!r}")
    x, y = float(point[0]), float(point[1])
    limit = (1, 1) if form == "square" else (width, height)
    if not (0 <= x <= limit[0] and 0 <= y <= limit[1]):
        raise ValueError(f"the point {list(point)} is outside of its picture of {limit[0]} x {limit[1]}")
    return (x, y) if form == "square" else _point(x, y, width, height)


def _point(x: float, y: float, width: int, height: int) -> Point:
    side = max(width, height)
    return (x + (side - width) // 2) / side, (y + (side - height) // 2) / side


def to_pixels(box: Box, width: int, height: int) -> Box:
    """A box in fractions of the padded square as pixel corners of the picture, cut at its edges."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (v * side for v in box)
    return (
        min(max(x1 - left, 0.0), width), min(max(y1 - top, 0.0), height),
        min(max(x2 - left, 0.0), width), min(max(y2 - top, 0.0), height),
    )  # fmt: skip


def write_boxes(boxes: Iterable[Box], decimals: int = 3) -> str:
    """``[x1,y1,x2,y2;...]`` of boxes in fractions of the padded square; ValueError when there is none."""
    texts = [",".join(f"{v:.{decimals}f}" for v in box) for box in boxes]
    if not texts:
        raise ValueError("no box to write: a bracket holds at least one")
    return "[" + ";".join(texts) + "]"


def write_located(found: Iterable[Located], decimals: int = 3) -> str:
    """``<p>name</p>[box], ...``: a list of things with their places (layouts, spotted texts)."""
    return ", ".join(f"<p>{_plain(f.name)}</p>{write_boxes(f.boxes, decimals)}" for f in found)


def write_caption(caption: str, found: Sequence[Located], decimals: int = 3) -> str:
    """A caption whose names are marked and located; they are looked for in the order given, each behind the last.

    Raises:
        ValueError: for a name that the caption does not hold at its place.
    """
    out, at = "", 0
    for item in found:
        place = caption.find(item.name, at)
        if place < 0:
            raise ValueError(f"{item.name!r} is not in the caption behind the names before it: {caption!r:.120}")
        out += caption[at:place] + f"<p>{_plain(item.name)}</p>{write_boxes(item.boxes, decimals)}"
        at = place + len(item.name)
    return out + caption[at:]


def write_points(points: Mapping[str, Point], decimals: int = 3) -> str:
    """``<p>name</p>[x,y], ...`` of key points."""
    return ", ".join(f"<p>{_plain(n)}</p>[{x:.{decimals}f},{y:.{decimals}f}]" for n, (x, y) in points.items())


def _plain(name: str) -> str:
    if "<p>" in name or "</p>" in name:
        raise ValueError(f"the name {name!r} holds the marks <p> or </p> that stand around names")
    return name


def parse_boxes(text: str) -> tuple[Box, ...]:
    """Every box in a text, in order; corners may come in any order. Empty where there is none."""
    found = []
    for bracket in _BRACKET.finditer(text):
        for numbers in _ONE_BOX.finditer(bracket.group(1)):
            x1, y1, x2, y2 = (float(v) for v in numbers.groups())
            found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return tuple(found)


def parse_located(text: str) -> tuple[str, tuple[Located, ...]]:
    """A text without its marks and brackets, and what it locates: captions, layouts, spotted texts."""
    found = tuple(Located(m.group(1), parse_boxes(m.group(2) or "")) for m in _NAMED.finditer(text))
    return _NAMED.sub(lambda m: m.group(1), text), found


def parse_points(text: str) -> dict[str, Point]:
    """Key points by name; the first one counts where a name comes twice, and names without a point are left out."""
    points: dict[str, Point] = {}
    for named in _NAMED.finditer(text):
        numbers = _POINT.fullmatch((named.group(2) or "").strip())
        if numbers is not None:
            points.setdefault(named.group(1), (float(numbers.group(1)), float(numbers.group(2))))
    return points


def draw_marks(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Set-of-Mark: the picture with number k + 1 in the middle of box k (fractions of the padded square).

    White on black, so that it can be read on any ground; the same input gives the same pixels.
    """
    out = picture.convert("RGB").copy()
    draw = ImageDraw.Draw(out)
    font = ImageFont.load_default(size=max(10, max(out.size) // _MARK_SHARE))
    for number, box in enumerate(boxes, 1):
        x1, y1, x2, y2 = to_pixels(box, *out.size)
        at, text = ((x1 + x2) / 2, (y1 + y2) / 2), str(number)
        left, top, right, bottom = draw.textbbox(at, text, font=font, anchor="mm")
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=(0, 0, 0))
        draw.text(at, text, fill=(255, 255, 255), font=font, anchor="mm")
    return out
