"""Endless weighted draws from sources, where draw k depends on nothing but the seed and k."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from accessory import log
from accessory.data.files import matching
from accessory.data.rows import RowRejected
from accessory.data.sources import FileSource, Source
from accessory.data.walk import Walk
from accessory.schema import Sample

LOG = log.get(__name__)
BLOCK = 1024
"""Every block of this many draws holds each source in exactly its share, shuffled; weights hold to one part in it."""


@dataclass(frozen=True)
class Draw:
    """Which source, and which of its rows (beyond its length: a later epoch of an unbounded source)."""

    source: int
    row: int


class Mixture:
    """Draws by number. Each source walks its own shuffled epochs: no row comes twice before all came once."""

    def __init__(self, sources: Sequence[Source], seed: int = 0) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source")
        empty = [s.name for s in sources if len(s) == 0]
        if empty:
            raise ValueError(f"sources without rows: {', '.join(empty)}")
        self.sources = tuple(sources)
        self.seed = seed
        self.quotas = _quotas([s.weight for s in sources])
        self._facts = [_identity(s) for s in sources]  # now: a file may be gone when the next state is taken
        self._epochs: dict[int, tuple[int, np.ndarray[Any, Any]]] = {}
        self._block: tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None

    def draw(self, k: int) -> Draw:
        """What draw ``k`` is, in constant time whatever came before."""
        block, place = divmod(k, BLOCK)
        if self._block is None or self._block[0] != block:
            order = self._shares(block)
            earlier = np.zeros(BLOCK, dtype=np.int64)
            for s in range(len(self.sources)):
                where = np.flatnonzero(order == s)
                earlier[where] = np.arange(len(where))
            self._block = (block, order, earlier)
        source = int(self._block[1][place])
        cursor = block * self.quotas[source] + int(self._block[2][place])
        walk: Walk | None = getattr(self.sources[source], "walk", None)
        if walk is not None:
            return Draw(source, self._walked(walk, source, cursor))
        length = len(self.sources[source])
        epoch, position = divmod(cursor, length)
        row = int(self.order(source, epoch)[position])
        return Draw(source, epoch * length + row if self.sources[source].unbounded else row)

    def first(self, source: int, count: int) -> list[int]:
        """The rows of a source that its first ``count`` draws (of one epoch at most) are, in ascending order."""
        walk: Walk | None = getattr(self.sources[source], "walk", None)
        if walk is None:
            return sorted(int(i) for i in self.order(source, 0)[:count])
        return sorted(self._walked(walk, source, cursor) for cursor in range(count))

    def _walked(self, walk: Walk, source: int, cursor: int) -> int:
        return walk.row(cursor, (self.seed, 1, source), partial(self._draws, source))

    def sample(self, k: int) -> Sample:
        """The sample of draw ``k``; raises :class:`RowRejected` for a bad row."""
        drawn = self.draw(k)
        return self.sources[drawn.source][drawn.row]

    def located(self, rejected: RowRejected, k: int) -> RowRejected:
        """The same verdict on draw ``k`` without its traceback; on a row of a stream, with shard and place there."""
        drawn = self.draw(k)
        source = self.sources[drawn.source]
        if isinstance(source, FileSource) and source.walk is not None and rejected.source == source.name:
            return RowRejected(rejected.reason, *source.where(drawn.row), rejected.verdict)
        return RowRejected(*rejected.args)

    def _shares(self, block: int) -> np.ndarray[Any, Any]:
        order = np.repeat(np.arange(len(self.sources)), self.quotas)
        np.random.default_rng((self.seed, 0, block)).shuffle(order)
        return order

    def _draws(self, source: int, first: int, last: int) -> np.ndarray[Any, Any]:
        """Which draws of the mixture are the draws ``first`` to before ``last`` of a source."""
        quota = self.quotas[source]
        blocks = range(first // quota, (last - 1) // quota + 1)
        found = np.concatenate([np.flatnonzero(self._shares(b) == source) + b * BLOCK for b in blocks])
        return found[first - blocks[0] * quota :][: last - first]

    def order(self, source: int, epoch: int) -> np.ndarray[Any, Any]:
        """The rows of a source in the order in which an epoch draws them."""
        kept = self._epochs.get(source)
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng((self.seed, 1, source, epoch))
            kept = self._epochs[source] = (epoch, rng.permutation(len(self.sources[source])))
        return kept[1]

    def fingerprint(self) -> str:
        """Changes with whatever would make draw k another row: seed, sources, lengths, shares, not folders."""
        facts = [self.seed, [(*f, len(s), q) for f, s, q in zip(self._facts, self.sources, self.quotas, strict=True)]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _identity(source: Source) -> tuple[str | int, ...]:
    """What a source is whatever folder the run starts in: its name, or a file's own name, and the size of the files."""
    path = getattr(getattr(source, "config", None), "path", None)
    if path is None:
        return (source.name,)
    file = Path(path)
    if (walk := getattr(source, "walk", None)) is not None:
        return (file.name if source.name == path else source.name, walk.fact)
    return (file.name if source.name == path else source.name, sum(f.stat().st_size for f in matching(file)))


def _quotas(weights: Sequence[float]) -> list[int]:
    """Draws a block for each source: largest remainders, at least one each."""
    if len(weights) > BLOCK:
        raise ValueError(f"{len(weights)} sources, the limit is {BLOCK}")
    shares = np.array(weights, dtype=np.float64)
    if not np.isfinite(shares).all() or (shares <= 0).any():
        raise ValueError(f"weights must be positive numbers, got {list(weights)}")
    exact = shares / shares.sum() * BLOCK
    quotas = np.maximum(1, np.floor(exact)).astype(int)
    while quotas.sum() < BLOCK:
        quotas[np.argmax(exact - quotas)] += 1
    while quotas.sum() > BLOCK:
        surplus = np.where(quotas > 1, quotas - exact, -np.inf)
        quotas[np.argmax(surplus)] -= 1
    return [int(q) for q in quotas]


class Ledger:
    """The book of rejected rows: reason, source and row of each once, and a stop when they become too many.

    Ranks and a resumed run share the file ``path``: what already stands there is not written again.
    """

    def __init__(self, path: Path | None = None, *, max_rate: float = 0.05, after: int = 200) -> None:
        self.path = path
        self.max_rate = max_rate
        self.after = after
        self.seen = 0
        self.bad = 0
        self._warned = False
        self._written: set[tuple[Any, ...]] = set()
        self._known = 0  # bytes of the file that were looked at

    def good(self) -> None:
        """Count a row that was used."""
        self.seen += 1

    def reject(self, row: RowRejected, draw: int) -> None:
        """Record a row that was not; ValueError once more than ``max_rate`` of at least ``after`` rows are bad."""
        self.seen += 1
        self.bad += 1
        if self.path is not None:
            self._write(self.path, {"draw": draw, "source": row.source, "row": row.index, "reason": row.reason})
            if not self._warned:
                LOG.warning("a row was rejected: %s; this one and all others are listed in %s", row, self.path)
                self._warned = True
        if self.seen >= self.after and self.bad > self.max_rate * self.seen:
            where = f"; the ledger is {self.path}" if self.path else ""
            raise ValueError(
                f"{self.bad} of {self.seen} draws were of rows that are rejected, data.max_bad_rate is "
                f"{self.max_rate:.0%}; last: {row}{where}"
            )

    def _write(self, path: Path, entry: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Backslashes for half a character, which UTF-8 cannot write.
        written = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with path.open("a+b") as file:
            file.seek(self._known)
            torn = b""
            for line in file:
                if not line.endswith(b"\n"):  # of a process that was killed: the next entry begins a line of its own
                    torn = b"\n"
                    continue
                self._known += len(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that something else wrote
                    self._written.add(_row(json.loads(line)))
            if _row(json.loads(written)) not in self._written:
                file.write(torn + written)

    def state_dict(self) -> dict[str, int]:
        """Counts so far."""
        return {"seen": self.seen, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting."""
        self.seen, self.bad = state["seen"], state["bad"]


def _row(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one entry of the book from another."""
    return entry["source"], entry["row"], entry["reason"]


def check_fingerprint(mixture: Mixture, state: Mapping[str, Any]) -> None:
    """ValueError when ``state`` was taken from another mixture, whose draw k is another row."""
    now = mixture.fingerprint()
    if state["fingerprint"] != now:
        raise ValueError(
            f"the data changed since the checkpoint (sources, lengths, weights or seed: {state['fingerprint']} then, "
            f"{now} now); an exact resume needs the same data"
        )
