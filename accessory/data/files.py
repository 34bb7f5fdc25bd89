"""Rows of JSON, JSONL, CSV, TSV and parquet files, by number."""

from __future__ import annotations

import csv
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """Rows by number; ValueError for a row that cannot be parsed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def line(self, index: int) -> int | None:
        """The line of its file on which a row stands (or ends), from 1; None where files of this kind have no lines."""
        ...


def matching(path: Path) -> list[Path]:
    """The files that ``path`` names: one, several where its name holds ``*``, or none."""
    if "*" in path.name:
        return sorted(file for file in path.parent.glob(path.name) if file.is_file())
    return [path] if path.is_file() else []


def open_rows(path: Path) -> Rows:
    """The rows of a file, by its ending, or of all files that a name with ``*`` means, in the order of their names.

    ValueError names the file when it cannot be read.
    """
    found = matching(path)
    if not found:
        raise ValueError(f"no data file at {path}")
    if found != [path]:
        return Joined([open_rows(file) for file in found])
    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            return JsonLines(path)
        if kind == ".json":
            return Listed(_json(path))
        if kind in (".csv", ".tsv"):
            return _table(path, "\t" if kind == ".tsv" else ",")
        if kind == ".parquet":
            return Parquet(path)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    raise ValueError(f"{path}: a data file ends in .json, .jsonl, .csv, .tsv or .parquet")


def _table(path: Path, mark: str) -> Listed:
    rows: list[Any] = []
    lines: list[int] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter=mark)
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    for i, row in enumerate(rows if mark == "\t" else ()):
        if any(isinstance(v, str) and "\n" in v and mark in v for v in row.values()):
            raise ValueError(
                f"{path}: row {i} holds line breaks and tabs between quotation marks: one that begins a text has taken "
                "in the rows behind it; double it and put the text in quotes, or write .jsonl"
            )
    return Listed(rows, lines)


def _json(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); one object a line belongs in a .jsonl file") from error
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(data).__name__}")
    return data


def _mapping(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    return row


class Listed:
    """Rows held in memory, with the ``lines`` on which they end where that is known."""

    def __init__(self, rows: list[Any], lines: Sequence[int] | None = None) -> None:
        self._rows, self._lines = rows, lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _mapping(self._rows[index])

    def line(self, index: int) -> int | None:
        """As :class:`Rows` says."""
        return None if self._lines is None else self._lines[index]


class Joined:
    """Rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def line(self, index: int) -> int | None:
        """As :class:`Rows` says: a line would not say of which of the files."""
        return None


class JsonLines:
    """One object a line, read when asked for; only the lines' offsets are kept in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        offsets, position = [], 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(position)
                position += len(line)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._file: Any = None
        self._owner = -1

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._owner != os.getpid():  # a forked worker must not share the parent's file position
            self._file, self._owner = self._path.open("rb"), os.getpid()
        self._file.seek(int(self._offsets[index]))
        try:
            return _mapping(json.loads(self._file.readline()))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from error

    def line(self, index: int) -> int | None:
        """As :class:`Rows` says; the file is read up to there."""
        with self._path.open("rb") as file:
            before, at = 0, int(self._offsets[index])
            while at > 0:
                piece = file.read(min(at, 1 << 20))
                before, at = before + piece.count(b"\n"), at - len(piece)
        return before + 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": -1}


class Parquet:
    """Rows of a parquet file, one row group in memory at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            meta = pyarrow.parquet.read_metadata(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from error
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._ends = np.cumsum(sizes) if sizes else np.zeros(0, dtype=np.int64)
        self._group = -1
        self._table: Any = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow.parquet

        group = int(np.searchsorted(self._ends, index, side="right"))
        if group != self._group:
            self._table = pyarrow.parquet.ParquetFile(self._path).read_row_group(group)
            self._group = group
        start = int(self._ends[group - 1]) if group else 0
        return _mapping(self._table.slice(index - start, 1).to_pylist()[0])

    def line(self, index: int) -> int | None:
        """As :class:`Rows` says."""
        return None
