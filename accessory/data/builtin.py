"""The built-in picture sets, as samples: emoji names, groups and tags, scenes, words, easy-vqa, flags, and emoji to be
drawn, where the user asks and the picture is the assistant's.

``build(name, split)`` gives something with a length and items. An index beyond the length is the same item in a later
pass: it is drawn anew in training (the random generator is seeded by (seed, index)) and is identical in test.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from accessory.data import emoji, requests, scenes, small_talk, words
from accessory.data.assets import asset_dir, default_cache
from accessory.data.flags import countries, flag_pictures
from accessory.schema import CAPTION, Part, Picture, Sample, Turn

Split = Literal["train", "test"]
SCENE_COUNT: dict[Split, int] = {"train": 20_000, "test": 400}
BLENDED = 0.15  # share of training pictures that lie between the two drawing styles
NAME_QUESTIONS = ("What is this?", "Name this picture.", "What does the picture show?", "What do you see?")
GROUP_QUESTIONS = ("What kind of thing is this?", "Which group does this belong to?")
TAG_QUESTIONS = ("Give three keywords for this picture.", "Describe this picture with three keywords.")
READ_QUESTIONS = ("What does it say?", "Read the word.", "What is written here?")
FLAG_QUESTIONS = {
    "country": ("Which country has this flag?", "Whose flag is this?", "Name the country of this flag."),
    "capital": ("What is the capital of this country?", "Name the capital of the country with this flag."),
    "region": ("In which part of the world is this country?", "Which region is this country in?"),
}


@dataclass(frozen=True)
class BuiltinSet:
    """``length`` items of one split. Any index i >= 0 is item ``i % length`` as drawn in pass ``i // length``."""

    name: str
    split: Split
    length: int
    make: Callable[[int, int], Sample]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """The sample; IndexError below zero (any index above is allowed)."""
        if index < 0:
            raise IndexError(f"sample {index} of {self.name!r}: indices begin at 0")
        return self.make(index % self.length, index)


@dataclass(frozen=True)
class _Request:
    """What ``build`` was asked for, handed to the maker of that set."""

    name: str
    split: Split
    cache: Path
    seed: int
    size: int
    turns: int
    ask: str

    @property
    def training(self) -> bool:
        return self.split == "train"

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 0 if self.training else 1, index))

    def choose(self, wordings: tuple[str, ...], rng: np.random.Generator) -> str:
        """Any wording in training, always the first in test."""
        return wordings[int(rng.integers(len(wordings)))] if self.training else wordings[0]

    def sample(self, index: int, picture: Image.Image, asked: list[tuple[str, str]], **meta: Any) -> Sample:
        """A dialogue: the picture comes first in the first turn, before its question."""
        turns: list[Turn] = []
        for question, answer in asked:
            turns += [Turn("user", (question,)), Turn("assistant", (answer,))]
        turns[0] = Turn("user", (Picture(picture), asked[0][0]))
        return Sample(
            tuple(turns), f"builtin:{self.name}:{self.split}", index, {"task": self.name, "answer": asked[0][1], **meta}
        )


Maker = Callable[[int, int], Sample]


def build(
    name: str,
    split: Split,
    *,
    cache: Path | None = None,
    seed: int = 0,
    size: int = 128,
    turns: int | None = None,
    ask: str = "country",
) -> BuiltinSet:
    """The built-in set of that name (see ``NAMES``).

    ``size`` is the side of pictures in pixels (the shorter side of wide scenes). ``turns`` bounds the questions about
    one training picture (default 4 for easy-vqa and 2 elsewhere); a test sample always asks one. ``ask`` is what the
    test of flags asks: country, capital or region. ValueError for an unknown name, split or option; AssetError when an
    asset is not in the cache.
    """
    if name not in NAMES:
        raise ValueError(f"built-in set {name!r} is unknown; there are: {', '.join(NAMES)}")
    if split not in SCENE_COUNT:
        raise ValueError(f"split {split!r} of built-in set {name!r} is unknown; there are: train, test")
    if ask not in FLAG_QUESTIONS:
        raise ValueError(f"ask={ask!r} is unknown; there are: {', '.join(FLAG_QUESTIONS)}")
    if not 32 <= size <= 1024:
        raise ValueError(f"size={size} of built-in set {name!r} is outside 32..1024 pixels")
    if turns is not None and turns < 1:
        raise ValueError(f"turns={turns} of built-in set {name!r} is below 1")
    most = (turns or (4 if name == "easy-vqa" else 2)) if split == "train" else 1
    request = _Request(name, split, cache or default_cache(), seed, size, most, ask)
    length, make = NAMES[name](request)
    return BuiltinSet(name, split, length, make)


def _emoji(
    request: _Request, questions: tuple[str, ...], answer_of: Callable[[emoji.Concept], str]
) -> tuple[int, Maker]:
    """One picture, one question. Training: two styles, augmented. Test: the third style, plain, in concept order."""
    known = emoji.concepts(request.cache)
    rows = [k for k, c in enumerate(known) if answer_of(c)]
    styles = emoji.TRAIN_STYLES if request.training else (emoji.TEST_STYLE,)
    drawn = [emoji.pictures(s, cache=request.cache) for s in styles]

    def make(item: int, index: int) -> Sample:
        row, style = rows[item % len(rows)], item // len(rows)
        rng = request.rng(index)
        rgba = drawn[style][row]
        if request.training and rng.random() < BLENDED:
            rgba = emoji.blend(rgba, drawn[1 - style][row], float(rng.uniform(0.5, 0.9)))
        pixels = emoji.augment(rgba, request.size, rng) if request.training else emoji.plain(rgba, request.size)
        asked = [(request.choose(questions, rng), answer_of(known[row]))]
        return request.sample(index, Image.fromarray(pixels), asked, concept=row, style=styles[style])

    return len(rows) * len(styles), make


def _names(request: _Request) -> tuple[int, Maker]:
    return _emoji(request, NAME_QUESTIONS, lambda c: c.label)


def _groups(request: _Request) -> tuple[int, Maker]:
    return _emoji(request, GROUP_QUESTIONS, lambda c: c.group)


def _tags(request: _Request) -> tuple[int, Maker]:
    return _emoji(request, TAG_QUESTIONS, lambda c: ", ".join(c.tags[:3]) if len(c.tags) >= 3 else "")


def _scenes(task: str, request: _Request) -> tuple[int, Maker]:
    """Every training index is a new scene; the test has a fixed number of them."""

    def make(item: int, index: int) -> Sample:
        drawn = scenes.scene(
            task,
            request.seed,
            index if request.training else item,
            request.split,
            size=request.size,
            turns=request.turns,
            cache=request.cache,
        )
        return request.sample(index, drawn.image, list(drawn.turns), boxes=drawn.boxes)

    return SCENE_COUNT[request.split], make


def _words(request: _Request) -> tuple[int, Maker]:
    known = words.word_list(request.split, request.cache)

    def make(item: int, index: int) -> Sample:
        rng = request.rng(index if request.training else item)
        text = words.cased(known[item], rng)
        picture = words.draw_word(text, request.size, rng, request.cache)
        return request.sample(index, picture, [(request.choose(READ_QUESTIONS, rng), text)])

    return len(known), make


def _easy_vqa(request: _Request) -> tuple[int, Maker]:
    """The published split. Training: the questions about a picture in dialogues of up to ``turns``; test: one each."""
    folder = asset_dir("easy-vqa", request.cache) / "easy_vqa" / "data" / request.split
    dialogues = _grouped(folder, request.turns, request.seed)

    def make(item: int, index: int) -> Sample:
        picture, asked = dialogues[item]
        with Image.open(folder / "images" / f"{picture}.png") as opened:
            image = opened.convert("RGB").resize((request.size, request.size), Image.Resampling.BICUBIC)
        order = request.rng(index).permutation(len(asked)) if request.training else range(len(asked))
        return request.sample(index, image, [asked[int(k)] for k in order], image=picture)

    return len(dialogues), make


def _grouped(folder: Path, turns: int, seed: int) -> list[tuple[int, list[tuple[str, str]]]]:
    """(picture number, its questions) with at most ``turns`` questions each; file order when ``turns`` is 1."""
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    if turns == 1:
        return [(number, [(question, answer)]) for question, answer, number in rows]
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in rows:
        asked.setdefault(number, []).append((question, answer))
    result = []
    for number, pairs in asked.items():
        # Mixed before cutting: the file lists yes/no questions in blocks.
        mixed = [pairs[int(k)] for k in np.random.default_rng((seed, number)).permutation(len(pairs))]
        result += [(number, mixed[k : k + turns]) for k in range(0, len(mixed), turns)]
    return result


def _flags(request: _Request) -> tuple[int, Maker]:
    """Flags of the member states of the United Nations; the test shows each once, plainly, as training never does."""
    known = countries(request.cache)
    drawn = flag_pictures(cache=request.cache)

    def make(item: int, index: int) -> Sample:
        country, rng = known[item], request.rng(index)
        facts = {"country": country.name, "capital": country.capital, "region": country.region}
        if request.training:
            pixels = emoji.augment(drawn[item], request.size, rng)
            kinds = ["country", ("capital", "region")[int(rng.integers(2))]][: request.turns]
        else:
            pixels = emoji.plain(drawn[item], request.size)
            kinds = [request.ask]
        asked = [(request.choose(FLAG_QUESTIONS[k], rng), facts[k]) for k in kinds]
        return request.sample(index, Image.fromarray(pixels), asked, country=country.code)

    return len(known), make


Saying = Callable[[emoji.Concept, str, np.random.Generator], requests.Said]


def _drawn(request: _Request, said: Saying, reply: Saying = lambda *_: ()) -> tuple[int, Maker]:
    """One request, answered by a plain picture, behind what ``reply`` says. Test: the pairs that are held out, then as
    many of training's."""
    known = emoji.concepts(request.cache)
    all_pairs = [(s, k) for s in emoji.STYLES for k in range(len(known))]
    hidden = [p for p in all_pairs if emoji.held_out(p[0], known[p[1]].hexcode)]
    shown = [p for p in all_pairs if not emoji.held_out(p[0], known[p[1]].hexcode)]
    step = len(shown) // max(1, len(hidden))
    pairs = shown if request.training else hidden + shown[::step][: len(hidden)]
    drawn = {style: emoji.pictures(style, cache=request.cache) for style in emoji.STYLES}

    def make(item: int, index: int) -> Sample:
        style, row = pairs[item]
        picture = Image.fromarray(emoji.plain(drawn[style][row], request.size))
        rng, word = request.rng(index), emoji.STYLE_WORDS[style]
        asked = said(known[row], word, rng)
        turns = tuple(Turn(("user", "assistant")[k % 2], (text,)) for k, text in enumerate(asked))
        answer: tuple[Part, ...] = (*reply(known[row], word, rng), Picture(picture))
        held = not request.training and item < len(hidden)
        meta: dict[str, Any] = {
            "task": request.name,
            "answer": known[row].label,
            "concept": row,
            "style": style,
            "held_out": held,
        }
        meta[CAPTION] = request.name == "emoji-captions"
        return Sample((*turns, Turn("assistant", answer)), f"builtin:{request.name}:{request.split}", index, meta)

    return len(pairs), make


def _captions(request: _Request) -> tuple[int, Maker]:
    """``STYLE emoji of LABEL``; in training some captions say the group, some two keywords, as well."""

    def said(concept: emoji.Concept, style: str, rng: np.random.Generator) -> requests.Said:
        plain, kind = f"{style} emoji of {concept.label}", rng.random()
        if request.training and kind < 0.1:
            return (f"{plain}, {concept.group}",)
        tagged = request.training and kind < 0.25 and concept.tags
        return (f"{plain}, {', '.join(concept.tags[:2])}" if tagged else plain,)

    return _drawn(request, said)


def _requests(request: _Request, share: float = requests.KEYWORDS_SHARE) -> tuple[int, Maker]:
    """The same asked for in a dialogue, in training often by keywords alone: in a ``share`` of the rows."""
    known = emoji.concepts(request.cache)
    uses = requests.tag_counts(known)
    held_back = {concept.hexcode: requests.withheld(concept, uses) for concept in known}

    def said(concept: emoji.Concept, style: str, rng: np.random.Generator) -> requests.Said:
        return requests.said(concept, style, held_back[concept.hexcode], rng, training=request.training, share=share)

    return _drawn(request, said, functools.partial(requests.reply, training=request.training))


def _small_talk(request: _Request) -> tuple[int, Maker]:
    """Talk without a picture; in four rows of ten it goes on after a picture was asked for and drawn, or before."""
    known = emoji.concepts(request.cache)
    count, draw = _requests(replace(request, name="emoji-requests", split="train"))

    def make(item: int, index: int) -> Sample:
        rng = request.rng(index)
        asked, answer = small_talk.exchange(known[item], rng, training=request.training)
        said: tuple[Turn, ...] = (Turn("user", (asked,)), Turn("assistant", (answer,)))
        place = rng.random()
        if place < 0.4:
            drawn = draw(int(rng.integers(count)), index).turns
            said = (*drawn, *said) if place < 0.25 else (*said, *drawn)
        meta = {"task": request.name, "answer": answer}
        return Sample(said, f"builtin:{request.name}:{request.split}", index, meta)

    return len(known), make


NAMES: dict[str, Callable[[_Request], tuple[int, Maker]]] = {
    "emoji-names": _names,
    "emoji-groups": _groups,
    "emoji-tags": _tags,
    **{f"scenes-{task}": functools.partial(_scenes, task) for task in scenes.TASKS},
    "words-ocr": _words,
    "easy-vqa": _easy_vqa,
    "flags": _flags,
    "emoji-captions": _captions,
    "emoji-requests": _requests,
    "emoji-keywords": functools.partial(_requests, share=1.0),
    "small-talk": _small_talk,
}
DRAWN = frozenset(("emoji-captions", "emoji-requests", "emoji-keywords", "small-talk"))
"""Sets whose pictures are the assistant's."""
