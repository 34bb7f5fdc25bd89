"""Documents packed into rows of one length, so that pre-training computes no padding and loses no text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from accessory.data.files import open_rows
from accessory.data.tokenizer import Tokenizer


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[list[int]]:
    """The ids of all documents one after another, cut every ``length``; the last row may be shorter.

    A row may begin inside a document and hold several; attention crosses from one to the next. Each document brings
    the mark of its end.

    Raises:
        ValueError: for a length below 2, of which nothing could be learned.
    """
    if length < 2:
        raise ValueError(f"rows of {length} positions have nothing to learn; the length must be at least 2")
    held: list[int] = []
    for document in documents:
        held += document
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    if held:
        yield held


def documents(path: Path, tokenizer: Tokenizer, column: str = "text") -> Iterator[list[int]]:
    """Ids of the texts in a column of a file of rows, each with the end of a sequence behind it.

    Raises:
        ValueError: for a row without text there, or a vocabulary without an end of a sequence.
    """
    rows = open_rows(path)
    for i in range(len(rows)):
        text = rows[i].get(column)
        if not isinstance(text, str):
            has = ", ".join(map(str, rows[i])) or "none"
            raise ValueError(f"{path}, row {i}: no text in column {column!r} (columns are: {has})")
        yield tokenizer.encode(text, eos=True)


def write_packed(paths: Sequence[Path], out: Path, tokenizer: Tokenizer, length: int, column: str = "text") -> int:
    """Pack files into ``out``, a JSONL file of ``{"ids": [...]}`` for sources of kind ``packed``; returns its rows.

    Raises:
        ValueError: when ``out`` exists or does not end in ``.jsonl``, and as :func:`documents`.
    """
    if out.suffix != ".jsonl" or out.exists():
        raise ValueError(f"{out} must be a new file that ends in .jsonl")
    private, count = out.with_name(f".{out.name}.{os.getpid()}"), 0
    try:
        with private.open("w", encoding="utf-8") as file:
            for row in pack((d for path in paths for d in documents(path, tokenizer, column)), length):
                file.write(json.dumps({"ids": row}) + "\n")
                count += 1
        private.rename(out)
    finally:
        private.unlink(missing_ok=True)
    return count
