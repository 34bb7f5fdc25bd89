"""What a training run can be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from accessory.parallel.layout import ParallelConfig

_OF_TRAIN = ("train.seed", "train.accumulation", "train.global_batch", "train.batch_size", "train.optimizer")
_FIXED = ("model", "generator", "objective", "data", *_OF_TRAIN)
_FREE = ("data.workers", "data.max_bad_rate")  # batches are the same whatever they are


def changes(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values wherever two trees of plain values differ.

    A name that only one of them has is passed over: it came or went with another version of the program.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from changes(before[key], now[key], f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from changes(a, b, f"{path}.{i}")
    elif before != now:
        yield path, before, now


def check_resumed(before: Any, now: Any, name: str) -> list[str]:
    """What a resumed run may have other than its checkpoint ``name``: ``path: old, now new`` for each.

    Raises:
        ValueError: when what the numbers of the checkpoint stand for has changed: the model, the objective, the data
            or how a step draws from them.
    """
    found = sorted(changes(before, now), key=lambda c: c[0])
    said = {path: f"{path}: {a!r} then, {b!r} now" for path, a, b in found}
    bad = [s for p, s in said.items() if _under(p, _FIXED) and not _under(p, _FREE)]
    if bad:
        raise ValueError(
            f"{name} belongs to another configuration; choose another output_dir or undo: {'; '.join(bad)}"
        )
    return list(said.values())


def _under(path: str, names: tuple[str, ...]) -> bool:
    return any(path == n or path.startswith(n + ".") for n in names)


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches ``pattern`` (as file names match, ``*`` and ``?``) get their own settings.

    The first group that matches a name wins. ``weight_decay`` None keeps the ordinary rule.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.lr_scale < 0:
            raise ValueError(f"lr_scale {self.lr_scale} of group {self.pattern!r} must not be negative")


@dataclass(frozen=True)
class EmaConfig:
    """A running average of what trains: ``decay`` for every ``every``-th update, but at most ``(1 + n) / (warmup + n)``
    for its n-th. ``export``: it becomes the final weights."""

    decay: float = 0.999
    warmup: int = 10
    every: int = 1
    export: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay {self.decay} must be at least 0 and below 1")
        if self.warmup < 1 or self.every < 1:
            raise ValueError(f"ema.warmup {self.warmup} and ema.every {self.every} must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``max_steps`` updates, or of ``max_seconds``, whichever ends first.

    ``batch_size`` counts samples of one micro-batch on one data rank, or packs where ``data.packing`` is set; an update
    sees ``batch_size x accumulation x data ranks``, of which there are as many as processes, or that number divided by
    ``parallel.tensor``. ``global_batch`` states that product in place of ``accumulation``, so that an experiment is the
    same on any number of ranks.
    ``schedule_by='time'`` lets the cosine follow the wall clock, so that a run with a fixed time budget ends with a
    cooled-down learning rate whatever the machine's speed. ``clip_norm`` None does not clip; ``threads`` None leaves
    torch's choice; ``precision`` bf16 computes in bf16 on a GPU, and on a CPU only with ``cpu_autocast``: it pays where
    most weights train, and costs where frozen fp32 weights are converted at every step. ``optimizer`` muon updates
    hidden matrices by :class:`torch.optim.Muon` (same learning rates, as its updates are scaled to AdamW's size) and
    all others by AdamW; adamw8bit keeps AdamW's moments in a byte each. ``loss_chunk``: at most so many learned
    positions have their scores over the vocabulary in memory at a time; null: all of a micro-batch. ``log_every`` and
    ``checkpoint_every`` count updates; of checkpoints the newest ``keep_last`` stay. ``save_beside`` copies what a rank
    saves in main memory and writes it while training goes on; without it nothing is copied and training waits.
    """

    output_dir: str
    max_steps: int
    lr: float
    batch_size: int = 8
    accumulation: int = 1
    global_batch: int | None = None
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    cpu_autocast: bool = False
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    checkpoint_every: int = 500
    keep_last: int = 2
    save_beside: bool = True
    log_every: int = 10
    seed: int = 0
    compile: bool = False
    block_checkpointing: bool = False
    threads: int | None = None
    groups: tuple[GroupConfig, ...] = ()
    max_seconds: float | None = None
    schedule_by: Literal["steps", "time"] = "steps"
    tensorboard: bool = True
    ema: EmaConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "accumulation", "checkpoint_every", "keep_last", "log_every")
        for name in (*counts, "threads", "global_batch", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if self.global_batch is not None and self.accumulation != 1:
            raise ValueError(
                f"global_batch {self.global_batch} decides the accumulation, and accumulation is {self.accumulation}: "
                "write one of them"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must lie between 0 and max_steps {self.max_steps}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm {self.clip_norm} must be positive; null means no clipping")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds {self.max_seconds} must be positive; null means no limit")
        if self.optimizer == "muon" and self.parallel != ParallelConfig():
            raise ValueError("optimizer muon needs whole matrices: with it, parallel.tensor is 1 and parallel.data ddp")
        if self.loss_chunk is not None and self.parallel.data == "fsdp":
            raise ValueError(
                f"loss_chunk {self.loss_chunk} calls the output layer as often as a rank has something to learn, and "
                "parallel.data fsdp needs ranks that call alike; leave one of them out"
            )
        if self.schedule_by == "time" and self.max_seconds is None:
            raise ValueError("schedule_by is 'time', which needs max_seconds")

    def on(self, ranks: int) -> TrainConfig:
        """These settings for so many ranks: ``global_batch`` has become ``accumulation``.

        Raises:
            ValueError: when it is no multiple of what the ranks read at once.
        """
        if self.global_batch is None:
            return self
        each = self.batch_size * ranks
        if self.global_batch % each:
            raise ValueError(
                f"train.global_batch {self.global_batch} is no multiple of train.batch_size {self.batch_size} x "
                f"{ranks} ranks = {each}; change one of the three"
            )
        return replace(self, accumulation=self.global_batch // each, global_batch=None)
