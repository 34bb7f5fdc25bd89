"""Where rows come from: files in the layouts people have, and the built-in sets, all read as :class:`Sample`.

A row that cannot be read raises :class:`RowRejected` with file and row; only a broken configuration stops the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from accessory import config as configuration
from accessory.data import layouts
from accessory.data.files import Rows, open_rows
from accessory.data.grounding import BoxForm
from accessory.data.rows import RowRejected
from accessory.data.task_rows import TaskLayout
from accessory.schema import CAPTION, IDS, Sample

_PROBED = 20  # rows read at start, so that a wrong column map is seen before training begins


@dataclass(frozen=True)
class FileOptions:
    """``image_first`` puts the pictures of rows without ``<image>`` at the start.

    Of kind ``task``: ``task`` is a name of ``task_prompts.TASKS`` or an own wording, ``boxes`` how the file writes them
    (pixels ``xyxy`` or ``xywh``, or ``square``: fractions of the padded square), ``decimals`` how we do.
    """

    image_first: bool = False
    task: str = ""
    boxes: BoxForm = "xyxy"
    decimals: int = 3


@dataclass(frozen=True)
class FileConfig:
    """Rows of one file.

    ``path`` a JSON, JSONL, CSV, TSV or parquet file, ``root`` the folder pictures must lie in (default: the file's
    own), ``columns`` our names to the file's (see ``layouts.COLUMNS``), ``weight`` the share of draws relative to the
    other sources, ``name`` a label for the ledger.
    """

    kind: Literal["llava", "sharegpt", "alpaca", "messages", "captions", "describe", "text", "packed", "task"]
    path: str
    root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    name: str = ""
    options: FileOptions = FileOptions()

    def __post_init__(self) -> None:
        known = layouts.COLUMNS[self.kind]
        problems = [f"columns: {c!r} is none of {', '.join(known)}" for c in self.columns if c not in known]
        if not self.path:
            problems.append("path: '' names no file")
        if not 1 <= self.options.decimals <= 6:
            problems.append(f"options.decimals: {self.options.decimals} is not within 1..6")
        _complain(problems + _weight(self.weight))


@dataclass(frozen=True)
class BuiltinOptions:
    """``turns`` bounds the questions about one training picture, ``ask`` is what the test of flags asks."""

    turns: int | None = None
    ask: str = "country"


@dataclass(frozen=True)
class BuiltinConfig:
    """One of the project's own sets, see ``builtin.NAMES``. ``weight``: its share of draws, as of a file's."""

    kind: Literal["builtin"]
    name: str
    split: str = "train"
    weight: float = 1.0
    options: BuiltinOptions = BuiltinOptions()

    def __post_init__(self) -> None:
        _complain(_weight(self.weight))


SourceConfig = FileConfig | BuiltinConfig


def _weight(weight: float) -> list[str]:
    return [] if 0 < weight < float("inf") else [f"weight: {weight!r} is not a positive number"]


def _complain(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


class Source(Protocol):
    """A set of rows that can be read by number."""

    name: str
    weight: float
    unbounded: bool  # takes any row number; what lies beyond the length varies the augmentation

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class FileSource:
    """Rows of one file."""

    unbounded = False

    def __init__(self, config: FileConfig, rows: Rows) -> None:
        self.config = config
        self.name = config.name or config.path
        self.weight = config.weight
        self._rows = rows
        self._caption = config.kind == "captions"
        root = Path(config.root) if config.root else Path(config.path).parent
        options = config.options
        self._tasks: TaskLayout | None = None
        self._layout: layouts.Layout | None = None
        if config.kind == "task":
            self._tasks = TaskLayout(config.columns, root.resolve(), options.task, options.boxes, options.decimals)
        elif config.kind != "packed":
            self._layout = layouts.Layout(config.kind, config.columns, root.resolve(), options.image_first)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``; raises :class:`RowRejected` with the file and the row."""
        try:
            row = self._rows[index]
            if self._tasks is not None:
                return dataclasses.replace(self._tasks.sample(row, index), source=self.name, index=index)
            if self._layout is None:
                ids = layouts.packed_ids(row, self.config.columns)
                return Sample((), source=self.name, index=index, meta={IDS: ids})
            turns = self._layout.turns(row)
        except ValueError as error:
            raise RowRejected(str(error), self.config.path, index) from error
        return Sample(turns, source=self.name, index=index, meta={CAPTION: True} if self._caption else {})

    def line(self, index: int) -> int | None:
        """The line of row ``index`` in the file, see :class:`accessory.data.files.Rows`."""
        return self._rows.line(index)


class BuiltinSource:
    """One of the project's own sets."""

    unbounded = True

    def __init__(self, config: BuiltinConfig, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> None:
        from accessory.data import builtin  # fetches assets, so it is loaded only where it is asked for

        self.config = config
        self.name = f"{config.name}/{config.split}"
        self.weight = config.weight
        split: Any = config.split  # checked there, with the splits that the set has
        options = config.options
        self._rows = builtin.build(
            config.name, split, cache=cache, seed=seed, size=size, turns=options.turns, ask=options.ask
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``, any non-negative number."""
        return dataclasses.replace(self._rows[index], source=self.name, index=index)


def open_source(config: SourceConfig, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> Source:
    """The source a configuration describes; ValueError when its file cannot be opened."""
    if isinstance(config, BuiltinConfig):
        return BuiltinSource(config, cache=cache, seed=seed, size=size)
    return FileSource(config, open_rows(Path(config.path)))


def read_configs(path: Path) -> tuple[list[tuple[str, SourceConfig]], list[str]]:
    """The sources that a YAML file names, each with its place in the file, and every mistake in the others.

    The file is a list, or ``sources:`` with a list; relative paths count from its folder. ValueError where it is
    neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data configuration at {path}")
    tree = configuration.parse(path.read_text(encoding="utf-8"), str(path))
    entries = tree.get("sources") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected 'sources:' with a list of sources")
    found: list[tuple[str, SourceConfig]] = []
    errors = [f"{k}: unknown name; known is sources" for k in tree if k != "sources"] if tree is not entries else []
    union: Any = SourceConfig  # which is no type[...] in the eyes of a type checker
    for i, entry in enumerate(entries):
        where = f"sources.{i}"
        try:
            config: SourceConfig = configuration.build(entry, union, str(path), where)
        except configuration.ConfigError as error:
            errors += error.mistakes
            continue
        if isinstance(config, FileConfig):
            root = str(path.parent / config.root) if config.root else None
            config = dataclasses.replace(config, path=str(path.parent / config.path), root=root)
        found.append((where, config))
    return found, errors


def load_sources(path: Path, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> list[Source]:
    """The sources of a YAML file, see :func:`read_configs`.

    ValueError lists everything that is wrong at once: unknown names, missing files, rows that do not fit.
    """
    configs, errors = read_configs(path)
    sources: list[Source] = []
    for where, config in configs:
        try:
            source = open_source(config, cache=cache, seed=seed, size=size)
            errors += [f"{where}: {problem}" for problem in _probe(source)]
            sources.append(source)
        except ValueError as error:
            errors.append(f"{where}: {error}")
    if errors:
        raise ValueError(f"the data configuration {path} cannot be used:\n" + "\n".join(f"  {e}" for e in errors))
    return sources


def _probe(source: Source) -> list[str]:
    """Complaints if the source is empty or none of its first rows can be read."""
    if len(source) == 0:
        return [f"{source.name}: no rows"]
    if isinstance(source, BuiltinSource):
        return []
    errors = []
    for i in range(min(_PROBED, len(source))):
        try:
            source[i]
        except RowRejected as error:
            errors.append(str(error))
    # A few bad rows are the ledger's business; a file of nothing but bad rows is a wrong configuration.
    return errors if len(errors) == min(_PROBED, len(source)) else []
