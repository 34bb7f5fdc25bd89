"""How a picture is asked for in training, by name or by keywords, in one turn or after some talk, and what is said
before it is drawn: its name, so that keywords are understood in words first.

What :mod:`accessory.evaluate.asking` asks with is kept away from here: its wordings, and for every concept the pair of
keywords that it asks with (:func:`withheld`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from accessory.data.emoji import Concept

Said = tuple[str, ...]
"""What user and assistant say in turn, the user first and last."""
BY_NAME: tuple[Said, ...] = (
    ("Draw {label} as a {style} emoji.",),
    ("Show me {label}, as a {style} emoji.",),
    ("A {style} picture of {label}, please.",),
    ("I would like a {style} emoji of {label}.",),
    ("Do you know {label}?", "Yes, I do.", "Draw it as a {style} emoji."),
    ("My next word is {label}.", "All right.", "A {style} emoji of it, please."),
)
BY_KEYWORDS: tuple[Said, ...] = (
    ("Draw something {style} for these words: {tags}.",),
    ("A {style} emoji that goes with {tags}, please.",),
    ("Which emoji says {tags}? Draw it in {style}.",),
    ("I need a {style} picture about {tags}.",),
    ("Draw what you know about {tags}, as a {style} emoji.",),
    ("Show me something {style} that means {tags}.",),
    ("There should be an emoji about {tags}.", "There is one.", "Draw it, {style}."),
    ("I am looking for an emoji. The words are {tags}.", "I have found it.", "Show it to me as a {style} emoji."),
    ("Name something about {tags}.", "I would rather draw it.", "Yes, a {style} emoji, please."),
    ("Guess the thing: it has to do with {tags}.", "That is clear.", "Then make a {style} emoji of it."),
    ("Can you draw something that is about {tags}? Make it {style}.",),
)
KEYWORDS_SHARE = 0.6  # of training's requests
REPLY = "Here you are: {style} emoji of {label}."
REPLY_SHARE = 0.9  # of training's pictures; the others come at once, as where one is forced
_WORD = re.compile(r"\w+")


def said(
    concept: Concept,
    style: str,
    held_back: Sequence[str],
    rng: np.random.Generator,
    *,
    training: bool,
    share: float = KEYWORDS_SHARE,
) -> Said:
    """A request for the concept; for the test always by its name and in the first wording.

    ``held_back``: keywords of which a training row has at most one less than all, see :func:`withheld`. ``share``: of
    the requests of training that say keywords in place of the name.
    """
    tags = _drawn_tags(concept, held_back, rng) if training and rng.random() < share else ()
    wordings = BY_KEYWORDS if tags else BY_NAME
    chosen = wordings[int(rng.integers(len(wordings))) if training else 0]
    words = {"label": concept.label, "style": style, "tags": _listed(tags)}
    return tuple(text.format(**words) for text in chosen)


def reply(concept: Concept, style: str, rng: np.random.Generator, *, training: bool) -> Said:
    """What is said before the picture, if anything is: the name stands behind the colon as captions write it."""
    if training and rng.random() >= REPLY_SHARE:
        return ()
    return (REPLY.format(label=concept.label, style=style),)


def _drawn_tags(concept: Concept, held_back: Sequence[str], rng: np.random.Generator) -> Said:
    """One to three keywords in any order, but never all that are held back."""
    count = min(int(rng.integers(1, 4)), len(concept.tags))
    tags = [concept.tags[i] for i in rng.permutation(len(concept.tags))[:count]]
    if held_back and set(held_back) <= set(tags):
        tags.remove(held_back[-1])
    return tuple(tags)


def _listed(tags: Sequence[str]) -> str:
    return tags[0] if len(tags) == 1 else f"{', '.join(tags[:-1])} and {tags[-1]}" if tags else ""


def tag_counts(concepts: Sequence[Concept]) -> Counter[str]:
    """How many concepts have each keyword."""
    return Counter(tag for concept in concepts for tag in concept.tags)


def withheld(concept: Concept, uses: Mapping[str, int]) -> Said:
    """The two telling keywords that the fewest concepts have (``uses``), but not the first two keywords, which captions
    of training say; none where there is no such pair."""
    tags = sorted(telling(concept), key=lambda tag: (uses[tag], tag))
    return next((pair for pair in combinations(tags, 2) if set(pair) != set(concept.tags[:2])), ())


def telling(concept: Concept) -> list[str]:
    """Keywords that do not give the label away: no word of theirs equals one of the label's, holds one or lies in one
    (of three letters or more), or begins with the same four letters."""
    label = _WORD.findall(concept.label.lower())
    return [tag for tag in concept.tags if not any(_akin(a, b) for a in _WORD.findall(tag.lower()) for b in label)]


def _akin(a: str, b: str) -> bool:
    if a == b:
        return True
    short, long = sorted((a, b), key=len)
    return len(short) >= 3 and (short in long or (len(short) >= 4 and short[:4] == long[:4]))
