"""Checkpoints of a run that trains on while they are written: copied in main memory, then written by a thread.

And where data and random numbers go on after a resume, on as many ranks as before or on others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from accessory import config as configuration
from accessory import log
from accessory.parallel import groups
from accessory.parallel.layout import Layout, local
from accessory.train import checkpoint, rng
from accessory.train.checkpoint import Checkpoint, CheckpointError
from accessory.train.config import check_resumed

LOG = log.get(__name__)
_PATIENCE = 60.0  # seconds that a run which fails waits for a save that has begun


class Saver:
    """Writes the checkpoints of a run and keeps its newest ``keep_last``. All ranks make one and call it together.

    A save that fails, on a full disk say, is told and forgotten when the next one begins: the run and its last good
    checkpoint are worth more. ``background``: a thread of every rank writes, with collectives of its own.
    """

    def __init__(self, output_dir: Path, keep_last: int, layout: Layout, *, background: bool = True) -> None:
        self.output_dir, self.keep_last, self.layout, self.background = output_dir, keep_last, layout, background
        self._group = groups.beside()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def save(self, step: int, content: Checkpoint) -> None:
        """Begin a checkpoint of this rank's parts, after the one before it is done."""
        self._join()
        self._failure = None
        if not self.background:
            self._write(step, content)
            return
        copies = (_copied(tensors) for tensors in (content.trainable, content.optimizer, content.average))
        trainable, optimizer, average = copies
        content = replace(content, trainable=trainable, optimizer=optimizer, average=average)
        self._thread = threading.Thread(target=self._write, args=(step, content), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last save is whole on the disk.

        Raises:
            CheckpointError: when it could not be written; on all ranks, or on none.
        """
        self._join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Let a save that has begun end, whatever becomes of it."""
        self._join(_PATIENCE)

    def _join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _write(self, step: int, content: Checkpoint) -> None:
        try:
            checkpoint.save(self.output_dir, step, content, self.layout, self._group)
            with checkpoint.together(self._group):
                if groups.rank() == 0:
                    checkpoint.prune(self.output_dir, self.keep_last)
        except Exception as error:  # whatever it is, a thread would keep it to itself
            self._failure = error if isinstance(error, CheckpointError) else CheckpointError(f"step {step}: {error!r}")
            if groups.rank() == 0:
                LOG.error("no checkpoint of step %d: %s", step, self._failure)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In main memory, where training does not change them."""
    own = {name: local(tensor.detach()) for name, tensor in tensors.items()}
    return {name: torch.empty(part.shape, dtype=part.dtype).copy_(part) for name, part in own.items()}


def compare(path: Path, resolved: str) -> None:
    """Refuse a checkpoint of another model or other data than the configuration ``resolved`` has; say what else is no
    longer as it was."""
    kept = path / "config.yaml"
    if not resolved or not kept.is_file():
        return
    before = configuration.parse(kept.read_text(encoding="utf-8"), str(kept))
    for line in check_resumed(before, configuration.parse(resolved), str(path)):
        LOG.info("changed since the checkpoint: %s", line)


class _Source(Protocol):
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class DealtSource(Protocol):
    """Batches that can go on with another number of data ranks: of the ``states`` of all that there were, one for this
    rank is made. No row comes twice and none is lost."""

    def dealt_anew(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...


def restore(source: _Source, ranks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Take up rows and random numbers where the data ``ranks`` of the checkpoint at ``path`` left them.

    Raises:
        CheckpointError: when there are more or fewer now, and ``source`` cannot deal its rows anew.
    """
    mine, count = groups.data_rank(), groups.data_size()
    if len(ranks) == count:
        source.load_state_dict(ranks[mine]["data"])
    elif isinstance(source, DealtSource):
        source.load_state_dict(source.dealt_anew([rank["data"] for rank in ranks]))
        LOG.warning(
            "%s: %d data ranks then, %d now; what was not read yet is dealt anew. Only with train.global_batch is an "
            "update as large as it was", path, len(ranks), count,
        )  # fmt: skip
    else:
        raise CheckpointError(f"{path} was made by {len(ranks)} data ranks, this run has {count}")
    if mine < len(ranks):  # one that is new draws as its seed says
        rng.restore(ranks[mine]["rng"])


# --- one run a folder ----------------------------------------------------------------------------------------------

PATIENCE = 15.0
"""Seconds in which the workers of a run that was killed notice it and let its folder go."""


def _locked(folder: int) -> bool:
    """Whether an open folder is ours now. The lock goes with the process, however that ends."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def alone(output_dir: str | Path) -> Iterator[None]:
    """Be the only run that writes into ``output_dir``: two would prune and replace each other's checkpoints.

    Raises:
        CheckpointError: on every rank, where another run does.
    """
    with contextlib.ExitStack() as held:
        with checkpoint.together():
            if groups.rank() == 0:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                folder = os.open(output_dir, os.O_RDONLY)
                held.callback(os.close, folder)
                limit = time.monotonic() + PATIENCE
                while not _locked(folder):
                    if time.monotonic() > limit:
                        raise CheckpointError(
                            f"another run is writing into {output_dir}; end it first (the processes of a launcher that "
                            "was killed may still be there), or choose another output_dir"
                        )
                    time.sleep(0.2)
        yield
