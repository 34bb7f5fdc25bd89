"""Test sets of one's own: a YAML file names data files, how their rows are asked, and how answers are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accessory import config as configuration
from accessory.data import layouts
from accessory.data.files import open_rows
from accessory.data.grounding import BoxForm
from accessory.data.rows import RowRejected
from accessory.data.sources import PROBED, opened, read_entries
from accessory.data.task_rows import TaskLayout
from accessory.evaluate.scorers import Scorer, Truth, scorer
from accessory.schema import Sample


@dataclass(frozen=True)
class TaskConfig:
    """One test set.

    ``path`` a JSON, JSONL, CSV, TSV or parquet file; ``root`` the folder pictures must lie in (default: the file's
    own); ``columns`` our names to the file's (``layouts.COLUMNS["task"]``); ``score`` a name of ``SCORERS``; ``prompt``
    a name of ``task_prompts.TASKS`` or an own wording, by default the scorer's; ``boxes`` how the file writes boxes;
    ``max_new_tokens`` 0 for the scorer's; ``prefill`` what every answer begins with (ScienceQA: `` The answer is``).
    """

    name: str
    path: str
    score: str
    prompt: str = ""
    root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    boxes: BoxForm = "xyxy"
    decimals: int = 3
    max_new_tokens: int = 0
    prefill: str = ""

    def __post_init__(self) -> None:
        known = layouts.COLUMNS["task"]
        problems = [f"columns: {c!r} is none of {', '.join(known)}" for c in self.columns if c not in known]
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            problems.append(f"name: {self.name!r} must be letters, digits, '-', '_' or '.': files are called by it")
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens: {self.max_new_tokens} is below 0")
        if not 1 <= self.decimals <= 6:
            problems.append(f"decimals: {self.decimals} is not within 1..6")
        if problems:
            raise ValueError("; ".join(problems))
        scorer(self.score)


class TestSet:
    """The rows of one task, as samples."""

    __test__ = False  # no test class, whatever its name says

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        root = Path(config.root) if config.root else Path(config.path).parent
        prompt = config.prompt or self.scorer.prompt
        self._rows = open_rows(Path(config.path))
        self._layout = TaskLayout(
            config.columns, root.resolve(), prompt, config.boxes, config.decimals, config.score.startswith("choice")
        )

    @property
    def scorer(self) -> Scorer:
        """What scores its answers."""
        return scorer(self.config.score)

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""
        return self.config.max_new_tokens or self.scorer.max_new_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``; raises :class:`RowRejected` with the file and the row."""
        try:
            sample = self._layout.sample(self._rows[index])
            if self.config.score.startswith("choice") and not sample.meta["options"]:
                raise ValueError("score: choice needs options: a column options, or columns A, B, ...")
        except ValueError as error:
            raise RowRejected(str(error), self.config.path, index) from error
        return replace(sample, source=self.config.name, index=index)

    def digest(self) -> str:
        """Changes with the data file and with everything that decides how it is asked and scored."""
        facts: list[Any] = [configuration.plain(replace(self.config, path="", root=None)), self.max_new_tokens]
        with Path(self.config.path).open("rb") as file:
            data = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(f"{facts} {data}".encode()).hexdigest()


def truth(sample: Sample) -> Truth:
    """What an answer to the sample is held against."""
    m = sample.meta
    return Truth(tuple(m["answers"]), tuple(m["options"]), m["category"], m["group"])


def read_tasks(path: Path) -> list[TestSet]:
    """The test sets of a YAML file: ``tasks:`` with a list, whose relative paths count from the file's folder.

    Raises:
        ValueError: listing everything that is wrong at once: unknown names, missing files, rows that do not fit.
    """
    found, errors = read_entries(path, "tasks", TaskConfig)
    names = [config.name for _, config in found]
    twice = [f"{w}: name {c.name!r} comes twice" for k, (w, c) in enumerate(found) if c.name in names[:k]]
    return opened(path, found, [*errors, *twice], TestSet, _probe)


def _probe(tests: TestSet) -> list[str]:
    """Complaints about the first rows: a test set has to be whole, so that one bad row is a mistake."""
    if len(tests) == 0:
        return [f"{tests.config.path}: no rows"]
    errors = []
    for i in range(min(PROBED, len(tests))):
        try:
            tests.scorer.item("", truth(tests[i]))
        except ValueError as error:
            errors.append(str(error) if isinstance(error, RowRejected) else f"{tests.config.path}, row {i}: {error}")
    return errors[:5]
