"""Batches of an endless mixture, padded or packed, encoded in worker processes; their order does not depend on how many
there are."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from accessory.data.collate import collate
from accessory.data.deal import Deal, remaining
from accessory.data.mixture import Ledger, Mixture, check_fingerprint
from accessory.data.packing import PackingConfig, knapsack
from accessory.data.rows import RowRejected
from accessory.schema import Batch, Encoded, Prompt, Sample, Target

_CHUNK = 16  # draws a worker encodes at a time
_READY = 1024  # rows that are held ready at most: each chunk costs memory and four file handles
_SHORT = 64  # positions of the rows that packs are expected to hold


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
                rows.append(self._mixture.located(rejected, k))
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
    draw order. Every epoch is shuffled anew by the mixture and no row is left over at its end: windows reach across. Of
    ``world`` ranks each takes every world-th draw, and all of them deal their windows in the same order of lengths, so
    that no rank waits long for another. ``state_dict`` belongs to the batches the caller has received, however far the
    workers have read ahead.

    With ``packing`` the rows of a window are put into packs, of which a batch has ``batch_size``; the emptiest wait for
    the next window, but no row waits twice while another can. A row that no pack can hold goes to the ledger.
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
        packing: PackingConfig | None = None,
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
        self.packing = packing
        self._order = Deal()
        self._packed = [0, 0]  # positions and packs handed out
        self._state: dict[str, Any] = self._place(0, 0, [], self.ledger.state_dict())

    @property
    def filled(self) -> float | None:
        """Share of the positions of all packs handed out that hold a sample; None before the first."""
        positions, packs = self._packed
        return positions / (packs * self.packing.length) if packs and self.packing is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Where the caller stands: the rank's draw at which its window begins, which rows wait from earlier ones, the
        number of the window, and how many batches of it the caller has, with which draws."""
        order = {"deal": [list(self._order.left), self._order.start]}
        return {**self._state, **order, "fingerprint": self.mixture.fingerprint(), **self._settings()}

    def _settings(self) -> dict[str, Any]:
        packing = None if self.packing is None else asdict(self.packing)
        return {"batch_size": self.batch_size, "window": self.window, "world": self.world, "packing": packing}

    @staticmethod
    def _place(step: int, number: int, held: Sequence[Encoded], book: Mapping[str, int]) -> dict[str, Any]:
        waiting = [r.draw for r in held]
        return {"step": step, "number": number, "held": waiting, "given": 0, "taken": [], "ledger": dict(book)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the last one received; ValueError when the stream would be another."""
        check_fingerprint(self.mixture, state)
        for key, now in self._settings().items():
            then = state.get(key)
            if then != now:
                raise ValueError(f"an exact resume needs the same {key}: {then} then, {now} now")
        place, count = {"held": [], "taken": [], **state}, self.batch_size * self.window
        if "number" not in place:  # of a version that counted draws; without a rejected row they tell the window
            if place["step"] % count:
                raise ValueError(
                    f"the checkpoint is of a version that dealt rows otherwise from draw {place['step']} on"
                )
            place["number"] = place["step"] // count
        left, start = state.get("deal", ([], 0))
        self._order = Deal(tuple(left), start)
        self._state = {k: place[k] for k in self._state}

    def dealt_anew(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A state for this rank of those that all ranks, of another number, had: nobody read what it begins with.

        Raises:
            ValueError: for states of a version that did not say which rows they had handed out of a window.
        """
        if bad := [s for s in states if s["given"] and not s.get("taken")]:
            raise ValueError(f"a checkpoint of {len(states)} ranks does not say what {bad[0]['given']} batches held")
        states = [{"held": [], "taken": [], "number": 0, **state} for state in states]
        left, start = states[0].get("deal", ([], 0))
        deal = remaining(Deal(tuple(left), start), states)
        book = {"seen": 0, "bad": 0}
        if self.rank == 0:  # which keeps the book of what was before
            book = {name: sum(state["ledger"][name] for state in states) for name in book}
            book["seen"] += sum(len(state["taken"]) - len(state["held"]) for state in states)  # those are read again
        place = self._place(0, 1 + max(state["number"] for state in states), [], book)
        return {**states[0], **place, "deal": [list(deal.left), deal.start], "world": self.world}

    def __iter__(self) -> Iterator[Batch]:
        place = dict(self._state)
        step, number, skip = place["step"], place["number"], place["given"]
        self.ledger.load_state_dict(place["ledger"])
        held = self._again(place["held"])
        stream = self._encoded(step)
        while True:
            begin = self._place(step, number, held, self.ledger.state_dict())
            rows, step = self._gather(stream, held, step)
            batches, held = self._deal(rows, begin["held"], number)
            number += 1
            taken: list[int] = []
            for i, batch in enumerate(batches, start=1):
                taken = [*taken, *(row.draw for row in batch)]
                if i <= skip:
                    continue
                done = i == len(batches)
                self._state = (
                    self._place(step, number, held, self.ledger.state_dict())
                    if done
                    else {**begin, "given": i, "taken": taken}
                )
                yield self._collated(batch)
            skip = 0

    def _collated(self, rows: Sequence[Encoded]) -> Batch:
        if self.packing is not None:
            self._packed[0] += sum(len(r.ids) for r in rows)
            self._packed[1] += self.batch_size
        return collate(rows, self.encoder.pad_id, packed=self.packing is not None)

    def _again(self, draws: Sequence[int]) -> list[Encoded]:
        """Rows that waited when the state was taken."""
        rows = [row for _, row in _unpack(_Draws(self.mixture, self.encoder)[draws])] if draws else []
        for row in rows:
            if isinstance(row, RowRejected):
                raise ValueError(f"a row that waited for its pack can no longer be used: {row}")
        return [row for row in rows if isinstance(row, Encoded)]

    def _encoded(self, start: int) -> Iterator[tuple[int, Encoded | RowRejected]]:
        loader: DataLoader[_Packed] = DataLoader(
            _Draws(self.mixture, self.encoder),
            batch_size=None,
            sampler=_Chunks(self._order, start, self.rank, self.world),
            num_workers=self.num_workers,
            # A window of rows ahead: fewer would let a step wait for the rest of its window.
            prefetch_factor=self._ahead() if self.num_workers else None,
            collate_fn=_same,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else it takes a seed from the global one, and a resumed run draws another
        )
        for packed in loader:
            yield from _unpack(packed)

    def _ahead(self) -> int:
        """Chunks that each worker may hold ready: together those of a window, and one more."""
        rows = self.batch_size * self.window
        if self.packing is not None:
            rows *= -(-self.packing.length // max(_SHORT, getattr(self.encoder, "positions_per_tile", 0)))
        return max(2, -(-min(rows, _READY) // (_CHUNK * self.num_workers)) + 1)

    def _gather(
        self, stream: Iterator[tuple[int, Encoded | RowRejected]], held: Sequence[Encoded], step: int
    ) -> tuple[list[Encoded], int]:
        """Rows of the next window behind those ``held``, and the rank's next draw; bad ones go to the ledger."""
        rows = list(held)
        have, wanted = [len(rows), sum(len(r.ids) for r in rows), sum(len(r.tiles) for r in rows)], self._wanted()
        while all(number < enough for number, enough in zip(have, wanted, strict=True)):
            k, row = next(stream)
            step += 1
            if isinstance(row, Encoded) and self.packing is not None:
                try:
                    self.packing.check(row)
                except RowRejected as misfit:
                    row = self.mixture.located(misfit, k)
            if isinstance(row, RowRejected):
                self.ledger.reject(row, k)
            else:
                self.ledger.good()
                rows.append(row)
                have = [a + b for a, b in zip(have, (1, len(row.ids), len(row.tiles)), strict=True)]
        return rows, step

    def _wanted(self) -> tuple[float, float, float]:
        """Rows, positions, tiles: any of them fills a window."""
        count = self.batch_size * self.window
        if self.packing is None:
            return count, math.inf, math.inf
        packs = count + 1  # so that the emptiest can wait
        return math.inf, packs * self.packing.length, packs * (self.packing.tiles or math.inf)

    def _deal(
        self, rows: list[Encoded], waited: Sequence[int], number: int
    ) -> tuple[list[list[Encoded]], list[Encoded]]:
        """The batches of window ``number`` and the rows that wait for the next one."""
        first = number * self.batch_size * self.window  # the same on all ranks, whatever rows they rejected
        generator = np.random.default_rng((self.mixture.seed, 2, first))
        if self.packing is None:
            if self.window > 1:
                rows.sort(key=lambda r: len(r.ids))  # stable, so equal lengths keep their order
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            return [batches[i] for i in generator.permutation(len(batches))], []
        found = knapsack([(len(r.ids), len(r.tiles)) for r in rows], self.packing, len(waited))
        packs = [[rows[i] for i in sorted(pack)] for pack in found]
        packs.sort(key=lambda p: (any(r.draw in waited for r in p), sum(len(r.ids) for r in p)))
        spare = len(packs) - (len(packs) - 1) // self.batch_size * self.batch_size
        order = [packs[spare + i] for i in generator.permutation(len(packs) - spare)]
        joined = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # Samples of one length stand side by side, where attention takes them together without moving them.
        batches = [sorted((r for pack in packs for r in pack), key=lambda r: len(r.ids)) for packs in joined]
        return batches, sorted((r for pack in packs[:spare] for r in pack), key=lambda r: r.draw)


class _Chunks:
    """Endless chunks of one rank's draws."""

    def __init__(self, deal: Deal, start: int, rank: int, world: int) -> None:
        self._order, self._start, self._rank, self._world = deal, start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step = self._start
        while True:
            yield [self._order[i * self._world + self._rank] for i in range(step, step + _CHUNK)]
            step += _CHUNK
