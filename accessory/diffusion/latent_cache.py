"""Latents and text features on disk: ragged rows in safetensors shards, which cannot be mistaken for another's.

A cache is a folder. ``index-W.jsonl`` of writer W begins with a header that says what made the rows; each further line
names one finished shard with its size and its keys. A shard is renamed into place before its line is written, and a
line that a kill has torn is dropped, so the rows that the index names are whole and all others are made again. Several
processes fill one folder, each as a writer of its own; readers see the rows of all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from accessory import log
from accessory.diffusion.condition import Condition, join

FORMAT = "accessory-features-1"
OPEN_SHARDS = 32  # file handles that a reader keeps
SAMPLES = 4096  # values of a tensor that its fingerprint looks at

_log = log.get(__name__)


def fingerprint(module: nn.Module, **facts: str) -> str:
    """Sixteen hexadecimal digits that change with a module's weights and with what is said about it.

    Names, shapes and dtypes of all tensors count, and up to 4096 evenly spaced values of each: training moves all
    values of a tensor, so that is seen without reading a large model whole.
    """
    seen = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, -(-flat.numel() // SAMPLES))
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        seen.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


def text_key(text: str) -> str:
    """The key of a text: equal for equal texts alone."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    private = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with private.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(private, path)
    except BaseException:
        private.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Shard:
    file: str
    bytes: int
    keys: tuple[str, ...]


def _read_index(path: Path) -> tuple[dict[str, str], list[_Shard], int]:
    """What made the rows, the finished shards, and how many bytes of the index are whole."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].splitlines()
    try:
        header, *rest = [json.loads(line) for line in lines]
        if header["format"] != FORMAT:
            raise ValueError(f"{path} has format {header['format']!r}, this version reads {FORMAT!r}")
        made_by = {str(k): str(v) for k, v in header["made_by"].items()}
        shards = [_Shard(str(s["file"]), int(s["bytes"]), tuple(s["keys"])) for s in rest]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the index of a feature cache: {error!r}") from None
    for shard in shards:
        if Path(shard.file).name != shard.file:  # an index is data: it may not point out of its folder
            raise ValueError(f"{path} names a file outside its folder: {shard.file}")
        found = path.parent / shard.file
        size = found.stat().st_size if found.is_file() else None
        if size != shard.bytes:
            raise ValueError(
                f"{found} is {'missing' if size is None else f'{size} bytes'}, the index says {shard.bytes}"
            )
    return made_by, shards, whole


def _agree(path: Path, there: Mapping[str, str], given: Mapping[str, str]) -> None:
    names = [n for n in sorted(there.keys() | given.keys()) if there.get(n) != given.get(n)]
    if other := [f"{n}: {there.get(n, 'nothing')}, not {given.get(n, 'nothing')}" for n in names]:
        raise ValueError(f"{path.parent} was made by something else ({'; '.join(other)}); use another folder")


def _indexes(folder: Path) -> list[Path]:
    """Those with a whole header; without one, its writer was killed before it kept anything."""
    return [path for path in sorted(folder.glob("index-*.jsonl")) if b"\n" in path.read_bytes()]


class CacheWriter:
    """Adds rows to a cache; what is there already is kept and known.

    Args:
        folder: made when missing.
        made_by: digests of everything that decides the numbers: profile, codec, resolution...
        shard_bytes: a shard is written when its rows fill this.
        writer: number of this process among those that fill the folder; None takes the lowest that nobody has. A
            number is free again when its process has ended, however it did.

    Raises:
        ValueError: when the folder's rows were made by something else, are torn, or another process has this number.
    """

    def __init__(
        self, folder: Path, made_by: Mapping[str, str], *, shard_bytes: int = 256_000_000, writer: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._limit = shard_bytes
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._filled = self._shards = 0
        self._known: set[str] = set()
        numbers = itertools.count() if writer is None else [writer]
        claimed = next((found for n in numbers if (found := self._claim(n)) is not None), None)
        if claimed is None:
            raise ValueError(f"another process is writing to {self.folder} as writer {writer}")
        self._writer, self._index = claimed
        try:
            self._open(dict(made_by))
        except BaseException:
            self._index.close()
            raise

    def _claim(self, number: int) -> tuple[int, IO[bytes]] | None:
        """A number and its index, locked until it is closed or the process ends; None when another has it."""
        index = (self.folder / f"index-{number}.jsonl").open("a+b")
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            index.close()
            return None
        except OSError as error:  # a file system without locks, say: then no number would ever be free
            index.close()
            raise OSError(error.errno, f"cannot lock {index.name}: {error.strerror}; use another folder") from error
        return number, index

    def _open(self, made_by: dict[str, str]) -> None:
        own = Path(self._index.name)
        if b"\n" not in own.read_bytes():
            self._index.truncate(0)  # new, or killed while the header was written
        for path in _indexes(self.folder):
            there, shards, whole = _read_index(path)
            _agree(path, there, made_by)
            self._known.update(key for shard in shards for key in shard.keys)
            if path == own:
                self._shards = len(shards)
                if whole < path.stat().st_size:
                    _log.info("%s ended in a torn line, which is dropped", path)
                    self._index.truncate(whole)
        if not own.stat().st_size:
            self._append({"format": FORMAT, "made_by": made_by})
        for rest in self.folder.glob(f".rows-{self._writer}-*.tmp"):
            rest.unlink()

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: str, row: Mapping[str, Tensor]) -> None:
        """Keep one row: named tensors of any shapes. It is on disk when its shard is full or :meth:`flush` returns.

        Raises:
            ValueError: for a key that is there already, a row without tensors, or a part's name with a ``/``.
        """
        if key in self._known:
            raise ValueError(f"{self.folder} has a row {key!r} already")
        if not row or any("/" in part for part in row):
            raise ValueError(f"row {key!r} needs parts whose names have no '/', got {sorted(row)}")
        # A copy: the row may be a view into a whole batch, which the list would keep alive.
        self._pending[key] = {part: t.detach().to("cpu", copy=True).contiguous() for part, t in row.items()}
        self._known.add(key)
        self._filled += sum(t.nbytes for t in self._pending[key].values())
        if self._filled >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard."""
        if not self._pending:
            return
        file = f"rows-{self._writer}-{self._shards:06d}.safetensors"
        data = save({f"{key}/{part}": t for key, row in self._pending.items() for part, t in row.items()})
        write_atomic(self.folder / file, data)
        self._append({"file": file, "bytes": len(data), "keys": list(self._pending)})
        self._shards += 1
        self._pending, self._filled = {}, 0

    def _append(self, line: Mapping[str, Any]) -> None:
        data, whole = json.dumps(line).encode() + b"\n", os.fstat(self._index.fileno()).st_size
        # Unbuffered and all or nothing: half a line of a full disk would spoil the next one.
        if os.write(self._index.fileno(), data) != len(data):
            self._index.truncate(whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._index.name)
        os.fsync(self._index.fileno())

    def close(self) -> None:
        """Write what is pending and let go of the folder."""
        try:
            self.flush()
        finally:
            fcntl.flock(self._index, fcntl.LOCK_UN)  # processes forked since then hold the file too
            self._index.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class CacheReader:
    """Rows of a cache by key, read when asked for. Safe to hand to loader workers.

    Raises:
        ValueError: when there is no cache, it is torn, or its rows were made by something other than ``made_by``.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self._where: dict[str, str] = {}
        paths = _indexes(self.folder)
        if not paths:
            raise ValueError(f"{self.folder} holds no feature cache (index-0.jsonl is missing)")
        for path in paths:
            there, shards, _ = _read_index(path)
            _agree(path, there, made_by)
            self._where |= {key: shard.file for shard in shards for key in shard.keys}
        self._files: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # a worker opens its own

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of a row.

        Raises:
            ValueError: for a key that is not there, or a shard that cannot be read.
        """
        if key not in self._where:
            raise ValueError(f"{self.folder} has no row {key!r} (it has {len(self)})")
        file, parts = self._open(self._where[key])
        try:
            return {part: file.get_tensor(f"{key}/{part}") for part in parts[key]}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.folder / self._where[key]} lacks row {key!r}: {error}") from None

    def _open(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        if name not in self._files:
            try:
                file = safe_open(str(self.folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / name} is not a readable safetensors file: {error}") from None
            parts: dict[str, list[str]] = {}
            for full in file.keys():  # noqa: SIM118 (no mapping)
                key, _, part = full.rpartition("/")
                parts.setdefault(key, []).append(part)
            self._files[name] = (file, parts)
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
        self._files.move_to_end(name)
        return self._files[name]


# --- conditions as rows -----------------------------------------------------------------------------------------------


def rows_of(condition: Condition) -> Iterator[dict[str, Tensor]]:
    """Every picture's condition as a row without padding: ``seq`` (n, C) holds real positions alone."""
    for i in range(len(condition)):
        row = {name: part[i] for name, part in condition.parts().items() if name != "mask"}
        if condition.seq is not None and condition.mask is not None:
            row["seq"] = condition.seq[i][condition.mask[i]]
        yield row


def condition_of(rows: Sequence[Mapping[str, Tensor]]) -> Condition:
    """One batch of such rows, padded on the right; the masks are those that the rows were cut by.

    Raises:
        ValueError: for none, or for rows of different parts.
    """
    return join([_one(row) for row in rows])


def _one(row: Mapping[str, Tensor]) -> Condition:
    parts = {name: part[None] for name, part in row.items()}
    if "seq" in parts:
        parts["mask"] = torch.ones(parts["seq"].shape[:2], dtype=torch.bool)
    return Condition(**parts)
