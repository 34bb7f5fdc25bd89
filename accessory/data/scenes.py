"""Scenes composed of emoji pictures, with answers that are known exactly because we placed the pictures.

A scene is a function of (task, split, seed, index). The same concepts appear in training and test; the drawing style is
what differs. Boxes are tight on the drawn alpha and are told as fractions of the square that the picture is padded
to (content centred, offset rounded down), two decimals: the format of SPHINX.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from accessory.data import emoji
from accessory.data.scene_words import NAMES, OPPOSITE, ORDINALS, PATCH_COLOURS, PHRASES, RELATIONS, plural

Split = Literal["train", "test"]
TASKS = ("count", "colour", "relation", "grounding", "region", "wide")
MIN_SHARE = 36 / 128  # smallest longest side of an emoji, as a share of the canvas's shorter side
ALPHA_EDGE = 16  # alpha from which a pixel counts as drawn
SPLIT_CODE: dict[Split, int] = {"train": 0, "test": 1}
ASPECTS = ((2, 1), (4, 1), (1, 2), (1, 4), (3, 1))


@dataclass(frozen=True)
class Box:
    """One placed emoji: name, row in ``emoji.concepts()``, and its tight pixel box (right and lower edge excluded)."""

    name: str
    concept: int
    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True)
class Scene:
    """An RGB picture, the (question, answer) turns about it, the task, and what was placed where."""

    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    task: str
    boxes: tuple[Box, ...]


@functools.lru_cache(maxsize=4)
def vocabulary(cache: Path | None = None) -> tuple[tuple[str, int], ...]:
    """(name, row in ``emoji.concepts()``) of the visually distinct concepts that scenes are made of, sorted by name."""
    rows = {c.label: i for i, c in enumerate(emoji.concepts(cache))}
    return tuple((n, rows[n]) for n in sorted(NAMES) if n in rows)


def box_text(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """A pixel box of a (width, height) picture as ``[x1,y1,x2,y2]`` in fractions of the padded square, two decimals."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    values = (x1 + left, y1 + top, x2 + left, y2 + top)
    return "[" + ",".join(f"{v / side:.2f}" for v in values) + "]"


def scene(
    task: str, seed: int, index: int, split: Split, *, size: int = 128, turns: int = 1, cache: Path | None = None
) -> Scene:
    """The scene of (task, seed, index, split).

    ``size`` is the canvas's shorter side in pixels (at least 64); ``turns`` bounds the questions about one picture.
    Training draws from two styles with varied wording, test from the third with one fixed wording. ValueError for an
    unknown task, split or a canvas too small.
    """
    if task not in TASKS:
        raise ValueError(f"scene task {task!r} is unknown; there are: {', '.join(TASKS)}")
    if split not in SPLIT_CODE:
        raise ValueError(f"split {split!r} is unknown; there are: train, test")
    if size < 64:
        raise ValueError(f"scene size {size} is below 64 pixels")
    rng = np.random.default_rng((seed, SPLIT_CODE[split], TASKS.index(task), index))
    canvas = _Canvas(task, split, size, rng, cache)
    asked = _MAKERS[task](canvas)
    if split == "train" and turns > 1:
        asked = [asked[int(k)] for k in rng.permutation(len(asked))]
    return Scene(canvas.image, tuple(asked[: max(1, turns)]), task, tuple(canvas.boxes))


class _Canvas:
    """A picture under construction: where things may go, and what was placed."""

    def __init__(self, task: str, split: Split, size: int, rng: np.random.Generator, cache: Path | None) -> None:
        self.rng, self.split, self.cache, self.task = rng, split, cache, task
        wide, tall = ASPECTS[int(rng.integers(len(ASPECTS)))] if task == "wide" else (1, 1)
        self.width, self.height = size * wide, size * tall
        self.smallest = round(MIN_SHARE * size)
        style = emoji.TEST_STYLE if split == "test" else emoji.TRAIN_STYLES[int(rng.integers(2))]
        self.pictures = emoji.pictures(style, cache=cache)
        back = (255, 255, 255) if split == "test" or rng.random() < 0.5 else _light(rng)
        self.image = Image.new("RGB", (self.width, self.height), back)
        self.boxes: list[Box] = []
        self.jitter = split == "train" and task != "colour" and rng.random() < 0.5

    def phrase(self, key: str, **names: str) -> str:
        """A wording: any of the list in training, the first one in test."""
        choices = PHRASES[key]
        return choices[int(self.rng.integers(len(choices))) if self.split == "train" else 0].format(**names)

    def pick(self, count: int) -> list[tuple[str, int]]:
        """``count`` different concepts."""
        known = vocabulary(self.cache)
        return [known[int(k)] for k in self.rng.choice(len(known), count, replace=False)]

    def cells(self, count: int) -> list[tuple[int, int, int, int]]:
        """``count`` disjoint areas (x, y, width, height), each large enough for the smallest emoji, in random order."""
        room = self.smallest + 2
        cols, rows = self.width // room, self.height // room
        if self.rng.random() < 0.6:  # the coarsest grid that has room: larger pictures
            while cols * rows > count and max(cols, rows) > 1:
                fewer = (cols - 1, rows) if cols * self.height >= rows * self.width else (cols, rows - 1)
                if fewer[0] * fewer[1] < count:
                    break
                cols, rows = fewer
        wide, tall = self.width // cols, self.height // rows
        chosen = self.rng.choice(cols * rows, count, replace=False)
        return [(int(k) % cols * wide, int(k) // cols * tall, wide, tall) for k in chosen]

    def place(self, name: str, concept: int, cell: tuple[int, int, int, int]) -> Box:
        """Draw one emoji somewhere inside an area; its longest side is between the smallest allowed and the area's."""
        x, y, wide, tall = cell
        most = min(wide, tall) - 2
        side = int(self.rng.integers(min(self.smallest, most), most + 1))
        front = _cropped(self.pictures[concept], side)
        if self.jitter:
            coloured = front.convert("RGB").convert("RGB", emoji.colour_matrix(self.rng))
            coloured.putalpha(front.getchannel("A"))
            front = coloured
        left = x + 1 + int(self.rng.integers(0, wide - 1 - front.width))
        top = y + 1 + int(self.rng.integers(0, tall - 1 - front.height))
        self.image.paste(front, (left, top), front)
        x1, y1, x2, y2 = _edges(front)
        box = Box(name, concept, left + x1, top + y1, left + x2, top + y2)
        self.boxes.append(box)
        return box

    def text_of(self, box: Box) -> str:
        """The box as an answer."""
        return box_text((box.x1, box.y1, box.x2, box.y2), self.width, self.height)


def _light(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in rng.integers(200, 256, 3))
    return red, green, blue


def _edges(front: Image.Image) -> tuple[int, int, int, int]:
    """Tight box of what is drawn."""
    found = front.getchannel("A").point(lambda a: 255 if a >= ALPHA_EDGE else 0).getbbox()
    assert found is not None, "an emoji without a visible pixel"
    return found


def _cropped(rgba: emoji.Pixels, side: int) -> Image.Image:
    """An emoji without its margins, longest side ``side`` pixels."""
    front = Image.fromarray(rgba)
    front = front.crop(_edges(front))
    ratio = side / max(front.size)
    shape = (max(1, round(front.width * ratio)), max(1, round(front.height * ratio)))
    return front.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)


Asked = list[tuple[str, str]]


def _count(canvas: _Canvas) -> Asked:
    """1 to 5 of one kind among up to three others; the most common of the others may be asked too."""
    wanted = int(canvas.rng.integers(1, 6))
    others = int(canvas.rng.integers(0, 4)) if wanted < 5 else int(canvas.rng.integers(0, 3))
    kinds = canvas.pick(3)
    placed = [kinds[0]] * wanted + [kinds[1 + int(canvas.rng.integers(2))] for _ in range(others)]
    for (name, concept), cell in zip(placed, canvas.cells(len(placed))):
        canvas.place(name, concept, cell)
    present = [k for k in kinds if k in placed]
    return [(canvas.phrase("count", plural=plural(n)), str(placed.count((n, c)))) for n, c in present]


def _colour(canvas: _Canvas) -> Asked:
    """Every emoji lies on a patch of its own colour."""
    kinds = canvas.pick(int(canvas.rng.integers(1, 5)))
    names = [list(PATCH_COLOURS)[int(k)] for k in canvas.rng.choice(len(PATCH_COLOURS), len(kinds), replace=False)]
    draw = ImageDraw.Draw(canvas.image)
    asked: Asked = []
    for (name, concept), colour, cell in zip(kinds, names, canvas.cells(len(kinds))):
        x, y, wide, tall = cell
        area = (x + 1, y + 1, x + wide - 2, y + tall - 2)
        if canvas.rng.random() < 0.5:
            draw.rectangle(area, fill=PATCH_COLOURS[colour])
        else:
            draw.rounded_rectangle(area, radius=min(wide, tall) // 5, fill=PATCH_COLOURS[colour])
        edge = min(4, (min(wide, tall) - 2 - canvas.smallest) // 2)
        canvas.place(name, concept, (x + edge, y + edge, wide - 2 * edge, tall - 2 * edge))
        asked.append((canvas.phrase("colour", name=name), colour))
    first = asked[0][1]
    asked.insert(int(canvas.rng.integers(2)), (canvas.phrase("patch", colour=first), kinds[0][0]))
    return asked


def _relation(canvas: _Canvas) -> Asked:
    """Two emoji side by side or one above the other; the other axis differs little, so that no second word fits."""
    across = bool(canvas.rng.random() < 0.5)
    kinds = canvas.pick(2)
    half, whole = (canvas.width // 2, canvas.height) if across else (canvas.height // 2, canvas.width)
    band = int(canvas.rng.integers(0, whole - half + 1))
    cells = [(k * half, band, half, half) if across else (band, k * half, half, half) for k in (0, 1)]
    for (name, concept), cell in zip(kinds, cells):
        canvas.place(name, concept, cell)
    (first, _), (second, _) = kinds
    if canvas.rng.random() < 0.5:
        first, second = second, first
    true = RELATIONS[("across" if across else "along", first == kinds[0][0])]
    told = true if canvas.rng.random() < 0.5 else OPPOSITE[true]
    closed = (canvas.phrase("relation", a=first, b=second, relation=told), "yes" if told == true else "no")
    opened = (canvas.phrase("what", relation=true, b=second), first)
    return [closed, opened] if canvas.rng.random() < 0.6 else [opened, closed]


def _grounding(canvas: _Canvas) -> Asked:
    boxes = _scatter(canvas)
    return [(canvas.phrase("where", name=b.name), canvas.text_of(b)) for b in boxes]


def _region(canvas: _Canvas) -> Asked:
    boxes = _scatter(canvas)
    return [(canvas.phrase("region", box=canvas.text_of(b)), b.name) for b in boxes]


def _scatter(canvas: _Canvas) -> list[Box]:
    """1 to 4 different emoji."""
    kinds = canvas.pick(int(canvas.rng.integers(1, 5)))
    return [canvas.place(n, c, cell) for (n, c), cell in zip(kinds, canvas.cells(len(kinds)))]


def _wide(canvas: _Canvas) -> Asked:
    """A row (or column) of 3 to 6 small emoji on a long canvas: what stands where, how many, in which box."""
    across = canvas.width > canvas.height
    long, short = max(canvas.width, canvas.height), min(canvas.width, canvas.height)
    number = int(canvas.rng.integers(3, min(6, long // (canvas.smallest + 2)) + 1))
    step = long // number
    kinds = canvas.pick(number)
    boxes = []
    for k, (name, concept) in enumerate(kinds):
        span = min(step, short)
        cell = (k * step, 0, span, short) if across else (0, k * step, short, span)
        boxes.append(canvas.place(name, concept, cell))
    end = ("left", "right") if across else ("top", "bottom")
    place = int(canvas.rng.integers(number))
    asked = [
        (canvas.phrase("end", end=end[0]), kinds[0][0]),
        (canvas.phrase("end", end=end[1]), kinds[-1][0]),
        (canvas.phrase("nth", nth=ORDINALS[place], end=end[0]), kinds[place][0]),
        (canvas.phrase("how many"), str(number)),
        (canvas.phrase("where", name=kinds[place][0]), canvas.text_of(boxes[place])),
    ]
    return [asked[int(k)] for k in canvas.rng.permutation(len(asked))]


_MAKERS = {
    "count": _count,
    "colour": _colour,
    "relation": _relation,
    "grounding": _grounding,
    "region": _region,
    "wide": _wide,
}
