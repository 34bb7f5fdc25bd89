"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
class TrainConfig:
    """A run of ``max_steps`` updates, or of ``max_seconds``, whichever ends first.

    ``batch_size`` counts samples of one micro-batch on one rank; an update sees ``batch_size x accumulation x ranks``.
    ``schedule_by='time'`` lets the cosine follow the wall clock, so that a run with a fixed time budget ends with a
    cooled-down learning rate whatever the machine's speed. ``clip_norm`` None does not clip; ``threads`` None leaves
    torch's choice; ``eval_every`` None evaluates only at the end; ``log_every`` and the others count updates.
    """

    output_dir: str
    max_steps: int
    lr: float
    batch_size: int = 8
    accumulation: int = 1
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpoint_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    eval_every: int | None = None
    seed: int = 0
    compile: bool = False
    block_checkpointing: bool = False
    threads: int | None = None
    groups: tuple[GroupConfig, ...] = ()
    max_seconds: float | None = None
    schedule_by: Literal["steps", "time"] = "steps"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "accumulation", "checkpoint_every", "keep_last", "log_every", "eval_every")
        for name in (*counts, "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must lie between 0 and max_steps {self.max_steps}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm {self.clip_norm} must be positive; null means no clipping")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ValueError(f"max_seconds {self.max_seconds} must be positive; null means no limit")
        if self.schedule_by == "time" and self.max_seconds is None:
            raise ValueError("schedule_by is 'time', which needs max_seconds")
