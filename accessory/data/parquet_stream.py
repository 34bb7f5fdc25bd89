"""Parquet shards read piece by piece: never a row group in memory, only as many rows as a stream shuffles."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from accessory.data.shards import Index, Shard

PIECE = 64  # rows that are decoded together
_UNREADABLE = np.array([-1], dtype=np.int64)
Group = tuple[str, int]


class _Pieces:
    """The pieces of a row group, one after the other. Where one cannot be read, all that follow it are lost with it."""

    def __init__(self, tables: Iterator[Any]) -> None:
        self.tables = tables
        self.next = 0


class Parquet:
    """Reads rows of parquet shards. Pieces of ``buffer`` rows stay in memory, and two more of each of ``lanes`` places.

    ``columns``: those that are read where a file has them; one that lacks any in ``needed`` is read whole, so that the
    error can name what it has.
    """

    kind = "parquet 1"

    def __init__(self, buffer: int, lanes: int, columns: Sequence[str] = (), needed: Sequence[str] = ()) -> None:
        self.most = -(-buffer // PIECE) + 2 * lanes
        self._lanes = lanes
        self._columns, self._needed = list(columns), set(needed)
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self.held: OrderedDict[tuple[Group, int], Any] = OrderedDict()
        self._readers: OrderedDict[Group, _Pieces] = OrderedDict()
        self._broken: dict[Group, tuple[int, str]] = {}  # the piece from which on a group cannot be read

    def __getstate__(self) -> dict[str, Any]:
        kept = ("most", "_lanes", "_columns", "_needed")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def scan(self, shard: Shard) -> Index:
        """Where the rows of each row group end; -1 alone for what is no parquet file. Raises OSError."""
        import pyarrow

        try:
            with shard.open() as file:
                meta = _open(file).metadata
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system; those of the format have no number
            return _UNREADABLE
        return np.cumsum(np.array(sizes, dtype=np.int64)) if sizes else np.zeros(1, dtype=np.int64)

    def count(self, index: Index) -> int:
        """Rows of a shard; one, which is rejected, where it cannot be read."""
        return abs(int(index[-1]))

    def read(self, shard: Shard, index: Index, row: int) -> dict[str, Any]:
        """Row ``row``; ValueError says what is wrong with it."""
        if index[0] < 0:
            raise ValueError(
                f"the shard of {shard.size} bytes is not a parquet file, or its end is lost: no row is read"
            )
        group = int(np.searchsorted(index, row, side="right"))
        number, at = divmod(row - (int(index[group - 1]) if group else 0), PIECE)
        try:
            values: dict[str, Any] = self._piece(shard, group, number).slice(at, 1).to_pylist()[0]
        except ArithmeticError as error:  # a date beyond Python's
            raise ValueError(f"a value cannot be read ({error})") from error
        return values

    def label(self, shard: Shard, index: Index, row: int) -> str:
        """The row group."""
        return "" if index[0] < 0 else f"row group {int(np.searchsorted(index, row, side='right'))}"

    def _piece(self, shard: Shard, group: int, number: int) -> Any:
        import pyarrow

        if self._owner != os.getpid():  # a forked worker must not share the parent's file position
            self._forget()
        place = (shard.url, group)
        if (place, number) in self.held:
            self.held.move_to_end((place, number))
            return self.held[place, number]
        bad, why = self._broken.get(place, (number + 1, ""))
        if number >= bad:
            raise ValueError(why)
        reader = self._readers.get(place)
        if reader is None or reader.next > number:
            reader = self._readers[place] = _Pieces(self._tables(shard, group))
        self._readers.move_to_end(place)
        while len(self._readers) > self._lanes:
            self._readers.popitem(last=False)
        try:
            while reader.next <= number:
                self.held[place, reader.next] = next(reader.tables)
                reader.next += 1
                while len(self.held) > self.most:
                    self.held.popitem(last=False)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            del self._readers[place]
            if isinstance(error, OSError) and error.errno is not None:
                raise
            first = reader.next * PIECE
            why = f"row group {group} cannot be read from its row {first} on ({str(error) or 'it ends there'})"
            self._broken[place] = (reader.next, why)
            raise ValueError(why) from error
        return self.held[place, number]

    def _tables(self, shard: Shard, group: int) -> Iterator[Any]:
        import pyarrow

        with shard.open() as source:
            file = _open(source)
            known = set(file.schema_arrow.names)
            columns = [c for c in self._columns if c in known] if self._needed <= known else []
            left = None
            for batch in file.iter_batches(PIECE, row_groups=[group], columns=columns or None, use_threads=False):
                table = pyarrow.Table.from_batches([batch])
                left = table if left is None else pyarrow.concat_tables([left, table])
                while left.num_rows >= PIECE:  # a batch may be shorter where a column comes in parts
                    yield left.slice(0, PIECE)
                    left = left.slice(PIECE)
            if left is not None and left.num_rows:
                yield left


def _open(file: Any) -> Any:
    import pyarrow.parquet

    # Without pre_buffer and with a small buffer, columns are read page by page instead of a whole row group at a time.
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16, page_checksum_verification=True)
