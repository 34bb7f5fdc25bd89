"""Where rows come from: files in the layouts people have, and the built-in sets, all read as :class:`Sample`.

A row that cannot be read raises :class:`RowRejected` with file and row; only a broken configuration stops the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from accessory.data import layouts
from accessory.data.files import Rows, open_rows
from accessory.data.rows import RowRejected
from accessory.schema import Sample

Kind = Literal["llava", "sharegpt", "alpaca", "messages", "builtin"]
KINDS: tuple[str, ...] = ("llava", "sharegpt", "alpaca", "messages", "builtin")
_PROBED = 20  # rows read at start, so that a wrong column map is seen before training begins


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows.

    ``path`` a JSON, JSONL, CSV, TSV or parquet file, ``root`` the folder pictures must lie in (default: the file's
    own), ``columns`` our names to the file's (see ``layouts.COLUMNS``), ``weight`` the share of draws relative to the
    other sources, ``name`` the built-in set or a label for the ledger, ``split`` and ``options`` for built-in sets;
    ``options: {image_first: true}`` puts pictures of rows without ``<image>`` at the start.
    """

    kind: Kind
    path: str | None = None
    root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    name: str = ""
    split: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)


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

    def __init__(self, config: SourceConfig, rows: Rows) -> None:
        assert config.path is not None
        self.config = config
        self.name = config.name or config.path
        self.weight = config.weight
        self._rows = rows
        root = Path(config.root) if config.root else Path(config.path).parent
        self._layout = layouts.Layout(config.kind, dict(config.columns), root.resolve(), config.options)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``; raises :class:`RowRejected` with the file and the row."""
        assert self.config.path is not None
        try:
            turns = self._layout.turns(self._rows[index])
        except ValueError as error:
            raise RowRejected(str(error), self.config.path, index) from error
        return Sample(turns, source=self.name, index=index)


class BuiltinSource:
    """One of the project's own sets."""

    unbounded = True

    def __init__(self, config: SourceConfig, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> None:
        from accessory.data import builtin  # fetches assets, so it is loaded only where it is asked for

        self.config = config
        self.name = f"{config.name}/{config.split}"
        self.weight = config.weight
        options: dict[str, Any] = {"cache": cache, "seed": seed, "size": size, **config.options}
        split: Any = config.split  # checked there, with the splits that the set has
        self._rows = builtin.build(config.name, split, **options)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``, any non-negative number."""
        return dataclasses.replace(self._rows[index], source=self.name, index=index)


def open_source(config: SourceConfig, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> Source:
    """The source a configuration describes; ValueError when its file cannot be opened."""
    if config.kind == "builtin":
        return BuiltinSource(config, cache=cache, seed=seed, size=size)
    if config.path is None:
        raise ValueError(f"a {config.kind} source needs a path")
    return FileSource(config, open_rows(Path(config.path)))


def load_sources(path: Path, *, cache: Path | None = None, seed: int = 0, size: int = 128) -> list[Source]:
    """Sources of a YAML file (a list, or ``sources:`` with a list); relative paths count from the file's folder.

    ValueError lists everything that is wrong at once: unknown fields, missing files, rows that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no data configuration at {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    entries = data.get("sources") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected 'sources:' with a list of sources")
    errors: list[str] = []
    sources: list[Source] = []
    for i, entry in enumerate(entries):
        where = f"{path}, source {i}"
        config, problems = parse(entry, path.parent)
        errors += [f"{where}: {p}" for p in problems]
        if config is None:
            continue
        try:
            source = open_source(config, cache=cache, seed=seed, size=size)
            errors += _probe(source)
            sources.append(source)
        except ValueError as error:
            errors.append(f"{where}: {error}")
    if errors:
        raise ValueError("the data configuration cannot be used:\n" + "\n".join(f"  {e}" for e in errors))
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


def parse(entry: object, folder: Path) -> tuple[SourceConfig | None, list[str]]:
    """One YAML entry as a configuration, or every complaint about it."""
    if not isinstance(entry, dict):
        return None, [f"expected a mapping, got {entry!r}"]
    names = [f.name for f in dataclasses.fields(SourceConfig)]
    problems = [f"unknown field {k!r} (there are: {', '.join(names)})" for k in entry if k not in names]
    kind = entry.get("kind")
    if kind not in KINDS:
        problems.append(f"kind: {kind!r} is none of {', '.join(KINDS)}")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        problems.append(f"weight: {weight!r} is not a positive number")
    for key in ("path", "root", "name", "split"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            problems.append(f"{key}: {entry[key]!r} is not text")
    for key in ("columns", "options"):
        if not isinstance(entry.get(key, {}), dict):
            problems.append(f"{key}: {entry[key]!r} is not a mapping")
    problems += _demands(entry, kind)
    if problems:
        return None, problems
    placed = {k: str(folder / entry[k]) for k in ("path", "root") if entry.get(k)}
    return SourceConfig(**{**entry, **placed}), []


def _demands(entry: Mapping[str, Any], kind: object) -> Sequence[str]:
    """What a kind needs, and column names that mean nothing to it."""
    if kind == "builtin":
        return [] if entry.get("name") else ["a builtin source needs a name"]
    problems = [] if entry.get("path") else [f"a {kind} source needs a path"]
    columns = entry.get("columns", {})
    if isinstance(kind, str) and kind in layouts.COLUMNS and isinstance(columns, dict):
        known = layouts.COLUMNS[kind]
        problems += [f"columns: {c!r} is none of {', '.join(known)}" for c in columns if c not in known]
    return problems
