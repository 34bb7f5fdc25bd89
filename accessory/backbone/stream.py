"""Safetensors read and written piece by piece: what is done to weights needs memory for a piece, not for the weights.

Plain reads, no memory maps: pages of a mapped file count as the process' own until the system takes them back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accessory.backbone import store

CHUNK = 8_000_000
"""Elements of a piece."""
TRAINED = "trainable.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {v: k for k, v in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``begin`` counts bytes from the start of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Weights:
    """The tensors of a folder (``model.safetensors``, its shards by an index, or ``trainable.safetensors``), unread.

    Raises:
        ValueError: for a folder that holds none or two of them, and for torn files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        names = (store.SINGLE, store.INDEX, TRAINED)
        found = [n for n in names if (self.folder / n).is_file()]
        if len(found) != 1:
            has = " and ".join(found) or "none of them"
            raise ValueError(f"{folder} must hold one of {', '.join(names)}; it has {has}")
        if found[0] == store.INDEX:
            where = store.read_json(self.folder / store.INDEX).get("weight_map")
            if not isinstance(where, dict) or any(Path(str(f)).name != f for f in where.values()):
                raise ValueError(f"{self.folder / store.INDEX} has no weight_map from tensor names to files beside it")
            self.files = [self.folder / f for f in sorted(set(where.values()))]
        else:
            self.files = [self.folder / found[0]]
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries |= read_header(file)

    def pieces(self, name: str, chunk: int = CHUNK) -> Iterator[Tensor]:
        """The elements of a tensor in order, flat, at most ``chunk`` at a time."""
        entry = self.entries[name]
        with entry.file.open("rb") as file:
            file.seek(entry.begin)
            for start in range(0, entry.count, chunk):
                n = min(chunk, entry.count - start) * entry.dtype.itemsize
                buffer = bytearray(n)
                if file.readinto(buffer) != n:
                    raise ValueError(f"{entry.file} ends inside {name} (truncated?)")
                yield torch.frombuffer(buffer, dtype=entry.dtype)

    def tensor(self, name: str) -> Tensor:
        """A tensor whole."""
        entry = self.entries[name]
        return torch.cat([torch.empty(0, dtype=entry.dtype), *self.pieces(name)]).view(entry.shape)

    def sha256(self) -> dict[str, str]:
        """The digest of every file by its name."""
        out = {}
        for path in self.files:
            with path.open("rb") as file:
                out[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return out


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds and where.

    Raises:
        ValueError: when it is missing, torn, or has a type of number that is not supported.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= 100_000_000:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from None
    header.pop("__metadata__", None)
    out: dict[str, Entry] = {}
    for name, row in header.items():
        if row["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is of type {row['dtype']}; supported are {', '.join(_DTYPES)}")
        begin, end = row["data_offsets"]
        entry = Entry(_DTYPES[row["dtype"]], tuple(row["shape"]), path, 8 + length + begin)
        if end - begin != entry.count * entry.dtype.itemsize or 8 + length + end > path.stat().st_size:
            raise ValueError(f"{path}: {name} does not fit its place in the file (truncated?)")
        out[name] = entry
    return out


def write(
    path: Path,
    wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """One safetensors file: for every wanted name, in order, what ``pieces(name)`` gives, cast to its type.

    Raises:
        ValueError: when the pieces of a tensor are not as many elements as its shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name, (dtype, shape) in wanted.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in wanted.items():
            left = math.prod(shape)
            for piece in pieces(name):
                left -= piece.numel()
                file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)
            if left:
                raise ValueError(f"{name} misses {left} of its {math.prod(shape)} elements")
    path.chmod(0o644)
