"""Where rows come from: files in the layouts people have, and the built-in sets, all read as :class:`Sample`.

A row that cannot be read raises :class:`RowRejected` with file and row; only a broken configuration stops the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from accessory import config as configuration
from accessory.data import layouts
from accessory.data.assets import default_cache
from accessory.data.files import Rows, matching, open_rows
from accessory.data.grounding import BoxForm
from accessory.data.rows import RowRejected
from accessory.data.shards import absent
from accessory.data.stream import Streamed, open_stream
from accessory.data.task_rows import TaskLayout
from accessory.data.walk import Walk
from accessory.schema import CAPTION, IDS, Sample

PROBED = 20  # rows read at start, so that a wrong column map is seen before a model is loaded
C = TypeVar("C")
S = TypeVar("S")


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
class StreamOptions:
    """``buffer``: among how many rows a stream is shuffled, and how many a process holds at most. ``lanes``: in how
    many runs of neighbouring rows these are read, best one for each rank; both belong to the order of the rows."""

    buffer: int = 2048
    lanes: int = 1

    def __post_init__(self) -> None:
        for name, value in (("buffer", self.buffer), ("lanes", self.lanes)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")


@dataclass(frozen=True)
class FileConfig:
    """Rows of one file, or of a stream of shards.

    ``path`` a JSON, JSONL, CSV, TSV or parquet file, or several (``part-*.parquet``), ``root`` the folder pictures must
    lie in (default: the file's own), ``columns`` our names to the file's (see ``layouts.COLUMNS``), ``weight`` the
    share of draws relative to the other sources, ``name`` a label for the ledger, ``get`` where the file comes from,
    which is said when it is missing.

    ``format`` webdataset or parquet streams shards that need not fit into memory: ``path`` may then hold braces and
    ``**`` and be anything that fsspec opens (``s3://...``), or with ``split`` it is the folder of a data set or
    ``hf://datasets/OWNER/NAME``. Columns of a tar shard are the extensions of its members, see
    :class:`accessory.data.webdataset.Tar`.
    """

    kind: Literal["llava", "sharegpt", "alpaca", "messages", "captions", "describe", "text", "packed", "task"]
    path: str
    root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    name: str = ""
    get: str = ""
    options: FileOptions = FileOptions()
    format: Literal["file", "webdataset", "parquet"] = "file"
    split: str = ""
    stream: StreamOptions = StreamOptions()

    def __post_init__(self) -> None:
        known = layouts.COLUMNS[self.kind]
        problems = [f"columns: {c!r} is none of {', '.join(known)}" for c in self.columns if c not in known]
        if not self.path:
            problems.append("path: '' names no file")
        if self.format == "file" and (self.split or "://" in self.path):
            problems.append(f"format: 'file' reads local files without a split, not {self.path} {self.split}".rstrip())
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
    """Rows of one file, or of a stream, whose ``walk`` is the order in which they are to be drawn."""

    unbounded = False

    def __init__(self, config: FileConfig, rows: Rows) -> None:
        self.config = config
        self.walk: Walk | None = getattr(rows, "walk", None)
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
            raise RowRejected(str(error), *self.where(index)) from error
        return Sample(turns, source=self.name, index=index, meta={CAPTION: True} if self._caption else {})

    def where(self, index: int) -> tuple[str, int]:
        """What the ledger names of a row: its file, or its shard and what is known of it there, and its number."""
        return self._rows.where(index) if isinstance(self._rows, Streamed) else (self.config.path, index)

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


def missing(config: SourceConfig) -> str | None:
    """What of a source's files is not there and where it comes from; None when nothing is."""
    if isinstance(config, BuiltinConfig):
        return None
    if config.format == "file":
        problems = [] if matching(Path(config.path)) else [f"no data file at {normpath(config.path)}"]
    else:
        problems = [f"no shard at {normpath(name)}" for name in absent(config.path, config.split)]
    if config.root is not None and not Path(config.root).is_dir():
        problems.append(f"no folder of pictures (root) at {normpath(config.root)}")
    if not problems:
        return None
    return " and ".join(problems) + (f"; put it there, it comes from: {config.get}" if config.get else "")


def open_source(config: SourceConfig, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> Source:
    """The source a configuration describes; ValueError when its file cannot be opened."""
    if isinstance(config, BuiltinConfig):
        return BuiltinSource(config, cache=cache, seed=seed, size=size)
    if (problem := missing(config)) is not None:
        raise ValueError(problem)
    if config.format == "file":
        return FileSource(config, open_rows(Path(config.path)))
    usual, given = layouts.COLUMNS[config.kind], list(config.columns.values())
    columns = {"columns": [*{**usual, **config.columns}.values(), "images"], "needed": given}
    where = cache or default_cache()
    stream = open_stream(config.path, config.split, config.format, columns, where, **dataclasses.asdict(config.stream))
    return FileSource(config, stream)


def read_entries(
    path: Path, name: str, kind: Any, above: tuple[Path, ...] = ()
) -> tuple[list[tuple[str, Any]], list[str]]:
    """The ``kind`` of configuration that a YAML file lists, each with its place in the file, and every mistake in the
    others.

    The file is a list, or ``name:`` with a list, or ``include:`` with a list of such files, whose entries come first,
    or both; relative paths (files to include, and fields ``path`` and ``root``) count from its folder. ``above``: the
    files that include it. ValueError where it is none of these, or includes itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("".join(f"{up} includes " for up in above[-1:]) + f"no file of {name} at {path}")
    if path.resolve() in above:
        raise ValueError(f"{path} includes itself: {' -> '.join(map(str, (*above, path.resolve())))}")
    tree = configuration.parse_file(path)
    listed = tree if isinstance(tree, list) and name == "sources" else []
    if listed and all(isinstance(e, dict) and "kind" not in e for e in listed):
        raise ValueError(configuration.rows_instead(path))
    tree = tree if isinstance(tree, dict) else {name: tree}
    files, entries = tree.get("include", []), tree.get(name, [] if "include" in tree else None)
    if not isinstance(entries, list) or not isinstance(files, list) or not (entries or files):
        raise ValueError(f"{path}: expected '{name}:' or 'include:' with a list")
    found: list[tuple[str, Any]] = []
    errors = [f"{k}: unknown name; known are {name} and include" for k in tree if k not in (name, "include")]
    for file in files:
        more, wrong = read_entries(path.parent / str(file), name, kind, (*above, path.resolve()))
        found += [(f"{file}: {where}", config) for where, config in more]
        errors += [f"{file}: {error}" for error in wrong]
    for i, entry in enumerate(entries):
        where = f"{name}.{i}"
        try:
            config = configuration.build(entry, kind, str(path), where)
        except configuration.ConfigError as error:
            errors += error.mistakes
            continue
        places = {k: v for k in ("path", "root") if (v := getattr(config, k, None))}
        moved = {k: v if "://" in v else str(path.parent / v) for k, v in places.items()}
        found.append((where, dataclasses.replace(config, **moved)))
    return found, errors


def opened(
    path: Path,
    found: Sequence[tuple[str, C]],
    errors: Sequence[str],
    make: Callable[[C], S],
    probe: Callable[[S], list[str]],
) -> list[S]:
    """What ``make`` opens of the entries that :func:`read_entries` ``found``, if nothing is wrong with any.

    ValueError lists everything that is: ``errors``, what ``make`` raises, what ``probe`` complains of.
    """
    errors, out = list(errors), list[S]()
    for where, config in found:
        try:
            out.append(make(config))
            errors += [f"{where}: {problem}" for problem in probe(out[-1])]
        except ValueError as error:
            errors.append(f"{where}: {error}")
    if errors:
        raise ValueError(f"{path} cannot be used:\n" + "\n".join(f"  {e}" for e in errors))
    return out


def read_configs(path: Path) -> tuple[list[tuple[str, SourceConfig]], list[str]]:
    """The sources that a YAML file names, as :func:`read_entries`."""
    return read_entries(path, "sources", SourceConfig)


def load_sources(path: Path, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> list[Source]:
    """The sources of a YAML file, see :func:`read_configs`.

    ValueError lists everything that is wrong at once: unknown names, missing files, rows that do not fit.
    """
    return opened(path, *read_configs(path), lambda c: open_source(c, cache=cache, seed=seed, size=size), _probe)


def _probe(source: Source) -> list[str]:
    """Complaints if the source is empty or none of its first rows can be read."""
    if len(source) == 0:
        return [f"{source.name}: no rows"]
    if isinstance(source, BuiltinSource):
        return []
    errors = []
    for i in range(min(PROBED, len(source))):
        try:
            source[i]
        except RowRejected as error:
            errors.append(str(error))
    # A few bad rows are the ledger's business; a file of nothing but bad rows is a wrong configuration.
    return errors if len(errors) == min(PROBED, len(source)) else []
