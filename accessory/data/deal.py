"""Which draws of a mixture a rank reads: every world-th of those that are left.

The draws of a mixture are numbered and the same on any number of ranks. A run that goes on with another number of them
deals those that nobody has read: first, in their order, the ones between what slow and fast ranks had come to, then all
that follow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Deal:
    """Draws in the order in which they are dealt: ``left``, then ``start`` and all after it; ``left`` are below it."""

    left: tuple[int, ...] = ()
    start: int = 0

    def __getitem__(self, place: int) -> int:
        """The draw at a place (from 0) of the order."""
        return self.left[place] if place < len(self.left) else self.start + place - len(self.left)

    def place(self, draw: int) -> int:
        """Where a draw that is dealt stands in the order."""
        return bisect_left(self.left, draw) if draw < self.start else len(self.left) + draw - self.start


def remaining(deal: Deal, states: Sequence[Mapping[str, Any]]) -> Deal:
    """What ranks have not handed out of ``deal``, by their states in order.

    A state says ``step``, how many of its draws the rank has dealt with for good; which of them wait nevertheless
    (``held``, may be missing); and which later ones it has handed out (``taken``).
    """
    world = len(states)
    taken = {draw for state in states for draw in state["taken"]}
    waiting = {draw for state in states for draw in state.get("held", ())}
    steps = [state["step"] for state in states]
    end = max(max(steps) * world, len(deal.left), *(deal.place(draw) + 1 for draw in taken), 0)
    later = {deal[p] for p in range(min(steps) * world, end) if p // world >= steps[p % world]}
    return Deal(tuple(sorted((waiting | later) - taken)), deal[end])
