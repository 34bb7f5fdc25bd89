"""What generators are asked to draw: captions, requests, keywords in place of the name, and riddles written by hand.

Three drawing styles times the emoji concepts; the pairs of the test split are those of
:mod:`accessory.data.builtin`: pairs that training never saw, then as many that it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accessory.data import emoji
from accessory.data.builtin import build
from accessory.data.requests import tag_counts, withheld
from accessory.schema import Prompt, Turn

Kind = Literal["caption", "request", "indirect", "riddle"]
KINDS: tuple[Kind, ...] = ("caption", "request", "indirect", "riddle")
INDIRECT: tuple[tuple[str, ...], ...] = (
    ("I keep thinking of {a} and {b}.", "I believe I know the thing you mean.", "Paint it for me, {style} please."),
    ("What goes together with {a} and {b}?", "I know one thing that does.", "Let me look at it in {style} style."),
    ("My riddle is about {a}, and also about {b}.", "That is easy to guess.", "Answer with a {style} image, then."),
    ("I saw a thing that has to do with {a} and {b}.", "I can picture it.", "Turn it into a {style} icon."),
    ("Guess what I mean: {a}, {b}.", "I have a guess.", "Give me your guess as a {style} drawing."),
    ("Think of {a}, then of {b}. I want that on my card.", "I have it.", "Put a {style} version of it here."),
    ("Could you make a {style} icon of the thing that people link with {a} and with {b}?",),
    ("Which thing do {a} and {b} bring to mind? Reply with a {style} image of it.",),
)
"""Dialogues (user, assistant, user, or the user alone) that no training set holds."""
RIDDLE = "Can you draw {riddle}? I want it {style}."
RIDDLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("something that barks", ("dog", "dog face", "poodle", "guide dog")),
    ("the pet that purrs and hunts mice", ("cat", "cat face")),
    ("the farm animal that says moo and gives milk", ("cow", "cow face")),
    ("the insect that makes honey", ("honeybee",)),
    ("the king of beasts with a mane", ("lion",)),
    ("the grey giant with a trunk", ("elephant",)),
    ("the animal with the longest neck", ("giraffe",)),
    ("the animal with black and white stripes", ("zebra",)),
    ("something with long ears that hops and eats carrots", ("rabbit", "rabbit face")),
    ("the slow one that carries its house on its back", ("snail", "turtle")),
    ("a long reptile that hisses and has no legs", ("snake",)),
    ("what lives in the sea and has eight arms", ("octopus",)),
    ("what a caterpillar becomes", ("butterfly",)),
    ("a bird of the ice that swims and cannot fly", ("penguin",)),
    ("the bird that hoots at night", ("owl",)),
    ("the green animal that croaks by the pond", ("frog",)),
    ("a long yellow fruit that monkeys like", ("banana",)),
    ("a yellow fruit that is very sour", ("lemon",)),
    ("a flat round Italian meal with melted cheese", ("pizza",)),
    ("what opens a lock", ("key", "old key")),
    ("what cuts paper", ("scissors",)),
    ("what keeps you dry when it pours", ("umbrella", "umbrella with rain drops", "closed umbrella")),
    ("what brings people to space", ("rocket",)),
    ("the coloured arch in the sky after a shower", ("rainbow",)),
)
"""Things to guess, and the concepts that are right answers."""


@dataclass(frozen=True)
class Query:
    """One picture to be drawn.

    Attributes:
        number: of the pair in the test split (of the riddle in its set); what noise is derived from.
        accepted: row numbers of the concepts that are right; the real picture is that of the first.
        held_out: whether training never saw this style of this concept; None where several concepts are right.
        fits: concepts that have all the keywords of an indirect request, the right one included.
    """

    kind: Kind
    number: int
    prompt: Prompt
    style: str
    accepted: tuple[int, ...]
    held_out: bool | None
    fits: int | None = None


def queries(kind: Kind, *, cache: Path | None = None, limit: int | None = None) -> tuple[list[Query], int]:
    """All queries of a kind (or ``limit``, spread evenly), and how many pairs were skipped: those of concepts without
    :func:`accessory.data.requests.withheld` keywords.

    Raises:
        ValueError: for an unknown kind and a limit below 2; AssetError when an asset is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"task {kind!r} of a generator is unknown; there are: {', '.join(KINDS)}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}, it must be at least 2 (a shuffle of one picture changes nothing)")
    known = emoji.concepts(cache)
    found = _riddles(known) if kind == "riddle" else _pairs(kind, known, cache)
    made = [query for query in found if query is not None]
    total = len(made) if limit is None else min(limit, len(made))
    return [made[k * len(made) // total] for k in range(total)], len(found) - len(made)


def _pairs(kind: Kind, known: Sequence[emoji.Concept], cache: Path | None) -> list[Query | None]:
    rows = build("emoji-requests" if kind == "request" else "emoji-captions", "test", cache=cache)
    uses = tag_counts(known)
    found: list[Query | None] = []
    for number in range(len(rows)):
        sample = rows[number]
        meta: dict[str, Any] = dict(sample.meta)
        row, style = meta["concept"], meta["style"]
        prompt: Prompt | None = sample.turns[0].text if kind == "caption" else sample.turns[:-1]
        fits = None
        if kind == "indirect":
            tags = withheld(known[row], uses)
            prompt = indirect(number, tags, style) if tags else None
            fits = sum(set(tags) <= set(concept.tags) for concept in known)
        query = None if prompt is None else Query(kind, number, prompt, style, (row,), meta["held_out"], fits)
        found.append(query)
    return found


def indirect(number: int, tags: Sequence[str], style: str) -> tuple[Turn, ...]:
    """A dialogue about two keywords, with the wording of that number."""
    said = INDIRECT[number % len(INDIRECT)]
    words = {"a": tags[0], "b": tags[1], "style": emoji.STYLE_WORDS[style]}
    return tuple(Turn(("user", "assistant")[k % 2], (text.format(**words),)) for k, text in enumerate(said))


def _riddles(known: Sequence[emoji.Concept]) -> list[Query | None]:
    """Every riddle in every style."""
    row_of = {concept.label: k for k, concept in enumerate(known)}
    found: list[Query | None] = []
    for style in emoji.STYLES:
        for riddle, labels in RIDDLES:
            if missing := [label for label in labels if label not in row_of]:
                raise ValueError(f"riddle {riddle!r}: there is no concept {', '.join(missing)}")
            text = RIDDLE.format(riddle=riddle, style=emoji.STYLE_WORDS[style])
            rows = tuple(row_of[label] for label in labels)
            found.append(Query("riddle", len(found), (Turn("user", (text,)),), style, rows, None))
    return found


def partners(asked: Sequence[Query]) -> list[Query]:
    """For each query another one that asks for something else: half a turn around the set, or the next that does.

    Raises:
        ValueError: when all ask for the same thing.
    """
    n, found = len(asked), []
    for k, query in enumerate(asked):
        others = (asked[(k + n // 2 + step) % n] for step in range(n))
        other = next((o for o in others if not set(o.accepted) & set(query.accepted)), None)
        if other is None:
            raise ValueError(f"all {n} queries ask for the same thing: there is nothing to shuffle")
        found.append(other)
    return found


def written(prompt: Prompt) -> str | list[list[str]]:
    """A prompt as JSON knows it: a text, or (role, text) of every turn."""
    return prompt if isinstance(prompt, str) else [[turn.role, turn.text] for turn in prompt]
