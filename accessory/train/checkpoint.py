"""Checkpoints: a folder a step, complete or ignored.

Everything is written into a hidden folder, forced to the disk and renamed; the file ``COMPLETE`` comes last. A crash at
any moment leaves either the old checkpoints alone or a folder without the marker, which nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.parallel import groups

MARKER = "COMPLETE"
_STEP = re.compile(r"^step-(\d{6,})$")
_AVERAGE = "average.safetensors"
_SLACK = 1 << 20  # bytes that must stay free beside the tensors: texts, folder entries


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by name (``average`` empty without one), the JSON-able state of the run, and
    texts to keep beside it."""

    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What goes wrong on rank 0 is raised on every rank: one that went on alone would wait for ever."""
    error: str | None = None
    try:
        yield
    except (CheckpointError, OSError) as failure:
        error = str(failure)
    failed = groups.gather_objects(error)[0]
    if failed:
        raise CheckpointError(failed)


def folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / f"step-{step:06d}"


def complete(output_dir: str | Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    root = Path(output_dir)
    found = [p for p in root.iterdir() if _STEP.match(p.name) and (p / MARKER).is_file()] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(output_dir)
    return found[-1] if found else None


def save(output_dir: str | Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; it exists completely or not at all.

    Raises:
        CheckpointError: when the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = folder(output_dir, step)
    tensors = {"trainable.safetensors": checkpoint.trainable, "optimizer.safetensors": checkpoint.optimizer}
    if checkpoint.average:
        tensors[_AVERAGE] = checkpoint.average
    texts = {**checkpoint.texts, "state.json": json.dumps(checkpoint.state)}
    write_folder(target, tensors, texts)
    try:
        _write(target / MARKER, f"{step}\n".encode())
        _sync_folder(target)
    except OSError as error:
        (target / MARKER).unlink(missing_ok=True)
        raise _failure(target, error) from error
    return target


def write_folder(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Put files into a fresh ``target``, all or nothing: hidden folder, fsync, rename. Replaces what was there.

    Raises:
        CheckpointError: when the disk is full or cannot be written.
    """
    root, hidden = target.parent, target.parent / f".{target.name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        _check_space(root, tensors, target)
        hidden.mkdir()
        for name, values in tensors.items():
            # safetensors refuses tensors that share memory or have strides, which a state may legitimately have.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in values.items()}, hidden / name)
            _sync_file(hidden / name)
        for name, text in texts.items():
            _write(hidden / name, text.encode())
        _sync_folder(hidden)
        if target.exists():
            shutil.rmtree(target)
        hidden.rename(target)
        _sync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise _failure(target, error) from error


def _failure(target: Path, error: Exception) -> CheckpointError:
    codes = (errno.ENOSPC, errno.EDQUOT)
    full = (isinstance(error, OSError) and error.errno in codes) or "No space" in str(error)
    why = "the disk is full" if full else str(error)
    return CheckpointError(f"cannot write {target}: {why}. Earlier checkpoints are untouched.")


def _check_space(root: Path, tensors: Mapping[str, Mapping[str, Tensor]], target: Path) -> None:
    needed = sum(t.numel() * t.element_size() for values in tensors.values() for t in values.values()) + _SLACK
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"cannot write {target}: it needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free. "
            "Earlier checkpoints are untouched; free some space and resume."
        )


def prune(output_dir: str | Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` complete checkpoints, and what crashed runs left half written."""
    found = complete(output_dir)
    if not found:
        return
    newest = int(found[-1].name.removeprefix("step-"))
    keep = set(found[-keep_last:])
    for path in list(Path(output_dir).iterdir()):
        match = _STEP.match(path.name)
        # An incomplete folder above the newest may be another process's save between rename and marker.
        if match and path not in keep and int(match.group(1)) <= newest:
            (path / MARKER).unlink(missing_ok=True)  # first, so that a half-removed folder is never read
            shutil.rmtree(path)


def resolve(resume: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that ``--resume`` names: None, ``auto`` (the newest, if any), a run's folder or a checkpoint.

    Raises:
        CheckpointError: when a named one is not there or not complete, or when ``output_dir`` holds other and newer
            checkpoints, which the run would overwrite.
    """
    if resume is None:
        old = latest(output_dir)
        if old is not None:
            raise CheckpointError(f"{old} exists: continue it with --resume auto, or choose another output_dir")
        return None
    if resume == "auto":
        return latest(output_dir)
    path = Path(resume)
    chosen = path if (path / MARKER).is_file() else latest(path)
    if chosen is None:
        raise CheckpointError(f"--resume {resume}: neither a complete checkpoint nor a folder that has one")
    newest = latest(output_dir)
    if newest is not None and newest.resolve() != chosen.resolve():
        raise CheckpointError(f"--resume {resume}: {newest} would be overwritten; choose another output_dir")
    return chosen


def load(path: Path) -> Checkpoint:
    """Read a complete checkpoint.

    Raises:
        CheckpointError: when it is not complete or a file is damaged, naming it.
    """
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no file {MARKER})")
    try:
        return Checkpoint(
            trainable=load_file(path / "trainable.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            state=json.loads((path / "state.json").read_text()),
            average=load_file(path / _AVERAGE) if (path / _AVERAGE).is_file() else {},
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Resume from an earlier checkpoint.") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
