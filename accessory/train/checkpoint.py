"""Checkpoints: a folder a step, complete or ignored.

Everything is written into a hidden folder and forced to the disk; the file ``COMPLETE`` comes last, with size and
digest of all others, and then the folder gets its name. A crash at any moment leaves either the old checkpoints alone
or a folder that nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
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

from accessory import log
from accessory.parallel import groups, storage
from accessory.parallel.layout import Layout, local

LOG = log.get(__name__)
MARKER = "COMPLETE"
_STEP = re.compile(r"^step-(\d{6,})$")
_SLACK = 1 << 20  # bytes that must stay free beside the tensors: texts, folder entries
KINDS = ("trainable", "optimizer", "average")


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

    def tensors(self) -> dict[str, Tensor]:
        """All of them by ``kind/name``."""
        return {f"{kind}/{name}": t for kind in KINDS for name, t in getattr(self, kind).items()}


@contextlib.contextmanager
def together(group: Any = None) -> Iterator[None]:
    """What goes wrong on any rank is raised on every one: one that went on alone would wait for ever."""
    error: str | None = None
    try:
        yield
    except (CheckpointError, OSError) as failure:
        error = str(failure)
    failed = next((e for e in groups.gather_objects(error, among=group) if e), None)
    if failed:
        raise CheckpointError(failed)


def folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / f"step-{step:06d}"


def complete(output_dir: str | Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    root = Path(output_dir)
    found = [p for p in root.iterdir() if _STEP.match(p.name) and _manifest(p) is not None] if root.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(output_dir)
    return found[-1] if found else None


def save(
    output_dir: str | Path, step: int, checkpoint: Checkpoint, layout: Layout | None = None, group: Any = None
) -> Path:
    """Write a checkpoint; it exists completely or not at all.

    Every rank calls this with its parts of the tensors and writes some; ``group``: of all ranks, as of
    :func:`accessory.parallel.groups.beside`. The state and the texts are those of rank 0.

    Raises:
        CheckpointError: on every rank, when the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    layout, target = layout or Layout(), folder(output_dir, step)
    tensors, hidden = checkpoint.tensors(), _hidden(target)
    with together(group):
        if groups.rank() == 0:
            _prepare(target, _size(tensors, layout))
    facts: dict[str, list[Any]] = {}
    error: str | None = None
    try:
        facts = {name: _fact(hidden / name) for name in storage.write(hidden, tensors, layout, group)}
    except (OSError, SafetensorError, RuntimeError) as failure:
        error = str(_failure(target, failure))
    everywhere = groups.gather_objects((facts, error), among=group)
    with together(group):
        if groups.rank() == 0:
            errors = [error for _, error in everywhere if error]
            if errors:
                shutil.rmtree(hidden, ignore_errors=True)
                raise CheckpointError(errors[0])
            files = {name: fact for rank, _ in everywhere for name, fact in rank.items()}
            texts = {**checkpoint.texts, "state.json": json.dumps(checkpoint.state)}
            with _told(target):
                for name, text in texts.items():
                    _write(hidden / name, text.encode())
                    files[name] = _fact(hidden / name)
                _write(hidden / MARKER, json.dumps({"step": step, "files": files}).encode())
                _place(hidden, target)
    return target


def write_folder(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Put files of whole tensors into a fresh ``target``, all or nothing: hidden folder, fsync, rename. Replaces what
    was there.

    Raises:
        CheckpointError: when the disk is full or cannot be written.
    """
    hidden = _hidden(target)
    _prepare(target, sum(t.numel() * t.element_size() for values in tensors.values() for t in values.values()))
    with _told(target):
        hidden.mkdir()
        for name, values in tensors.items():
            # safetensors refuses tensors that share memory or have strides, which a state may legitimately have.
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in values.items()}, hidden / name)
            (hidden / name).chmod(0o644)  # which safetensors writes for its owner alone
            _sync(hidden / name)
        for name, text in texts.items():
            _write(hidden / name, text.encode())
        _place(hidden, target)


def _hidden(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _prepare(target: Path, needed: int) -> None:
    """Room for ``needed`` bytes, and nothing of an earlier attempt."""
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(_hidden(target), ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
    needed += _SLACK
    if free < needed:
        raise CheckpointError(
            f"cannot write {target}: it needs {needed / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB free. "
            "Earlier checkpoints are untouched; free some space and resume."
        )


def _size(tensors: Mapping[str, Tensor], layout: Layout) -> int:
    """Bytes of whole tensors, of which these are this rank's parts."""
    return sum(t.element_size() * math.prod(layout.whole_shape(n, local(t))) for n, t in tensors.items())


def _place(hidden: Path, target: Path) -> None:
    """Give a folder that is written its name. At no moment is what had the name gone for good (:func:`_recover`)."""
    aside = _aside(target)
    _sync(hidden)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    hidden.rename(target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(root: Path) -> None:
    """Finish what a run that died left behind: give back what was put aside, drop what was never whole."""
    for path in [*root.iterdir()] if root.is_dir() else []:
        name, _, kind = path.name.removeprefix(".").rpartition(".")
        if not path.name.startswith(".") or not (_STEP.match(name) or name == "final"):
            continue
        if kind == "old" and not (root / name).exists():
            path.rename(root / name)
        elif kind in ("old", "partial"):
            shutil.rmtree(path)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_hidden(target), ignore_errors=True)
        raise _failure(target, error) from error


def _failure(target: Path, error: Exception) -> CheckpointError:
    codes = (errno.ENOSPC, errno.EDQUOT)
    full = (isinstance(error, OSError) and error.errno in codes) or "No space" in str(error)
    why = "the disk is full" if full else str(error)
    return CheckpointError(f"cannot write {target}: {why}. Earlier checkpoints are untouched.")


def prune(output_dir: str | Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` complete checkpoints, and what crashed runs left half written."""
    found = complete(output_dir)
    if not found:
        return
    newest = int(found[-1].name.removeprefix("step-"))
    keep = set(found[-keep_last:])
    for path in list(Path(output_dir).iterdir()):
        match = _STEP.match(path.name)
        # An incomplete folder above the newest has lost its marker; the run comes to that step again.
        if match and path not in keep and int(match.group(1)) <= newest:
            (path / MARKER).unlink(missing_ok=True)  # first, so that a half-removed folder is never read
            shutil.rmtree(path)


def resolve(resume: str | None, output_dir: str | Path, *, repair: bool = True) -> Path | None:
    """The checkpoint that ``--resume`` names: None, ``auto`` (the newest, if any), a run's folder or a checkpoint. All
    ranks ask together and hear the same.

    ``repair``: what a run that died left behind is cleared up first; not for one who only looks, as another run may be
    writing there.

    Raises:
        CheckpointError: when a named one is not there or not complete, or when ``output_dir`` holds other and newer
            checkpoints, which the run would overwrite.
    """
    found: Path | None = None
    with together():
        if groups.rank() == 0:
            if resume is None:
                _named(resume, output_dir)  # refuses before anything is touched
            if repair:
                _recover(Path(output_dir))
            found = _named(resume, output_dir)
    first: Path | None = groups.gather_objects(found)[0]
    return first


def _named(resume: str | None, output_dir: str | Path) -> Path | None:
    if resume is None:
        old = latest(output_dir)
        if old is not None:
            raise CheckpointError(f"{old} exists: continue it with --resume auto, or choose another output_dir")
        return None
    if resume == "auto":
        return latest(output_dir)
    path = Path(resume)
    chosen = path if _manifest(path) is not None else latest(path)
    if chosen is None:
        raise CheckpointError(f"--resume {resume}: neither a complete checkpoint nor a folder that has one")
    newest = latest(output_dir)
    if newest is not None and newest.resolve() != chosen.resolve():
        raise CheckpointError(f"--resume {resume}: {newest} would be overwritten; choose another output_dir")
    return chosen


def sound(resume: str | None, output_dir: str | Path) -> Path | None:
    """What :func:`resolve` finds, after every file has been read and found as it was written. A damaged one that
    ``auto`` comes upon is put aside for the one before it, from which the run makes it again.

    Raises:
        CheckpointError: as of :func:`resolve`; when a damaged one was named or there is none before it.
    """
    while (found := resolve(resume, output_dir)) is not None:
        files = [*(_manifest(found) or {}).items()]
        mine = files[groups.rank() :: groups.world_size()]  # together they read each file once
        bad = [name for name, fact in mine if not _as_written(found / name, fact)]
        damaged = sorted(name for rank in groups.gather_objects(bad) for name in rank)
        if not damaged:
            break
        what = f"{found} is damaged: {', '.join(damaged)} not as written"
        with together():
            if resume != "auto":
                raise CheckpointError(f"{what}. Resume from an earlier checkpoint.")
            if groups.rank() == 0:
                if len(complete(output_dir)) == 1:
                    raise CheckpointError(f"{what}, and no checkpoint is before it; remove it to begin anew")
                aside = found.with_name(f"{found.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                found.rename(aside)
                LOG.warning("%s; it is %s now, and the run goes on from the one before it", what, aside)
    return found


def _as_written(path: Path, fact: Any) -> bool:
    try:
        return path.is_file() and _fact(path) == fact
    except OSError:  # a file that cannot be read is damaged; a rank that raised alone would leave the others waiting
        return False


def load(path: Path, layout: Layout | None = None) -> Checkpoint:
    """Read a complete checkpoint: this rank's parts of its tensors as ``layout`` cuts them, without one all of them.

    Raises:
        CheckpointError: when it is not complete or a file is damaged, naming it.
        ValueError: for a tensor that cannot be cut so.
    """
    if _manifest(path) is None:
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no file {MARKER})")
    layout = layout or Layout()
    try:
        state = json.loads((path / "state.json").read_text())
        if (path / f"{KINDS[0]}.safetensors").is_file():  # of a version in which rank 0 wrote whole tensors
            files = {kind: path / f"{kind}.safetensors" for kind in KINDS}
            parts = {kind: layout.own(load_file(file)) if file.is_file() else {} for kind, file in files.items()}
        else:
            parts = {kind: dict[str, Tensor]() for kind in KINDS}
            for name, tensor in storage.read(path, layout).items():
                kind, _, own = name.partition("/")
                parts[kind][own] = tensor
    except (OSError, SafetensorError, RuntimeError, AssertionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Resume from an earlier checkpoint.") from error
    return Checkpoint(parts["trainable"], parts["optimizer"], state, average=parts["average"])


def _manifest(path: Path) -> dict[str, list[Any]] | None:
    """Size and digest of every file of a complete checkpoint, nothing of one that has none; None where it is not
    complete."""
    try:
        found = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return None
    if isinstance(found, int):  # of a version that wrote the step alone
        return {}
    files = found.get("files") if isinstance(found, dict) else None
    return files if isinstance(files, dict) else None


def _fact(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Force a file or the entries of a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
