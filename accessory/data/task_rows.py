"""Rows of task data (a picture, the fields of a question, its answers), read as samples to train on or to be scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from accessory.data import grounding as ground
from accessory.data import task_prompts
from accessory.data.grounding import Box, BoxForm, Located
from accessory.data.image import open_picture
from accessory.data.layouts import Layout
from accessory.data.task_prompts import TaskPrompt
from accessory.schema import Picture, Sample, Turn

MARKED = ("set-of-mark", "set-of-mark-find")


class TaskLayout(Layout):
    """Reads rows of kind ``task``. ``task`` names a prompt (or is one), unless a row's own column ``task`` does.

    ``letters``: right answers are letters of the options, which they always are where the prompt lists these.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        root: Path,
        task: str = "",
        boxes: BoxForm = "xyxy",
        decimals: int = 3,
        letters: bool = False,
    ) -> None:
        super().__init__("task", columns, root)
        self._task, self._form, self._decimals, self._letters = task, boxes, decimals, letters
        if task:
            task_prompts.get(task)  # a wrong name is the file's mistake, not a row's

    def sample(self, row: Mapping[str, Any], which: int = 0) -> Sample:
        """The question of a row (its wording number ``which``) and its answer, with what scorers need in ``meta``.

        ``meta``: ``task``, ``answers`` (all that count as right), ``options``, ``category``, ``group`` (rows of one
        picture), ``id``. ValueError says what is wrong with the row.
        """
        name = str(self._optional(row, "task") or self._task)
        if not name:
            raise ValueError("no task: name it in options: {task: NAME}, or in a column task")
        prompt = task_prompts.get(name)
        pictures = self._pictures(row)
        opened = _Opened(pictures)
        options = self._options(row)
        values = {f: self._field(row, f, opened, options) for f in prompt.fields}
        answers = self._answers(row, prompt, opened, options)
        if name in MARKED and self._optional(row, "boxes") is not None:
            pictures = [Picture(ground.draw_marks(opened.picture, self._boxes(row, opened)))]
        asked = Turn("user", (*pictures, prompt.ask(values, which)))
        return Sample((asked, Turn("assistant", (answers[0],))), meta={
            "task": name, "answers": answers, "options": options,
            "category": str(self._optional(row, "category") or ""),
            "group": str(self._optional(row, "group") or self._image_name(row)), "id": self._optional(row, "id"),
        })  # fmt: skip

    def _image_name(self, row: Mapping[str, Any]) -> str:
        value = self._optional(row, "image")
        return value if isinstance(value, str) and not value.startswith("data:") else ""

    def _field(self, row: Mapping[str, Any], name: str, opened: _Opened, options: tuple[str, ...]) -> str:
        if name == "options":
            if not options:
                raise ValueError("the prompt lists options, and the row has none: column options, or columns A, B, ...")
            return task_prompts.write_options(options)
        if name == "box":
            return ground.write_boxes([self._box(self._get(row, "box"), opened)], self._decimals)
        return _words(self._get(row, name), name)

    def _options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """From a list (or JSON text of one), a mapping of letters, or columns A, B, ... as in MMBench's files."""
        value = self._optional(row, "options")
        if value is None or value == "":
            lettered = [row.get(letter) for letter in task_prompts.letters(10)]
            there = [v for v in lettered if v is not None and str(v).strip() not in ("", "nan")]
            return tuple(str(v).strip() for v in there) if len(there) > 1 else ()
        value = _json(value, "options")
        listed = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(listed, list) or len(listed) < 2:
            raise ValueError(f"options must be a list of at least two, got {value!r:.80}")
        return tuple(_words(v, "options").strip() for v in listed)

    def _answers(
        self, row: Mapping[str, Any], prompt: TaskPrompt, opened: _Opened, options: tuple[str, ...]
    ) -> tuple[str, ...]:
        write = self._written(prompt, row, opened)
        if write is not None:
            return (write(),)
        listed = self._optional(row, "answers")
        if listed is None or listed == "":
            answers = [_words(self._get(row, "answer"), "answer").strip()]
        else:
            listed = _json(listed, "answers")
            if not isinstance(listed, list) or not listed:
                raise ValueError(f"answers must be a list that is not empty, got {listed!r:.80}")
            # The official VQA files hold an object for each of ten people.
            answers = [_words(a.get("answer") if isinstance(a, Mapping) else a, "answers").strip() for a in listed]
        if options and (self._letters or "options" in prompt.fields):
            answers = [_letter(a, options) for a in answers]
        return tuple(answers)

    def _written(self, prompt: TaskPrompt, row: Mapping[str, Any], opened: _Opened) -> Callable[[], str] | None:
        """What writes the answer from a row's boxes or points; None where the answer is in words."""
        decimals = self._decimals

        def boxes() -> str:
            box = self._optional(row, "box")
            found = self._boxes(row, opened) if box is None else [self._box(box, opened)]
            return ground.write_boxes(found, decimals)

        def located() -> str:
            return ground.write_located(self._objects(row, opened), decimals)

        def caption() -> str:
            words = _words(self._get(row, "answer"), "answer").strip()
            return ground.write_caption(words, self._objects(row, opened), decimals)

        def points() -> str:
            named = _json(self._get(row, "points"), "points")
            if not isinstance(named, Mapping) or not named:
                raise ValueError(f"points must be an object of name: [x, y] that is not empty, got {named!r:.80}")
            size = opened.picture.size
            placed = {str(n): ground.point_to_square(p, *size, self._form) for n, p in named.items()}
            return ground.write_points(placed, decimals)

        return {"box": boxes, "boxes": boxes, "located": located, "caption": caption, "points": points}.get(
            prompt.answer
        )

    def _box(self, value: object, opened: _Opened) -> Box:
        value = _json(value, "box")
        if not isinstance(value, list | tuple) or not all(isinstance(v, int | float) for v in value):
            raise ValueError(f"a box must be four numbers, got {value!r:.80}")
        size = (1, 1) if self._form == "square" else opened.picture.size
        return ground.to_square(value, *size, self._form)

    def _boxes(self, row: Mapping[str, Any], opened: _Opened) -> list[Box]:
        value = _json(self._get(row, "boxes"), "boxes")
        if not isinstance(value, list) or not value:
            raise ValueError(f"boxes must be a list that is not empty, got {value!r:.80}")
        return [self._box(v, opened) for v in value]

    def _objects(self, row: Mapping[str, Any], opened: _Opened) -> list[Located]:
        value = _json(self._get(row, "objects"), "objects")
        if not isinstance(value, list) or not value:
            raise ValueError(f"objects must be a list of {{name, box or boxes}} that is not empty, got {value!r:.80}")
        found = []
        for item in value:
            if not isinstance(item, Mapping) or "name" not in item or not ("box" in item or "boxes" in item):
                raise ValueError(f"an object must have a name and a box or boxes, got {item!r:.80}")
            boxes = item["boxes"] if "boxes" in item else [item["box"]]
            found.append(Located(str(item["name"]), tuple(self._box(b, opened) for b in boxes)))
        return found


class _Opened:
    """The row's picture, opened when a coordinate or a mark first needs it."""

    def __init__(self, pictures: list[Picture]) -> None:
        self._pictures = pictures
        self._image: Image.Image | None = None

    @property
    def picture(self) -> Image.Image:
        if len(self._pictures) != 1:
            raise ValueError(f"boxes and points count on one picture, the row has {len(self._pictures)}")
        if self._image is None:
            self._image = open_picture(self._pictures[0].source)
        return self._image


def _letter(answer: str, options: tuple[str, ...]) -> str:
    """The letter of the right option, which a file names by letter, by number from 0, or by its text."""
    known = task_prompts.letters(len(options))
    if answer in options:
        return known[options.index(answer)]
    if answer.upper() in known:
        return answer.upper()
    if answer.isdigit() and int(answer) < len(options):
        return known[int(answer)]
    raise ValueError(f"the answer {answer!r} is no letter, number (from 0) or text of the options {list(options)}")


def _json(value: object, name: str) -> Any:
    """A value that CSV holds as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"column {name} is text that is not JSON ({error}): {value[:80]!r}") from error


def _words(value: object, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"column {name} must be text, got {value!r:.80}")
    return str(value)
