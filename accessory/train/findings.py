"""What can be found wrong with a run before it starts, and how grave each of it is."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # which would bring torch into the help
    from accessory.data.survey import Place

Level = Literal["error", "warning"]

CODES: dict[str, tuple[Level, str]] = {
    "data": ("error", "the data configuration cannot be used"),
    "unreadable": ("error", "rows that cannot be read are dropped"),
    "too-long": ("error", "rows of more positions than max_length are dropped whole"),
    "no-label": ("error", "rows that teach nothing"),
    "misfit": ("error", "rows that no pack of data.packing can hold are dropped"),
    "bad-rows": ("error", "more rows are dropped than data.max_bad_rate allows: the run would stop"),
    "nothing-learned": ("error", "no row that was read teaches anything"),
    "template": ("error", "the template needs a control token that the vocabulary lacks"),
    "placeholders": ("error", "placeholders are not as many as the features that take their places"),
    "prompt": ("error", "prompts of pictures lose their end, or cannot be read"),
    "trainable": ("error", "nothing trains, or the optimizer cannot be made"),
    "unused-group": ("error", "a pattern of train.groups matches no parameter that trains"),
    "disjoint": ("error", "objective.disjoint does not divide parameters or rows"),
    "init": ("error", "the tensors of init do not fit"),
    "parallel": ("error", "train.parallel cannot spread the model so"),
    "memory": ("error", "weights and optimizer do not fit the device"),
    "memory-tight": ("warning", "with the longest batch they may not fit"),
    "roles": ("warning", "the order of who speaks looks wrong"),
    "empty": ("warning", "empty questions or answers"),
    "duplicate": ("warning", "rows that stand in the data more than once"),
    "leak": ("warning", "rows or pictures of the test stand in the training data"),
    "unseen": ("warning", "the run ends before it has drawn every row of a file"),
    "padding": ("warning", "most of what is computed is padding"),
    "packs": ("warning", "packs are less than half full"),
}
"""Everything that can be found, with its level. An error: the run would fail, learn nothing or lose data."""


@dataclass(frozen=True)
class Finding:
    """Something wrong: a key of :data:`CODES`, what it is, how many rows it is true of, and the first of them."""

    code: str
    text: str
    count: int = 1
    examples: tuple[Place, ...] = ()

    @property
    def level(self) -> Level:
        """``error`` or ``warning``."""
        return CODES[self.code][0]


class Meaning:
    """A context that turns a ValueError into a finding ``code``."""

    def __init__(self, code: str, findings: list[Finding]) -> None:
        self.code, self.findings = code, findings

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, ValueError):
            self.findings.append(Finding(self.code, str(error)))
        return isinstance(error, ValueError)
