"""The tasks of SPHINX's mixture, as values: how each is asked, and what its answers look like.

Wordings are templates over the fields of a row (``task_rows.py``). Where a published system was tuned or scored with a
wording it is an interface, and ``published`` says so; all other wordings are our own.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

AnswerKind = Literal["text", "box", "boxes", "caption", "located", "points"]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FIELDS = ("question", "phrase", "box", "options", "mark", "hint")


def fields_of(wording: str) -> list[str]:
    """The names in braces of a template; ValueError for braces that are none."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(wording) if name is not None]
    except ValueError as error:
        raise ValueError(f"the prompt {wording!r} is no template ({error}); a brace itself is written twice") from error


@dataclass(frozen=True)
class TaskPrompt:
    """How one task is asked.

    ``wordings``: templates, the first of which tests use; training takes them in turn. ``answer``: how an answer is
    written (``data/grounding.py``). ``published``: whether the first wording is that of a published system.
    """

    wordings: tuple[str, ...]
    answer: AnswerKind = "text"
    published: bool = False

    def __post_init__(self) -> None:
        for wording in self.wordings:
            unknown = [f for f in fields_of(wording) if f not in FIELDS]
            if unknown:
                raise ValueError(f"the prompt {wording!r} names {unknown[0]!r}; fields are: {', '.join(FIELDS)}")

    @property
    def fields(self) -> tuple[str, ...]:
        """What every wording needs of a row."""
        return tuple(dict.fromkeys(f for w in self.wordings for f in fields_of(w)))

    def ask(self, values: dict[str, str], which: int = 0) -> str:
        """The wording number ``which`` (they are taken in turn) with ``values`` filled in."""
        return self.wordings[which % len(self.wordings)].format(**values)


TASKS: dict[str, TaskPrompt] = {
    "question": TaskPrompt(("{question}",)),
    "vqa": TaskPrompt(("{question}" + SHORT,), published=True),
    "vizwiz": TaskPrompt(
        ("{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,)
    ),
    "yes-no": TaskPrompt(("{question} Please answer yes or no.",), published=True),
    "choice": TaskPrompt(("{question}\n{options}" + LETTER,), published=True),
    "science": TaskPrompt(("{hint}\n{question}\n{options}" + LETTER,)),
    "caption": TaskPrompt(("Provide a one-sentence caption for the provided image.",), published=True),
    "description": TaskPrompt(("Describe the image in detail.", "What does this picture show? Tell everything.")),
    "region": TaskPrompt(
        ("What is in the region {box}? Answer with a short phrase.", "Name what the box {box} holds.")
    ),
    "grounding": TaskPrompt(
        ("Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",),
        "box",
        published=True,
    ),
    "detection": TaskPrompt(("Give the bounding boxes of every {phrase} in the image.",), "boxes"),
    "caption-grounding": TaskPrompt(
        (
            "Describe the image in one sentence and give the bounding box of everything you name.",
            "Say in a sentence what is here, with a box behind every thing.",
        ),
        "caption",
    ),
    "layout": TaskPrompt(("Name the blocks of this document page, each with its bounding box.",), "located"),
    "pose": TaskPrompt(("Give the key points of the person in the region {box}.",), "points"),
    "ocr": TaskPrompt(("Read all text in the image.", "What is written here?")),
    "ocr-region": TaskPrompt(("Read the text in the region {box}.",)),
    "text-spotting": TaskPrompt(("Read every piece of text in the image and give its bounding box.",), "located"),
    "set-of-mark": TaskPrompt(("What does mark {mark} stand on?", "Name the thing that carries number {mark}.")),
    "set-of-mark-find": TaskPrompt(("Which mark stands on {phrase}? Answer with its number.",)),
}
"""Task prompts by name."""


def get(name: str) -> TaskPrompt:
    """The task called ``name``, or an own wording: any text with a field in braces, answered in text.

    Raises:
        ValueError: for a name that is in no table and holds no field.
    """
    if name in TASKS:
        return TASKS[name]
    if "{" not in name:
        raise ValueError(
            f"no task prompt {name!r}; there are: {', '.join(TASKS)}; an own wording holds a field, e.g. '{{question}}'"
        )
    return TaskPrompt((name,))


def letters(count: int) -> tuple[str, ...]:
    """``A``, ``B``, ... for so many options; ValueError for fewer than two or more than the alphabet has."""
    if not 2 <= count <= len(string.ascii_uppercase):
        raise ValueError(f"{count} options, there must be 2 to {len(string.ascii_uppercase)}")
    return tuple(string.ascii_uppercase[:count])


def write_options(options: tuple[str, ...]) -> str:
    """The options of a multiple choice, a line each: ``A. text``."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters(len(options)), options, strict=True))
