"""The order in which rows of a stream are drawn: the row of any draw is known at once, and a reader moves forward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Walk:
    """Every epoch visits all rows once: shards in an order of its own, rows shuffled in stretches of ``buffer``.

    ``names`` and ``lengths`` are those of the shards. A stretch is cut into ``lanes`` runs of neighbouring rows, and
    draw k takes its row from run k modulo ``lanes``. Of as many ranks as there are lanes each therefore reads a part of
    a shard that no other reads. The order does not depend on the number of ranks or workers.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], buffer: int, lanes: int) -> None:
        self._lengths: Numbers = np.array(lengths, dtype=np.int64)
        self._starts: Numbers = np.cumsum(self._lengths) - self._lengths
        self.rows = int(self._lengths.sum())
        self.buffer, self.lanes = buffer, lanes
        facts = json.dumps([list(names), [int(n) for n in lengths], buffer, lanes])
        self.fact = hashlib.sha256(facts.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        self._epoch: tuple[Any, Numbers, Numbers] | None = None
        self._stretch: tuple[Any, Numbers] | None = None

    def row(self, cursor: int, seed: tuple[int, ...], draws: Callable[[int, int], Numbers]) -> int:
        """The row that the stream's own draw ``cursor`` takes; ``draws(a, b)`` tells which draws of all a..b-1 are."""
        epoch, position = divmod(cursor, self.rows)
        stretch, at = divmod(position, self.buffer)
        key = (seed, epoch, stretch)
        if self._stretch is None or self._stretch[0] != key:
            first = cursor - at
            count = min(self.buffer, self.rows - stretch * self.buffer)
            lane = draws(first, first + count) % self.lanes if self.lanes > 1 else np.zeros(count, dtype=np.int64)
            chance = np.random.default_rng((*seed, epoch, stretch)).random(count)
            places = np.empty(count, dtype=np.int64)
            places[np.lexsort((chance, lane))] = np.arange(count)
            self._stretch = (key, places)
        return self._at(stretch * self.buffer + int(self._stretch[1][at]), (*seed, epoch))

    def _at(self, position: int, seed: tuple[int, ...]) -> int:
        if self._epoch is None or self._epoch[0] != seed:
            order = np.random.default_rng(seed).permutation(len(self._lengths))
            self._epoch = (seed, order, np.cumsum(self._lengths[order]))
        _, order, ends = self._epoch
        i = int(np.searchsorted(ends, position, side="right"))
        shard = order[i]
        return int(self._starts[shard] + position - (ends[i] - self._lengths[shard]))
