"""Batches of an endless mixture, encoded in worker processes; their order does not depend on how many there are."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from accessory.data.collate import collate
from accessory.data.deal import Deal, remaining
from accessory.data.mixture import Ledger, Mixture, check_fingerprint
from accessory.data.rows import RowRejected
from accessory.schema import Batch, Encoded, Prompt, Sample, Target

_CHUNK = 16  # draws a worker encodes at a time


class RowEncoder(Protocol):
    """What makes rows of samples: dialogues (``data/encode.py``) or prompts with pictures (``data/targets.py``)."""

    @property
    def tile_size(self) -> int:
        """S of the tiles (N,3,S,S)."""
        ...

    @property
    def pad_id(self) -> int:
        """What stands in ``ids`` behind the end of a row."""
        ...

    def encode(self, sample: Sample) -> Encoded:
        """The sample's row. Raises :class:`RowRejected`."""
        ...


@dataclass(frozen=True)
class _Row:
    """What is known of an encoded draw beside its tensors: positions, tiles, and the pictures that it asks for."""

    source: str
    index: int
    positions: int
    tiles: int
    targets: tuple[tuple[Prompt, str, tuple[int, ...]], ...]  # prompt, key, shape


@dataclass(frozen=True)
class _Packed:
    """A chunk of encoded draws in few tensors, because every tensor sent between processes costs a file handle."""

    draws: tuple[int, ...]
    rows: tuple[_Row | RowRejected, ...]  # or why not
    ids: torch.Tensor
    labels: torch.Tensor
    tiles: torch.Tensor
    targets: torch.Tensor  # flat


class _Draws(Dataset[_Packed]):
    """Encodes chunks of draws; what is wrong with a row travels back as a value."""

    def __init__(self, mixture: Mixture, encoder: RowEncoder) -> None:
        self._mixture = mixture
        self._encoder = encoder

    def __getitem__(self, draws: Sequence[int]) -> _Packed:
        rows: list[_Row | RowRejected] = []
        kept: list[Encoded] = []
        for k in draws:
            try:
                row = self._encoder.encode(self._mixture.sample(k))
            except RowRejected as rejected:
                rows.append(RowRejected(rejected.reason, rejected.source, rejected.index))  # without its traceback
                continue
            kept.append(row)
            targets = tuple((t.prompt, t.key, tuple(t.pixels.shape)) for t in row.targets)
            rows.append(_Row(row.source, row.index, len(row.ids), len(row.tiles), targets))
        size = self._encoder.tile_size
        none = torch.zeros(0, dtype=torch.long)
        return _Packed(
            tuple(draws),
            tuple(rows),
            torch.cat([none, *(r.ids for r in kept)]),
            torch.cat([none, *(r.labels for r in kept)]),
            torch.cat([torch.zeros(0, 3, size, size), *(r.tiles for r in kept)]),
            torch.cat([torch.zeros(0), *(t.pixels.flatten() for r in kept for t in r.targets)]),
        )


def _unpack(packed: _Packed) -> Iterator[tuple[int, Encoded | RowRejected]]:
    kept = [row for row in packed.rows if isinstance(row, _Row)]
    shapes = [shape for row in kept for _, _, shape in row.targets]
    ids, labels = ((t.split([r.positions for r in kept]) if kept else ()) for t in (packed.ids, packed.labels))
    tiles = packed.tiles.split([r.tiles for r in kept]) if kept else ()
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    pixels = iter([packed.targets[a:b].view(shape) for (a, b), shape in zip(pairwise(ends), shapes, strict=True)])
    tensors = iter(zip(ids, labels, tiles, strict=True))
    for k, row in zip(packed.draws, packed.rows, strict=True):
        if isinstance(row, RowRejected):
            yield k, row
            continue
        targets = tuple(Target(next(pixels), prompt, key) for prompt, key, _ in row.targets)
        yield k, Encoded(*next(tensors), row.source, row.index, targets, draw=k)


def _same(packed: Any) -> Any:
    return packed


def _outlive_signals(worker: int) -> None:
    """Schedulers, torchrun and terminals signal a whole process group. The run decides when to end: a worker that died
    first would turn an orderly stop, which saves, into an error. Workers end with their parent in any case."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Loader:
    """Endless batches with the cursor of the last one handed out.

    ``window`` batches are gathered and sorted by length so that rows of one batch are about equally long; 1 keeps the
    draw order. Of ``world`` ranks each takes every world-th draw. ``state_dict`` belongs to the batches the caller
    has received, however far the workers have read ahead.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: RowEncoder,
        batch_size: int,
        *,
        num_workers: int = 0,
        window: int = 1,
        rank: int = 0,
        world: int = 1,
        ledger: Ledger | None = None,
    ) -> None:
        if batch_size < 1 or window < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size} and window {window} must be at least 1, rank {rank} < {world}")
        self.mixture = mixture
        self.encoder = encoder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.window = window
        self.rank = rank
        self.world = world
        self.ledger = ledger or Ledger()
        self._order = Deal()
        self._state: dict[str, Any] = {"step": 0, "given": 0, "taken": [], "ledger": self.ledger.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Where the caller stands: the rank's draw at which its window begins, and how many batches of it it has."""
        order = [list(self._order.left), self._order.start]
        return {
            **self._state, "fingerprint": self.mixture.fingerprint(), "deal": order,
            "batch_size": self.batch_size, "window": self.window, "world": self.world,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the last one received; ValueError when the stream would be another."""
        check_fingerprint(self.mixture, state)
        for key in ("batch_size", "window", "world"):
            if state[key] != getattr(self, key):
                raise ValueError(f"an exact resume needs the same {key}: {state[key]} then, {getattr(self, key)} now")
        left, start = state.get("deal", ([], 0))
        self._order = Deal(tuple(left), start)
        self._state = {"taken": [], **{k: state[k] for k in self._state if k in state}}

    def dealt_anew(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A state for this rank of those that all ranks, of another number, had: nobody read what it begins with.

        Raises:
            ValueError: for states of a version that did not say which rows they had handed out of a window.
        """
        if bad := [s for s in states if s["given"] and not s.get("taken")]:
            raise ValueError(f"a checkpoint of {len(states)} ranks does not say what {bad[0]['given']} batches held")
        states = [{"taken": [], **state} for state in states]
        left, start = states[0].get("deal", ([], 0))
        deal = remaining(Deal(tuple(left), start), states)
        book = {"seen": 0, "bad": 0}
        if self.rank == 0:  # which keeps the book of what was before
            book = {name: sum(state["ledger"][name] for state in states) for name in book}
            book["seen"] += sum(len(state["taken"]) for state in states)
        place = {"step": 0, "given": 0, "taken": [], "ledger": book, "deal": [list(deal.left), deal.start]}
        return {**states[0], **place, "world": self.world}

    def __iter__(self) -> Iterator[Batch]:
        step, skip = self._state["step"], self._state["given"]
        self.ledger.load_state_dict(self._state["ledger"])
        stream = self._encoded(step)
        while True:
            book = self.ledger.state_dict()
            taken: list[int] = []
            batches, following = self._window(stream, step)
            for i, rows in enumerate(batches):
                taken = [*taken, *(row.draw for row in rows)]
                if i < skip:
                    continue
                done = i + 1 == len(batches)
                self._state = (
                    {"step": following, "given": 0, "taken": [], "ledger": self.ledger.state_dict()}
                    if done
                    else {"step": step, "given": i + 1, "taken": taken, "ledger": book}
                )
                yield collate(rows, self.encoder.pad_id)
            step, skip = following, 0

    def _encoded(self, start: int) -> Iterator[tuple[int, Encoded | RowRejected]]:
        loader: DataLoader[_Packed] = DataLoader(
            _Draws(self.mixture, self.encoder),
            batch_size=None,
            sampler=_Chunks(self._order, start, self.rank, self.world),
            num_workers=self.num_workers,
            collate_fn=_same,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else it takes a seed from the global one, and a resumed run draws another
        )
        for packed in loader:
            yield from _unpack(packed)

    def _window(
        self, stream: Iterator[tuple[int, Encoded | RowRejected]], start: int
    ) -> tuple[list[list[Encoded]], int]:
        """The next window's batches and the rank's draw that follows them; bad rows go to the ledger."""
        rows: list[Encoded] = []
        step = start
        while len(rows) < self.batch_size * self.window:
            k, row = next(stream)
            step += 1
            if isinstance(row, RowRejected):
                self.ledger.reject(row, k)
            else:
                self.ledger.good()
                rows.append(row)
        if self.window > 1:
            rows.sort(key=lambda r: len(r.ids))  # stable, so equal lengths keep their order
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        order = np.random.default_rng((self.mixture.seed, 2, start)).permutation(len(batches))
        return [batches[i] for i in order], step


class _Chunks:
    """Endless chunks of one rank's draws."""

    def __init__(self, deal: Deal, start: int, rank: int, world: int) -> None:
        self._order, self._start, self._rank, self._world = deal, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start
        while True:
            yield [self._order[i * self._world + self._rank] for i in range(step, step + _CHUNK)]
            step += _CHUNK
