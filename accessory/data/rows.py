"""The one exception with which a single training row is turned down."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["unreadable", "too-long", "no-label", "misfit"]
"""Why a row is turned down: it cannot be read, it has more positions than a row may have, it teaches nothing, or no
pack can hold it."""


class RowRejected(ValueError):  # noqa: N818  (a verdict on a row, not a failure of the program)
    """A row that cannot be used, with the reason and where it stands; the mixture's ledger records it."""

    def __init__(self, reason: str, source: str = "", index: int = -1, verdict: Verdict = "unreadable") -> None:
        super().__init__(reason, source, index, verdict)
        self.reason = reason
        self.source = source
        self.index = index
        self.verdict: Verdict = verdict

    def __str__(self) -> str:
        where = f"{self.source or 'row'}" + (f", row {self.index}" if self.index >= 0 else "")
        return f"{where}: {self.reason}"
