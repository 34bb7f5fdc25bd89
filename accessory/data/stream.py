"""Rows of shards that no memory holds: found by number through an index, read where they stand."""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

from accessory.data import shards as found
from accessory.data.parquet_stream import Parquet
from accessory.data.shards import Index, Indexes, Shard
from accessory.data.walk import Walk
from accessory.data.webdataset import Tar

Format = Literal["webdataset", "parquet"]


class _Reader(Protocol):
    """What knows a format of shards."""

    @property
    def kind(self) -> str: ...

    def scan(self, shard: Shard) -> Index: ...

    def count(self, index: Index) -> int: ...

    def read(self, shard: Shard, index: Index, row: int) -> dict[str, Any]: ...

    def label(self, shard: Shard, index: Index, row: int) -> str: ...


class Streamed:
    """Rows of many shards, one shard after the other. Only ``buffer`` of them are ever in memory.

    ``walk`` is the order in which they are to be drawn, so that a reader moves forward.
    """

    def __init__(self, shards: Sequence[Shard], reader: _Reader, cache: Path, buffer: int, lanes: int) -> None:
        self._reader = reader
        self._indexes = Indexes(shards, reader.kind, reader.scan, cache)
        lengths = [reader.count(self._indexes[i]) for i in range(len(shards))]
        self._ends = list(accumulate(lengths))
        self.walk = Walk([posixpath.basename(s.url) for s in shards], lengths, buffer, lanes)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``; ValueError says what is wrong with it."""
        shard, row = self._at(index)
        for again in (False, True):
            try:
                return self._reader.read(self._indexes.shards[shard], self._indexes[shard], row)
            except OSError as error:  # a connection that broke is made anew
                if again:
                    raise ValueError(f"the shard cannot be read ({error})") from error
        raise AssertionError

    def line(self, index: int) -> int | None:
        """Shards have no lines."""
        return None

    def where(self, index: int) -> tuple[str, int]:
        """The shard of row ``index`` with the row's key or row group, and the row's number in the shard."""
        shard, row = self._at(index)
        url = self._indexes.shards[shard].url
        label = self._reader.label(self._indexes.shards[shard], self._indexes[shard], row)
        return (f"{url}: {label}" if label else url), row


def open_stream(
    path: str, split: str, kind: Format, columns: Mapping[str, Sequence[str]], cache: Path, buffer: int, lanes: int
) -> Streamed:
    """The rows of all shards of ``path``, see :func:`accessory.data.shards.find`; ``columns`` as of :class:`Parquet`.

    The first time reads what the index needs (of a tar shard all headers, of a parquet shard its end) and keeps it in
    the folder ``streams`` of ``cache``. ValueError names a shard that is not there, or that cannot be indexed.
    """
    reader: _Reader = Tar() if kind == "webdataset" else Parquet(buffer, lanes, **columns)
    return Streamed(found.find(path, split), reader, cache, buffer, lanes)
