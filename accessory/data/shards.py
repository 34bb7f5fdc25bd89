"""Shards of a data set, wherever fsspec finds them, and an index of each that is made once and kept."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
_BRACES = re.compile(r"\{([^{}]*)\}")
_HUB = "hf://datasets/"
_VERSIONS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "blob_id")  # what file systems tell
_THREADS = 8  # that index shards at a time: of remote ones most of the time is waiting


@dataclass(frozen=True)
class Shard:
    """One file: ``url`` is a plain path where it is local; ``version`` changes with the file's content."""

    url: str
    size: int
    version: str

    def read(self, start: int, end: int) -> bytes:
        """Bytes from ``start`` to before ``end``, fewer where the file ends. Raises OSError."""
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(self.url)  # of this process: fsspec makes new ones after a fork
        data: bytes = fs.cat_file(path, start=start, end=end) if end > start else b""
        return data

    def open(self) -> Any:
        """The file, to be read as bytes. Raises OSError."""
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(self.url)
        return fs.open(path, "rb")


def expand(pattern: str) -> list[str]:
    """The names that ``part-{000..127}.tar`` or ``{a,b}/x.tar`` means; ValueError for braces that mean neither."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers is None and "," not in match[1]:
        raise ValueError(f"path: {match[0]} of {pattern} is neither a range like {{000..127}} nor a list like {{a,b}}")
    choices = match[1].split(",")
    if numbers is not None:
        first, last = numbers.groups()
        choices = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        if not choices:
            raise ValueError(f"path: {match[0]} of {pattern} counts down, from {first} to {last}")
    names = [name for c in choices for name in expand(pattern[: match.start()] + c + pattern[match.end() :])]
    return list(dict.fromkeys(names))


def absent(path: str, split: str = "") -> list[str]:
    """What is not there of local shards, without a look at others."""
    names = [path] if split else expand(path)
    return [n for n in names if "://" not in n and not os.path.exists(n) and not glob.glob(n, recursive=True)]


def find(path: str, split: str = "") -> list[Shard]:
    """The shards of a path with ``*``, ``?``, ``**`` and braces, sorted within each name that the braces mean.

    With ``split``: those of a data set's split, where ``path`` is its folder or ``hf://datasets/OWNER/NAME``, as the
    library ``datasets`` tells them. Raises ValueError for a name without a file.
    """
    found: dict[str, Shard] = {}
    for name in _of_split(path, split) if split else expand(path):
        hits = _named(name)
        if not hits:
            raise ValueError(f"no shard at {name}")
        found |= {shard.url: shard for shard in hits}
    return list(found.values())


def _of_split(path: str, split: str) -> list[str]:
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(path.removeprefix(_HUB)).config.data_files
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} cannot be opened ({error})") from error
    if split not in (files or {}):
        raise ValueError(f"split: {path} has no {split!r}, it has {', '.join(map(str, files or {})) or 'none'}")
    return [str(file) for file in files[split]]


def _named(name: str) -> list[Shard]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(name)
        try:
            hits = {path: fs.info(path)}
        except FileNotFoundError:
            hits = fs.glob(path, detail=True) if glob.has_magic(path) else {}
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name}: cannot be listed ({error})") from error
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    made = []
    for key in sorted(hits):
        info = hits[key]
        if info.get("type") != "directory":
            version = " ".join(str(info[tag]) for tag in _VERSIONS if tag in info)
            made.append(Shard(key if local else fs.unstrip_protocol(key), int(info["size"]), version))
    return made


class Indexes:
    """The index of every shard, kept in files: ``lengths`` says how many entries each has less ``spare``."""

    def __init__(self, shards: Sequence[Shard], kind: str, scan: Callable[[Shard], Index], cache: Path) -> None:
        self.shards = tuple(shards)
        self._folder = cache / "streams"
        self._names = [
            hashlib.sha256(repr((kind, s.url, s.size, s.version)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
            for s in shards
        ]
        self._kept: dict[int, Index] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        # Ranks that start together begin at different shards and find what the others did already.
        first = os.getpid() * 7919 % max(1, len(shards))
        order = [*range(first, len(shards)), *range(first)]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda i: self._make(i, scan), order))

    def _path(self, i: int) -> Path:
        return self._folder / f"{self._names[i]}.npy"

    def _make(self, i: int, scan: Callable[[Shard], Index]) -> None:
        path = self._path(i)
        if path.is_file():
            return
        try:
            made = scan(self.shards[i])
        except OSError as error:
            raise ValueError(f"{self.shards[i].url}: cannot be read ({error})") from error
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        with draft.open("wb") as file:
            np.save(file, made)
        draft.replace(path)

    def __getitem__(self, i: int) -> Index:
        """The index of shard ``i``; those used last stay in memory."""
        if i not in self._kept:
            while len(self._kept) >= 16:
                self._kept.pop(next(iter(self._kept)))
            self._kept[i] = np.load(self._path(i))
        return self._kept[i]
