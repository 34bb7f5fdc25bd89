"""What a model that dreams says first: whether it knows when a picture is wanted, and what of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from accessory.data import builtin, emoji
from accessory.evaluate.asking import Query
from accessory.models.conditioner import DreamConditioner

SETS = {"emoji-requests": True, "small-talk": False, "emoji-names": False}
"""Test sets of single turns, and whether the answer is a picture."""
HEAD = "| what the user says | of | a picture comes | should |\n|---|---:|---:|---|"
NAMES_HEAD = (
    "| prompts | pairs | of | the right thing is named | another prompt's (control) |\n|---|---|---:|---:|---:|"
)
BATCH = 64


def rates(conditioner: DreamConditioner, cache: Path | None = None, limit: int | None = None) -> Iterator[str]:
    """Lines of a Markdown table (see ``HEAD``): for each set how often greedy decoding asks for a picture, at once or
    within the words that the model may say first.

    Rows of several turns are left out: whether their earlier turns held a picture would be asked as well.
    """
    for name, wanted in SETS.items():
        rows = builtin.build(name, "test", cache=cache, turns=1 if name == "emoji-names" else None)
        asked = [turns[:1] for turns in (rows[i].turns for i in range(len(rows))) if len(turns) == 2]
        step = 1 if limit is None else max(1, len(asked) // limit)
        asked = asked[::step][:limit]
        drawn = 0
        for start in range(0, len(asked), BATCH):
            said = conditioner.replies(asked[start : start + BATCH], max(1, conditioner.reply))
            drawn += sum(reply.draws for reply in said)
        yield f"| {name} | {len(asked)} | {100 * drawn / len(asked):.1f} % | {'yes' if wanted else 'no'} |"


def names(
    conditioner: DreamConditioner, asked: Sequence[Query], others: Sequence[Query], known: Sequence[emoji.Concept]
) -> Iterator[str]:
    """Lines of a Markdown table (see ``NAMES_HEAD``): how often what is said before the picture names what ``asked``
    (dialogues) accept, and how often what ``others``, one for each, accept."""
    said: list[str] = []
    for start in range(0, len(asked), BATCH):
        batch = [query.prompt for query in asked[start : start + BATCH]]
        replies = conditioner.replies(batch, conditioner.reply)
        said += [conditioner.model.tokenizer.decode(list(reply.ids)) for reply in replies]
    for pairs, title in ((True, "held out"), (False, "training"), (None, "any")):
        rows = [i for i, query in enumerate(asked) if query.held_out is pairs]
        if rows:
            right, wrong = (
                sum(named(said[i], [known[row].label for row in queries[i].accepted]) for i in rows)
                for queries in (asked, others)
            )
            n = len(rows)
            yield f"| {asked[0].kind} | {title} | {n} | {100 * right / n:.1f} % | {100 * wrong / n:.1f} % |"


def named(said: str, labels: Sequence[str]) -> bool:
    """Whether a reply ends with one of the labels, whole and not as the end of a longer name."""
    text = said.strip().rstrip(".").lower()
    return any(text == label.lower() or text.endswith(f" of {label.lower()}") for label in labels)
