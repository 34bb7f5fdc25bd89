"""VQA accuracy as the official evaluator counts it (Antol et al. 2015; vqa-eval of the VQA v2 challenge).

The evaluator's own quirks are kept, because published numbers hold with them: a point goes unless a digit follows it,
at most 32 of them; a mark becomes nothing where it stands beside a blank anywhere in the text and a blank elsewhere;
contractions get their apostrophes back by a fixed table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE = 4
"""Fewest human answers: an answer is right when three others gave it."""

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_POINT = re.compile(r"\.(?!\d)")
_POINTS = 32

# One apostrophe was lost: the key is the word without it.
_SINGLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
# One of two was lost: a key for either.
_DOUBLE = (
    "couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    for word, parts in (("'ow's'at", ("", "ow", "s", "at")), ("y'all'd've", ("y", "all", "d", "ve"))):
        for gap in range(3):
            joined = [*parts[:gap], parts[gap] + parts[gap + 1], *parts[gap + 2 :]]
            table["'".join(joined)] = word
    # As the official table has them, the second a slip of its own.
    return {**table, "let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
"""What the evaluator writes for a word without its apostrophe."""


def without_marks(text: str) -> str:
    """Punctuation taken out the way the evaluator does."""
    out, number = text, _COMMA.search(text) is not None
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or number else " ")
    return _POINT.sub("", out, count=_POINTS)


def without_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes restored, single blanks."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_vqa(text: str) -> str:
    """An answer as the evaluator compares it."""
    return without_articles(without_marks(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Mean over the people of min(1, others who gave this answer / 3), 0 to 1.

    Where all people agree the official evaluator compares the texts as they are, and so does this.

    Raises:
        ValueError: for fewer than four human answers, of which nobody's could ever be fully right.
    """
    if len(truths) < PEOPLE:
        raise ValueError(
            f"VQA accuracy needs the answers of at least {PEOPLE} people, the row has {len(truths)}; score: exact "
            "compares with a single answer"
        )
    said, given = _one_line(answer), [_one_line(t) for t in truths]
    if len(set(given)) > 1:
        said, given = normalise_vqa(said), [normalise_vqa(t) for t in given]
    same = [t == said for t in given]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)
