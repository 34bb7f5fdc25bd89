"""Where numbers of a run go: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accessory import log

LOG = log.get(__name__)


@dataclass
class Clock:
    """Seconds of training, those before a resume included."""

    before: float = 0.0
    start: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.start


@dataclass
class Window:
    """Sums since the last logged row, over all ranks. ``seconds`` is wall time, ``data_wait`` waiting for batches; a
    row has it in seconds and as the share of the time (``data_wait_share``)."""

    loss: float = 0.0
    count: float = 0.0  # learned tokens
    tokens: float = 0.0  # real positions
    images: float = 0.0
    seconds: float = 0.0
    data_wait: float = 0.0
    others: dict[str, float] = field(default_factory=dict)

    def add(self, sums: Mapping[str, float], seconds: float, data_wait: float) -> None:
        """Add the sums of one update: ``loss count tokens images`` and the objective's own."""
        extra = dict(sums)
        for name in ("loss", "count", "tokens", "images"):
            setattr(self, name, getattr(self, name) + extra.pop(name))
        self.seconds += seconds
        self.data_wait += data_wait
        for name, value in extra.items():
            self.others[name] = self.others.get(name, 0.0) + value

    def row(self) -> dict[str, float]:
        """Means per learned token and rates per second."""
        per_second = 1 / max(self.seconds, 1e-9)
        return {
            "loss": self.loss / self.count,
            **{name: value / self.count for name, value in self.others.items()},
            "tokens_per_s": self.tokens * per_second,
            "learned_tokens_per_s": self.count * per_second,
            "images_per_s": self.images * per_second,
            "data_wait": self.data_wait,
            "data_wait_share": self.data_wait * per_second,
        }

    def state(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint between two rows."""
        return asdict(self)


class Metrics:
    """Writes rows. ``history`` is the length of metrics.jsonl in bytes at the resumed checkpoint: what an interrupted
    run wrote after it is cut off, because those steps are run again. ``max_steps`` None: the clock ends the run."""

    def __init__(self, output_dir: Path, max_steps: int | None, step: int, history: int, tensorboard: bool) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "metrics.jsonl"
        self._file = self.path.open("ab")
        self._file.truncate(min(history, self.path.stat().st_size))
        self._board = _board(output_dir / "tensorboard", step) if tensorboard else None
        self._bar = _bar(max_steps, step)
        self.max_steps = max_steps

    @property
    def position(self) -> int:
        """Bytes of metrics.jsonl so far."""
        self._file.flush()
        return self.path.stat().st_size

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row (``step`` and numbers) to the file and the board. Numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])

    def show(self, row: Mapping[str, Any], left: float) -> None:
        """Tell the user: ``left`` seconds to go."""
        parts = [f"loss {row['loss']:.4f} lr {row['lr']:.2e} norm {row['grad_norm']:.2f}"]
        # Who draws reads no tokens, who reads may see no pictures.
        parts += [f"{row['tokens_per_s']:.0f} tokens/s"] if row["tokens_per_s"] else []
        parts += [f"{row['images_per_s']:.1f} images/s"] if row["images_per_s"] else []
        text = " ".join([*parts, f"{duration(left)} left"])
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            of = "" if self.max_steps is None else f"/{self.max_steps}"
            LOG.info("step %d%s %s", row["step"], of, text)

    def tick(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """A line for the user that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            LOG.info("%s", text)

    def close(self) -> None:
        """Close file, board and bar."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """``1:02:03`` or ``02:03``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def source_names(sources: list[tuple[str, ...]]) -> str:
    """Where batches came from, for an error message."""
    names = sorted({name for part in sources for name in part if name})
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return shown or "an unnamed source"


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # optional: metrics.jsonl has the same numbers
    return SummaryWriter(str(folder), purge_step=step)


def _bar(max_steps: int | None, step: int) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    shape = "step {n} {postfix}" if max_steps is None else "{n}/{total} |{bar:20}| {postfix}"
    return tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True, bar_format=shape)
