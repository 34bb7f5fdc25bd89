"""Reading the rows of a run as the run will, and keeping what there is to say about them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from accessory.data.audit import Counts, Prints, count, oddities
from accessory.data.encode import Encoder
from accessory.data.loader import Loader, RowEncoder
from accessory.data.mixture import BLOCK, Ledger, Mixture
from accessory.data.packing import PackingConfig
from accessory.data.rows import RowRejected, Verdict
from accessory.data.sources import FileSource, Source
from accessory.schema import IDS, Batch, Encoded, Sample
from accessory.tokens import IGNORE

EXAMPLES = 3  # rows that are named of each kind
_KEPT = 4  # encoded rows of each source that are kept whole
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|(?:/[^\s/,;:()]+)+|\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Place:
    """A row: its source, its number from 0, the line in its file where the file has lines, and what is said of it."""

    source: str
    row: int
    line: int | None
    said: str

    def __str__(self) -> str:
        where = f"row {self.row}" if self.line is None else f"line {self.line}"
        return f"{self.source}, {where}" + (f": {self.said}" if self.said else "")


def place(source: Source, row: int, said: str) -> Place:
    """Where a row stands: in its file, by line where that has lines, or in its shard."""
    if not isinstance(source, FileSource):
        return Place(source.name, row, None, said)
    name, at = source.where(row) if source.walk is not None else (source.name, row)
    return Place(name, at, source.line(row), said)


@dataclass
class Tally:
    """How many rows something is true of, and the first of them."""

    count: int = 0
    examples: list[Place] = field(default_factory=list)

    def add(self, source: Source, row: int, said: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(place(source, row, said))


@dataclass
class Survey:
    """What was found in a source.

    ``rejected``: rows that the run drops, by verdict and reason without its details; ``odd``: what looks wrong in rows
    that it takes; ``unlearned``: rows that it takes and learns nothing of; ``over``: positions and placeholders of
    those that are too long; ``kept``: a few rows, with those that have pictures before others.
    """

    source: Source
    read: int = 0
    counts: list[Counts] = field(default_factory=list)
    rejected: dict[tuple[Verdict, str], Tally] = field(default_factory=dict)
    odd: dict[str, Tally] = field(default_factory=dict)
    unlearned: Tally = field(default_factory=Tally)
    over: list[Counts] = field(default_factory=list)
    doubles: Tally = field(default_factory=Tally)
    kept: list[tuple[Sample, Encoded]] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Rows that the run could not use."""
        return sum(t.count for t in self.rejected.values())


class Reader:
    """Rows of sources through the encoder of a run; each is read once.

    ``look`` is called with every sample that can be used and its row. ``packing``: the packs that must hold them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: RowEncoder,
        look: Callable[[Sample, Encoded], None] | None = None,
        packing: PackingConfig | None = None,
    ) -> None:
        self.surveys = [Survey(s) for s in sources]
        self.encoder, self.look, self.packing, self.prints = encoder, look, packing, Prints()
        self.known: dict[tuple[int, int], Counts | None] = {}  # None: rejected
        self.places: dict[str, Place] = {}  # of rows of files, by fingerprint
        self.shown: dict[str, Place] = {}  # the same of their pictures

    def read(self, number: int, row: int) -> Counts | None:
        """What row ``row`` of source ``number`` holds; None when the run drops it."""
        if (number, row) not in self.known:
            self.known[number, row] = self._read(self.surveys[number], row)
        return self.known[number, row]

    def _read(self, survey: Survey, row: int) -> Counts | None:
        survey.read += 1
        sample = None
        try:
            sample = survey.source[row]
            encoded = self.encoder.encode(sample)
            if self.packing is not None:
                self.packing.check(encoded)
        except RowRejected as rejected:
            key = (rejected.verdict, _DETAIL.sub("*", rejected.reason))
            survey.rejected.setdefault(key, Tally()).add(survey.source, row, rejected.reason)
            if rejected.verdict == "too-long" and sample is not None:
                survey.over.append(self._length(sample))
            return None
        found = count(encoded)
        survey.counts.append(found)
        if not found.learned and not found.targets:
            survey.unlearned.add(survey.source, row, "no position has a label that is learned")
        for said in oddities(sample.turns):
            survey.odd.setdefault(said, Tally()).add(survey.source, row, said)
        if isinstance(survey.source, FileSource):
            self._note(survey, sample, row)
        if len(survey.kept) < _KEPT or (len(encoded.tiles) and not any(len(e.tiles) for _, e in survey.kept)):
            survey.kept.append((sample, encoded))
        if self.look is not None:
            self.look(sample, encoded)
        return found

    def _length(self, sample: Sample) -> Counts:
        """Of a row that is longer than it may be."""
        assert isinstance(self.encoder, Encoder)
        if IDS in sample.meta:
            return count(self.encoder.packed(sample.meta[IDS]))
        return count(self.encoder.row(sample.turns))

    def _note(self, survey: Survey, sample: Sample, row: int) -> None:
        """Remember what a row of a file says and shows."""
        assert isinstance(survey.source, FileSource)
        here = place(survey.source, row, "")
        before = self.places.setdefault(self.prints.row(sample), here)
        if before is not here:
            survey.doubles.add(survey.source, row, f"the same as {before}")
        for digest in self.prints.pictures(sample):
            self.shown.setdefault(digest, here)


class _Remembered(Mixture):
    """The draws of a mixture, each as no more than its number and its row."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__(mixture.sources, mixture.seed)

    def sample(self, k: int) -> Sample:
        drawn = self.draw(k)
        return Sample((), str(drawn.source), drawn.row % len(self.sources[drawn.source]))


class _Blank:
    """Rows of the right size and number of labels, without what stands in them."""

    tile_size, pad_id = 1, 0

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def encode(self, sample: Sample) -> Encoded:
        found = self._reader.read(int(sample.source), sample.index)
        if found is None:
            raise RowRejected("dropped", sample.source, sample.index)
        labels = torch.full((found.positions,), IGNORE)
        labels[found.positions - found.learned :] = 0
        tiles = torch.zeros(found.tiles, 3, 1, 1)
        return Encoded(torch.zeros(found.positions, dtype=torch.long), labels, tiles, sample.source, sample.index)


def batches(loader: Loader, reader: Reader, most: int) -> Iterator[Batch]:
    """The first batches that a fresh ``loader`` gives, with blank rows in place of the real ones.

    Of rows that ``reader`` has not read few are read in addition: where it knows a part of a source they end with that.
    There are ``most`` draws at most, but for what the last window of packs takes.
    """
    draws, mixture = most, loader.mixture
    for survey, quota in zip(reader.surveys, mixture.quotas, strict=True):
        if survey.read < len(survey.source):
            draws = min(draws, survey.read * BLOCK // quota)
    look = copy.copy(loader)
    look.mixture, look.encoder, look.num_workers = _Remembered(mixture), _Blank(reader), 0
    look.ledger, look._packed = Ledger(max_rate=1.0), [0, 0]
    taken = 0
    for batch in look:
        taken += len(batch.ids)
        yield batch
        if taken + len(batch.ids) > draws:
            return


def rows_of(number: int, source: Source, mixture: Mixture | None, limit: int) -> list[int]:
    """Numbers of the rows to read: all, or the first ``limit`` that a run draws (0: no limit)."""
    if not limit or len(source) <= limit:
        return list(range(len(source)))
    return list(range(limit)) if mixture is None else mixture.first(number, limit)


def shared(reader: Reader, tests: Sequence[Source]) -> tuple[Tally, Tally]:
    """Rows of test files that were met in training, and rows whose picture was."""
    rows, pictures = Tally(), Tally()
    for source in tests:
        for i in range(len(source)):
            try:
                sample = source[i]
            except RowRejected:
                continue
            same = reader.places.get(reader.prints.row(sample))
            if same is not None:
                rows.add(source, i, f"is {replace(same, said='in training')}")
                continue
            seen = [reader.shown[d] for d in reader.prints.pictures(sample) if d in reader.shown]
            if seen:
                pictures.add(source, i, f"its picture is that of {replace(seen[0], said='in training')}")
    return rows, pictures
