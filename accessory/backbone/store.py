"""Folders of safetensors on disk: written atomically, in shards with an index, and read memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accessory import log
from accessory.nn.unread import Cut

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARKER = "COMPLETE"

_log = log.get(__name__)


@contextmanager
def atomic_folder(folder: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    ``keep_existing``: when another process finished first, its folder stays and ours is dropped (for caches, whose
    content is equal by construction).

    Raises:
        ValueError: when ``folder`` exists, holds something and is not to be kept: we never overwrite weights.
    """
    folder = Path(folder)
    if folder.exists() and not keep_existing and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield private
        private.chmod(0o755)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        try:
            os.rename(private, folder)
        except OSError:
            if not (keep_existing and (folder / MARKER).exists()):
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        ValueError: when the file is missing, is not JSON or is not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` and an index where one file is too small.

    A tensor larger than ``max_shard_bytes`` gets a shard of its own.
    """
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        write_file(groups[0], folder / SINGLE)
        return
    where: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_file(group, folder / file)
        where |= dict.fromkeys(group, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    # transformers refuses files whose header does not say that they come from torch
    whole = {k: v.detach().contiguous() for k, v in tensors.items()}
    save_file(whole, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes files that only their owner can read


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped (pages are read when touched, and are copied when written).

    Raises:
        ValueError: when the file is missing or torn.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: of ``model.safetensors``, or of the shards that the index names.

    Raises:
        ValueError: when both or neither are there, a shard is missing, or index and shards disagree.
    """
    folder = Path(folder)
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single:
        return read_file(folder / SINGLE)
    if not index:
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    return read_indexed(folder, INDEX)


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file that has not been read."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, cut: Cut | None = None) -> Tensor:
        """The tensor, or a part of it. Its file is mapped for it alone, so that its pages go when it does.

        Raises:
            ValueError: when ``cut`` asks for parts that are not equal.
        """
        with safe_open(str(self.path), framework="pt") as file:
            if cut is None:
                return file.get_tensor(self.name)
            axis, part, parts = cut
            if axis >= len(self.shape) or self.shape[axis] % parts:
                raise ValueError(f"{parts} ranks cannot share axis {axis} of {self.name} {self.shape} evenly")
            size = self.shape[axis] // parts
            rows = slice(part * size, (part + 1) * size)
            return file.get_slice(self.name)[(slice(None),) * axis + (rows,)]


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder as :func:`read_tensors` finds it, by name; only headers are read."""
    read_tensors(folder)  # maps the files, reads no weights, and finds everything that is wrong
    files = [folder / SINGLE]
    if not files[0].is_file():
        files = [folder / file for file in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    return {name: entry for path in files for name, entry in file_entries(path).items()}


def file_entries(path: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file by name; only its header is read. Errors as :func:`read_file`."""
    read_file(path)  # maps it, and finds what is torn
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()
        return {name: Entry(path, name, tuple(file.get_slice(name).get_shape())) for name in names}


def read_indexed(folder: Path, index: str) -> dict[str, Tensor]:
    """All tensors of the shards named by an index file; errors as in :func:`read_tensors`."""
    where = read_json(folder / index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise ValueError(f"{folder / index} has no weight_map from tensor names to file names")
    outside = sorted(f for f in set(where.values()) if Path(f).name != f)
    if outside:  # an index is data from elsewhere: it may not point out of its folder
        raise ValueError(f"{folder / index} names files outside its folder: {', '.join(outside)}")
    missing = sorted(f for f in set(where.values()) if not (folder / f).is_file())
    if missing:
        raise ValueError(f"{folder} misses {len(missing)} shard(s) named by {index}: {', '.join(missing[:20])}")
    tensors: dict[str, Tensor] = {}
    wrong: list[str] = []
    for file in sorted(set(where.values())):
        shard = read_file(folder / file)
        wrong += [f"{k} (in {file}, index says {where.get(k, 'nothing')})" for k in shard if where.get(k) != file]
        tensors |= shard
    wrong += [f"{k} (not in {where[k]})" for k in where if k not in tensors]
    if wrong:
        raise ValueError(f"{folder / index} and its shards disagree on {len(wrong)} tensor(s): {', '.join(wrong[:20])}")
    return tensors


def cast(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same tensors in ``dtype`` (unchanged, and still mapped, where they have it already or it is None)."""
    return tensors if dtype is None else {k: v.to(dtype) for k, v in tensors.items()}


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors for a file: floating ones in ``dtype``, but as they are where it cannot hold them.

    That is where a value overflows, or where rounding moves one by more than ``eps`` of the tensor's largest: fp16 has
    no digits left for numbers that are all tiny.

    Raises:
        ValueError: for a tensor that is not finite to begin with, naming it.
    """
    out, kept = dict[str, Tensor](), list[str]()
    for name, tensor in tensors.items():
        out[name] = tensor = tensor.detach().cpu().contiguous()
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        most = tensor.abs().max().double()
        if not torch.isfinite(most):
            raise ValueError(f"{name} holds values that are not finite; such weights are not written")
        short = tensor.to(dtype)
        if (short.double() - tensor.double()).abs().max() <= torch.finfo(dtype).eps * most:
            out[name] = short
        else:
            kept.append(name)
    if kept:
        _log.info("%d tensors stay as they are, %s cannot hold them: %s", len(kept), dtype, ", ".join(kept[:8]))
    return out
