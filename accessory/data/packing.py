"""Training without padding: samples that share packs, uncut and unseen by each other; documents for pre-training,
which are written one after another and cut into rows of one length."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accessory.data.files import open_rows
from accessory.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PackingConfig:
    """Packs of whole samples: at most ``length`` positions and ``tiles`` tiles each (null: any number of tiles)."""

    length: int
    tiles: int | None = None

    def __post_init__(self) -> None:
        if self.length < 2 or (self.tiles is not None and self.tiles < 1):
            raise ValueError(f"data.packing: length {self.length} must be at least 2 and tiles {self.tiles} at least 1")

    def misfit(self, positions: int, tiles: int) -> str | None:
        """Why a sample is in no pack; None when one can hold it."""
        if positions < 1:
            return "it has no positions: packs are of dialogues"
        if positions > self.length:
            return f"{positions} positions, a pack holds {self.length} (data.packing.length)"
        if self.tiles is not None and tiles > self.tiles:
            return f"{tiles} tiles, a pack holds {self.tiles} (data.packing.tiles)"
        return None

    def share(self, positions: int, tiles: int) -> float:
        """Of a pack, what is taken by the scarcer of the two."""
        return max(positions / self.length, tiles / self.tiles if self.tiles else 0.0)


def knapsack(sizes: Sequence[tuple[int, int]], config: PackingConfig, first: int = 0) -> list[list[int]]:
    """Packs as indices into ``sizes``, the (positions, tiles) of samples that fit alone: the largest first, each where
    the least room remains (best fit decreasing). The ``first`` ones go before all others: they are in no late pack."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []
    unlimited = sum(tiles for _, tiles in sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (i >= first, -config.share(*sizes[i]), -sizes[i][0], i)):
        positions, tiles = sizes[i]
        fits = [(p, k) for k, (p, t) in enumerate(room) if positions <= p and tiles <= t]
        if fits:
            _, k = min(fits)
        else:
            k = len(packs)
            packs.append([])
            room.append((config.length, unlimited if config.tiles is None else config.tiles))
        packs[k].append(i)
        room[k] = (room[k][0] - positions, room[k][1] - tiles)
    return packs


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
