"""The row layouts people have (LLaVA, ShareGPT, Alpaca, OpenAI messages, captions), read as turns."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accessory.data.image import open_picture
from accessory.schema import Part, Picture, Role, Turn

MARK = "<image>"
COLUMNS: dict[str, dict[str, str]] = {
    "llava": {"conversations": "conversations", "image": "image", "role": "from", "content": "value"},
    "sharegpt": {
        "conversations": "conversations", "image": "image", "role": "from", "content": "value", "system": "system",
    },
    "alpaca": {
        "instruction": "instruction", "input": "input", "output": "output", "system": "system", "image": "image",
    },
    "messages": {"messages": "messages", "role": "role", "content": "content"},
    "captions": {"image": "image", "caption": "caption"},
    "describe": {"image": "image", "caption": "caption", "prompt": "prompt"},
    "text": {"text": "text"},
    "packed": {"ids": "ids"},
    "task": {
        n: n for n in (
            "image", "task", "question", "phrase", "answer", "answers", "options", "box", "boxes", "objects", "points",
            "mark", "hint", "category", "group", "id",
        )
    },
}  # fmt: skip
"""Our column names by kind, with the names that files usually have."""

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


class Layout:
    """Reads rows of one kind. ``root`` is the resolved folder that no picture may lie outside of."""

    def __init__(self, kind: str, columns: Mapping[str, str], root: Path, image_first: bool = False) -> None:
        self._columns = {**COLUMNS[kind], **columns}
        self._root = root
        self._image_first = image_first
        self._read: Callable[[Mapping[str, Any]], Iterator[Turn]] | None = {
            "llava": self._conversation,
            "sharegpt": self._conversation,
            "alpaca": self._alpaca,
            "messages": self._messages,
            "captions": self._caption,
            "describe": self._description,
            "text": self._document,
        }.get(kind)  # rows of tasks are read by data/task_rows.py

    def turns(self, row: Mapping[str, Any]) -> tuple[Turn, ...]:
        """The dialogue of a row; ValueError says what is wrong with it."""
        assert self._read is not None
        turns = tuple(self._read(row))
        if not any(t.role == "assistant" for t in turns):
            raise ValueError("nobody answers: the row has no assistant turn")
        if any(t.role == "system" for t in turns[1:]):
            raise ValueError("a system turn must come first")
        return turns

    def _get(self, row: Mapping[str, Any], name: str) -> Any:
        column = self._columns[name]
        if column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise ValueError(f"no column {column!r} (the row has: {has}); columns: {{{name}: NAME}} tells which it is")
        return row[column]

    def _optional(self, row: Mapping[str, Any], name: str) -> Any:
        return row.get(self._columns.get(name, name))

    def _pictures(self, row: Mapping[str, Any]) -> list[Picture]:
        value = self._optional(row, "image")
        if value is None and self._columns.get("image") == "image":
            value = row.get("images")
        if value is None or value == "":
            return []
        return [self._picture(v) for v in (value if isinstance(value, list) else [value])]

    def _conversation(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        pictures = self._pictures(row)
        system = self._optional(row, "system")
        if isinstance(system, str) and system.strip():
            yield Turn("system", (system.strip(),))
        said: list[tuple[Role, str]] = []
        for message in _list(self._get(row, "conversations"), self._columns["conversations"]):
            if not isinstance(message, Mapping):
                raise ValueError(f"a turn must be an object, got {message!r:.80}")
            said.append((_role(self._get(message, "role")), _text(self._get(message, "content"))))
        yield from self._place(said, pictures)

    def _place(self, said: list[tuple[Role, str]], pictures: list[Picture]) -> Iterator[Turn]:
        """Put pictures where the user's text has their marks; the assistant's text is never searched for marks."""
        marks = sum(text.count(MARK) for role, text in said if role == "user")
        first = self._image_first and not marks
        if marks != len(pictures) and not first:
            hint = "" if marks else "; options: {image_first: true} puts them at the start"
            raise ValueError(f"{marks} {MARK} marks for {len(pictures)} pictures{hint}")
        left = iter(pictures)
        for role, text in said:
            if role != "user":
                yield Turn(role, (text.strip(),))
                continue
            parts: list[Part] = list(left) if first else []
            for i, piece in enumerate([text] if first else text.split(MARK)):
                parts += [next(left), piece] if i else [piece]
            yield Turn(role, _trimmed(parts))

    def _alpaca(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        system = self._optional(row, "system")
        if isinstance(system, str) and system.strip():
            yield Turn("system", (system.strip(),))
        instruction = _text(self._get(row, "instruction")).strip()
        given = self._optional(row, "input")
        if given is not None and _text(given).strip():
            # Two neighbouring texts: the Alpaca template tells instruction from input, other templates join them.
            asked: tuple[Part, ...] = (instruction + "\n", _text(given).strip())
        else:
            asked = (instruction,)
        yield Turn("user", (*self._pictures(row), *asked))
        yield Turn("assistant", (_text(self._get(row, "output")).strip(),))

    def _messages(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        for message in _list(self._get(row, "messages"), self._columns["messages"]):
            if not isinstance(message, Mapping):
                raise ValueError(f"a message must be an object, got {message!r:.80}")
            role, content = _role(self._get(message, "role")), self._get(message, "content")
            if isinstance(content, list):
                yield Turn(role, _trimmed([self._part(p) for p in content]))
            else:
                yield Turn(role, (_text(content).strip(),))

    def _caption(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """A picture to be drawn: the caption asks for it."""
        pictures = self._pictures(row)
        caption = _text(self._get(row, "caption")).strip()
        if len(pictures) != 1 or not caption:
            raise ValueError(f"a caption needs one picture and some text, the row has {len(pictures)} and {caption!r}")
        yield Turn("user", (caption,))
        yield Turn("assistant", (pictures[0],))

    def _description(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """A picture to be described, asked with the row's prompt where it has one; of several captions the first."""
        pictures, caption = self._pictures(row), self._get(row, "caption")
        caption = _text(caption[0] if isinstance(caption, list) and caption else caption).strip()
        if len(pictures) != 1 or not caption:
            raise ValueError(f"a caption needs one picture and some text, the row has {len(pictures)} and {caption!r}")
        prompt = self._optional(row, "prompt")
        yield Turn("user", (*pictures, *(() if prompt is None else (_text(prompt).strip(),))))
        yield Turn("assistant", (caption,))

    def _document(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """Plain text to go on learning the language from, all of it learned (template ``plain``)."""
        yield Turn("assistant", (_text(self._get(row, "text")),))

    def _part(self, part: object) -> Part:
        if isinstance(part, str):
            return part
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping):
            if kind in ("text", "input_text"):
                return _text(part.get("text"))
            if kind in ("image_url", "input_image", "image"):
                value = part.get(kind) if kind != "input_image" else part.get("image_url")
                value = value.get("url", value) if isinstance(value, Mapping) else value
                return self._picture(value if value is not None else part.get("url") or part.get("path"))
        raise ValueError(f"a content part must be of type text or image_url, got {kind!r}")

    def _picture(self, value: object) -> Picture:
        """A picture from a path inside root, a data: URL, raw bytes or a parquet struct of bytes and path."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Picture(open_picture(value))
        if not isinstance(value, str) or not value:
            raise ValueError(f"a picture must be a path or a data: URL, got {value!r:.80}")
        head = value[:16].lower()
        if head.startswith("data:"):
            return Picture(open_picture(_data_url(value)))
        if "://" in head:
            raise ValueError(f"pictures are not fetched from the network or by URL: {value[:80]!r}; store them locally")
        try:
            path = (self._root / value).resolve()  # follows links, so a link out of root is seen
            there = path.is_file()
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise ValueError(f"picture {value[:80]!r} cannot be looked for ({error!s:.200})") from error
        if not path.is_relative_to(self._root):
            raise ValueError(f"picture {value!r} lies outside of the root {self._root}; root: names another")
        if not there:
            raise ValueError(f"no picture at {path} (the folder that pictures count from is root: {self._root})")
        return Picture(str(path))


def packed_ids(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[int]:
    """The ids of a packed row; ValueError where there are none, or something else."""
    ids = row.get({**COLUMNS["packed"], **columns}["ids"])
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"a packed row needs a list of at least two ids, got {ids!r:.80}")
    return ids


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64") or not head.lower().startswith("data:image/"):
        raise ValueError(f"a data: URL must be of the form data:image/...;base64,..., got {head[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data: URL whose base64 cannot be decoded ({error})") from error


def _role(value: object) -> Role:
    role = _ROLES.get(str(value).strip().lower())
    if role is None:
        raise ValueError(f"unknown role {value!r} (there are: {', '.join(_ROLES)})")
    return role


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text, got {value!r:.80}")
    return str(value)


def _list(value: object, column: str) -> list[Any]:
    if isinstance(value, str):  # CSV holds a dialogue as JSON text
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"column {column!r} is text that is not JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be a list of turns that is not empty")
    return value


def _trimmed(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbouring texts joined, blanks cut at both ends of the turn's text, empty texts left out."""
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    texts = [i for i, p in enumerate(joined) if isinstance(p, str) and p.strip()]
    for i in range(len(joined)):
        part = joined[i]
        if isinstance(part, str):
            part = part.lstrip() if not texts or i <= texts[0] else part
            joined[i] = part.rstrip() if not texts or i >= texts[-1] else part
    return tuple(p for p in joined if p != "")
