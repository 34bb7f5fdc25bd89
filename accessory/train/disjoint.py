"""Joint training with disjoint parameters: each kind of row trains a group of its own (LLaMA-Adapter V2, Gao et al.
2023: captions train what aligns pictures, instructions what answers, and neither spoils the other)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accessory.schema import Batch

if TYPE_CHECKING:  # which configures the groups
    from accessory.train.objective import Objective

ROWS = "rows/"


@dataclass(frozen=True)
class RowGroup:
    """Rows of ``sources`` (shell-style patterns of their names) train the parameters that match ``parameters`` alone.

    ``name``: of the group in the logs, where ``rows/NAME`` is its rows for each learned token.
    """

    name: str
    sources: tuple[str, ...]
    parameters: tuple[str, ...]

    def takes(self, source: str) -> bool:
        """Whether rows of this source are of the group."""
        return any(fnmatchcase(source, p) for p in self.sources)

    def owns(self, parameter: str) -> bool:
        """Whether a parameter of this name is of the group."""
        return any(fnmatchcase(parameter, p) for p in self.parameters)


class DisjointObjective:
    """``inner``, one group's rows after the other, with all that other groups own frozen meanwhile.

    An update without rows of a group leaves its parameters as they are, whatever moments and weight decay would do
    (:meth:`resting`).

    Raises:
        ValueError: when a trainable parameter belongs to no group or to two, or a group has none.
    """

    def __init__(self, inner: Objective, groups: Sequence[RowGroup], model: nn.Module) -> None:
        self.inner, self.groups = inner, tuple(groups)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.owned = {g.name: frozenset(n for n in names if g.owns(n)) for g in groups}
        if len(self.owned) != len(self.groups):
            raise ValueError(f"objective.disjoint: two groups share a name: {', '.join(g.name for g in groups)}")
        if empty := [name for name, owned in self.owned.items() if not owned]:
            raise ValueError(f"objective.disjoint: group {empty[0]!r} matches no trainable parameter")
        for n in names:
            if (count := sum(n in owned for owned in self.owned.values())) != 1:
                raise ValueError(f"objective.disjoint: {n} trains and is in {count} groups; it must be in one")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any, Mapping[str, Tensor | float]]:
        """See :class:`accessory.train.objective.Objective`.

        Raises:
            ValueError: for a row of a source that no group takes.
        """
        total = torch.zeros((), device=batch.ids.device)
        count: Any = 0
        metrics: dict[str, Tensor | float] = {ROWS + g.name: 0.0 for g in self.groups}
        for group, rows in zip(self.groups, self._rows(batch.sources), strict=True):
            if not rows:
                continue
            with frozen(model, self.owned[group.name]):
                loss, number, found = self.inner(model, select(batch, rows))
            total, count = total + loss, count + number
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + value
            metrics[ROWS + group.name] = float(len(rows))
        return total, count, metrics

    def resting(self, sums: Mapping[str, float]) -> list[str]:
        """Parameters of the groups that had no row in an update; ``sums`` are its metrics over all ranks."""
        return [n for g in self.groups if not sums[ROWS + g.name] for n in sorted(self.owned[g.name])]

    def _rows(self, sources: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in self.groups]
        for i, source in enumerate(sources):
            for group, own in zip(self.groups, rows, strict=True):
                if group.takes(source):
                    own.append(i)
                    break
            else:
                raise ValueError(f"objective.disjoint: no group takes rows of source {source!r}")
        return rows


@contextlib.contextmanager
def frozen(model: nn.Module, but: frozenset[str]) -> Iterator[None]:
    """What trains, ``but`` these, is no part of graphs that are made meanwhile; those made before keep theirs."""
    others = [p for n, p in model.named_parameters() if p.requires_grad and n not in but]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch with their tiles, in the order given.

    Raises:
        ValueError: for a batch that asks for pictures.
    """
    if batch.targets is not None:
        raise ValueError("objective.disjoint is for rows that are answered, not for pictures that are drawn")
    if list(rows) == list(range(len(batch.ids))):
        return batch
    if batch.counts is None:
        raise ValueError("objective.disjoint divides batches that say how many tiles each row has (Batch.counts)")
    at = torch.tensor(list(rows), device=batch.ids.device)
    tiles = batch.tiles.split(batch.counts.tolist())
    return replace(
        batch,
        ids=batch.ids[at],
        labels=batch.labels[at],
        mask=batch.mask[at],
        tiles=torch.cat([tiles[i] for i in rows]),
        sources=tuple(batch.sources[i] for i in rows),
        counts=batch.counts[at],
    )
