"""What a comparison keeps: the tensors compared, and how far they are apart."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

# fp32: an element passes when |difference| <= LIMIT * (1 + |expected|).
LIMIT = 1e-4


class UnsupportedError(Exception):
    """The case asks for something that this project does not compare yet."""


@dataclass
class Comparison:
    """Running record of one case: what was compared, and how far apart the farthest elements are."""

    compared: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    absolute: float = 0.0
    relative: float = 0.0

    def tensor(self, name: str, ours: Tensor, expected: Tensor) -> None:
        """Compare one tensor element by element."""
        self.compared.append(name)
        if ours.shape != expected.shape:
            self.problems.append(f"{name} has shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
            return
        ours, expected = ours.detach().double(), expected.double()
        difference = (ours - expected).abs()
        largest = difference.max().item() if difference.numel() else 0.0
        self.absolute = max(self.absolute, largest)
        self.relative = max(self.relative, largest / max(expected.abs().max().item(), 1e-30))
        if not bool((difference <= LIMIT * (1 + expected.abs())).all()):  # NaN fails too
            self.problems.append(f"{name} differs by {largest:.3g}")

    def equal(self, name: str, ours: object, expected: object) -> None:
        """Compare two plain values."""
        self.compared.append(name)
        if ours != expected:
            self.problems.append(f"{name} is {ours}, expected {expected}")

    def deviates(self, name: str, ours: object, intended: object, reason: str) -> None:
        """Where the reference does what only hurts: check what this project does instead, and keep the reason.

        ``intended`` must not come from the code that is compared. The line of the case lists every reason.
        """
        self.equal(name, ours, intended)
        if reason not in self.deviations:
            self.deviations.append(reason)


Handler = Callable[[Path, dict[str, Any], Comparison], None]
"""Compares one case (its folder, its config.json) with this project."""
