"""The only training loop. It knows batches, an objective and trainable parameters, and nothing of what the model is."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from accessory import config as configs
from accessory import log
from accessory.parallel import groups
from accessory.parallel.layout import Layout
from accessory.schema import Batch
from accessory.train import blocks as block_tools
from accessory.train import checkpoint, rng
from accessory.train.config import TrainConfig
from accessory.train.consolidate import FINAL
from accessory.train.ema import Average
from accessory.train.metrics import Clock, Metrics, Window, source_names
from accessory.train.optim import Optimizer, check_names, learning_rate, trained_buffers
from accessory.train.parts import PartNorms, PartObjective, RestingObjective
from accessory.train.saving import Saver, alone, compare, restore
from accessory.train.signals import Interrupts

if TYPE_CHECKING:  # the loop takes any objective; importing ours would import the models
    from accessory.train.objective import Objective

LOG = log.get(__name__)


class TrainingDiverged(ValueError):  # noqa: N818  (a state of the run, named as users speak of it)
    """Loss or gradient is no longer a finite number. Nothing of the bad step was saved."""


class BatchSource(Protocol):
    """Batches for ever or for an epoch. The state is the place after the last batch that was handed out."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Result:
    """How a run ended: ``reason`` is ``steps``, ``time``, ``SIGTERM`` or ``SIGINT``; ``row`` has the last numbers."""

    step: int
    reason: str
    checkpoint: Path
    final: Path | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know.

    ``blocks``: modules for block checkpointing and compilation. ``export``: tensors of the final export (default: the
    trainable ones). ``resolved``: the configuration as YAML, kept beside every checkpoint. ``texts``: files of
    the final export by name, over those of a checkpoint. ``layout``: what ``parallelize`` made of ``train.parallel``.
    """

    blocks: Iterable[nn.Module] = ()
    export: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    resolved: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)


def train(
    model: nn.Module,
    source: BatchSource,
    objective: Objective,
    config: TrainConfig,
    *,
    resume: str | None = None,
    hooks: Hooks | None = None,
) -> Result:
    """Train the parameters of ``model`` that require a gradient. The model lies on its device already.

    ``resume``: None, ``auto``, a run's folder or a checkpoint. The loss of an update is the sum over all learned tokens
    of its micro-batches and ranks divided by their number.

    Raises:
        TrainingDiverged: for a loss or gradient that is not finite, naming the last good checkpoint and the samples.
        CheckpointError: when a checkpoint cannot be written or resumed.
    """
    with alone(config.output_dir):
        return Trainer(model, source, objective, config, hooks or Hooks(), resume).run()


class Trainer:
    """State of one run; :func:`train` is the way in."""

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        objective: Objective,
        config: TrainConfig,
        hooks: Hooks,
        resume: str | None = None,
    ) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model, self.source, self.objective, self.config, self.hooks = model, source, objective, config, hooks
        self.output_dir = Path(config.output_dir)
        self.layout = hooks.layout
        if self.layout.plan != config.parallel:
            raise ValueError(f"train.parallel is {config.parallel}, but the model was laid out as {self.layout.plan}")
        self.optimizer = Optimizer(model, config, self.layout)
        self.device = next(iter(self.optimizer.parameters.values())).device
        self.buffers = trained_buffers(model)
        self.step, self.clock, self.window = 0, Clock(), Window()
        self.saved: Path | None = None
        self.row: dict[str, Any] = {}
        self.numbers: tuple[float, float, Mapping[str, Tensor]] | None = None  # of the last update: lr, norm, norms
        self.versions = json.dumps(configs.versions(), indent=2)
        rng.seed_all(config.seed + groups.data_rank())
        copies = {n: p.data for n, p in self.trainable().items() if not self.layout.summed(n)}
        groups.broadcast_many(list(copies.values()))
        self.optimizer.publish()
        self.average = None if config.ema is None else Average(config.ema, self.optimizer.masters)
        self.part_norms: dict[str, float] = {}
        self.saver = Saver(self.output_dir, config.keep_last, self.layout, background=config.save_beside)
        found = checkpoint.sound(resume, self.output_dir)
        history = 0 if found is None else self._resume(found)
        self.began = self.step
        self.metrics: Metrics | None = None
        if groups.rank() == 0:
            total = None if config.schedule_by == "time" else config.max_steps
            self.metrics = Metrics(self.output_dir, total, self.step, history, config.tensorboard)
        listed = list(hooks.blocks)
        if config.block_checkpointing:
            block_tools.checkpoint_blocks(listed)
        if config.compile:
            block_tools.compile_blocks(listed)
        self._batches: Iterator[Batch] | None = None

    # --- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Train until the steps, the time or the user's patience end."""
        try:
            with Interrupts() as interrupts:
                self.model.train()
                while True:
                    elapsed, number = self._agree(interrupts.received)
                    reason = self._reason(elapsed, number)
                    if reason is not None:
                        return self._finish(reason)
                    self._update(elapsed)
                    if self.step % self.config.checkpoint_every == 0:
                        self._save()
        finally:
            self.saver.close()
            if self.metrics is not None:
                self.metrics.close()

    def _agree(self, received: int) -> tuple[float, int]:
        """Elapsed seconds and signal, the same on every rank: the largest that any of them saw."""
        if groups.world_size() == 1:
            return self.clock.elapsed, received
        both = torch.tensor([self.clock.elapsed, float(received)], dtype=torch.float64, device=self.device)
        elapsed, number = groups.all_reduce(both, "max", "all").tolist()
        return elapsed, int(number)

    def _reason(self, elapsed: float, number: int) -> str | None:
        if number:
            return signal.Signals(number).name
        if self.step >= self.config.max_steps:
            return "steps"
        limit = self.config.max_seconds
        return "time" if limit is not None and elapsed >= limit else None

    def _finish(self, reason: str) -> Result:
        ended = reason in ("steps", "time")
        if ended and self.window.count and self.numbers is not None:
            self._log(*self.numbers)
            self.saved = None  # a checkpoint of this very step knows nothing of the row
        path = self._save()
        self.saver.wait()
        final = self._export() if ended else None
        if self.metrics is not None:
            if ended and self.step > self.began and self.optimizer.unseen:
                names = sorted(self.optimizer.unseen)
                LOG.warning("%d trainable parameters never received a gradient: %s", len(names), names[:8])
            what = f"done ({reason})" if ended else f"stopped by {reason}, continue with --resume auto"
            if ended and self.began == self.step > 0:
                limits = f"max_steps {self.config.max_steps}, max_seconds {self.config.max_seconds}"
                what = f"already finished ({limits}); raise train.max_steps or train.max_seconds to go on"
            self.metrics.say(f"{what}: step {self.step}, saved {path}")
        return Result(self.step, reason, path, final, self.row)

    # --- one update ------------------------------------------------------------------------------------------------

    def _update(self, elapsed: float) -> None:
        begin = time.monotonic()
        lr = learning_rate(self.config, self.step, elapsed)
        sums, losses, sources, waited = self._accumulate()
        count = sums["count"]
        self._check(sums["loss"], losses, sources, count)
        gradients = self.optimizer.gradients()
        self.optimizer.reduce()
        torch._foreach_div_(gradients, count)
        norm, norms = self.optimizer.clip()
        total = float(norm)
        if not torch.isfinite(norm):
            self._diverged(f"the gradient norm is {total}", sources)
        if isinstance(self.objective, RestingObjective):
            self.optimizer.rest(self.objective.resting(sums))
        self.optimizer.step(lr)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.window.add(sums, time.monotonic() - begin, waited)
        if self.metrics is not None:
            self.metrics.tick()
        self.numbers = (lr, total, norms)
        if self.step % self.config.log_every == 0 or self.step in (1, self.config.max_steps):
            self._log(*self.numbers)

    def _accumulate(self) -> tuple[dict[str, float], list[float], list[tuple[str, ...]], float]:
        """Backward through a window. Returns sums over all ranks, this rank's losses and sources, seconds waited."""
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        sources: list[tuple[str, ...]] = []
        waited, batches = self._window()
        parts = self.objective if isinstance(self.objective, PartObjective) else None
        due = parts is not None and parts.norms_every and (self.step + 1) % parts.norms_every == 0
        part_norms = PartNorms(self.optimizer.parameters, self.layout) if due else None
        for batch in batches:
            begin = time.monotonic()
            batch = batch or self._next()
            waited += time.monotonic() - begin
            tokens, images = batch.mask.sum(), batch.images
            with self._precision():
                loss, count, others = self.objective(self.model, batch.to(self.device))
            if part_norms is not None and parts is not None:
                part_norms.add(parts.parts)
            if loss.requires_grad:  # a micro-batch may have nothing to learn on this rank
                loss.backward()
                self.optimizer.collect()
            losses.append(loss.detach())
            sources.append(batch.sources)
            found = {"loss": loss.detach(), "count": count, "tokens": tokens, "images": images, **others}
            for name, value in found.items():
                value = torch.as_tensor(value, device=self.device).double()
                sums[name] = sums[name] + value if name in sums else value
        # One transfer for everything: a scalar read at a time would stall the device each time.
        packed = groups.all_reduce(torch.stack(list(sums.values()))).tolist()
        if part_norms is not None:
            self.part_norms = part_norms.norms(dict(zip(sums, packed, strict=True))["count"])
        return dict(zip(sums, packed, strict=True)), torch.stack(losses).tolist(), sources, waited

    def _window(self) -> tuple[float, Sequence[Batch | None]]:
        """Seconds waited and the micro-batches of an update, where the objective wants to know all of them first."""
        if not isinstance(self.objective, PartObjective):
            return 0.0, [None] * self.config.accumulation  # one at a time, so that no more than one is held
        begin = time.monotonic()
        batches = [self._next() for _ in range(self.config.accumulation)]
        self.objective.window(batches, self.device)
        return time.monotonic() - begin, batches

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        on = self.device.type == "cuda" or self.config.cpu_autocast
        if self.config.precision == "bf16" and on:
            # Without its cache, in which copies of all weights that train would live through the forward. Nearly all
            # are used once; where train.loss_chunk uses the output again, it is cast again.
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def _next(self) -> Batch:
        for _ in range(2):
            if self._batches is None:
                self._batches = iter(self.source)
            batch = next(self._batches, None)
            if batch is not None:
                return batch
            self._batches = None  # the epoch is over
        raise ValueError("the data source yields no batch")

    def _check(self, loss: float, losses: list[float], sources: list[tuple[str, ...]], count: float) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            bad = [s for value, s in zip(losses, sources, strict=True) if not torch.isfinite(torch.tensor(value))]
            self._diverged(f"the loss is {loss}", bad)
        if count <= 0:
            raise ValueError(f"step {self.step + 1}: no token to learn in the batches of {source_names(sources)}")

    def _diverged(self, what: str, sources: list[tuple[str, ...]]) -> None:
        everywhere = [s for part in groups.gather_objects(sources, "data") for s in part]
        self.saver.close()  # the last good one may be on its way
        good = checkpoint.latest(self.output_dir)
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        come = source_names(everywhere)
        raise TrainingDiverged(f"{what} at step {self.step + 1}; {where}; the batch came from {come}")

    # --- what is seen and kept -------------------------------------------------------------------------------------

    def _log(self, lr: float, norm: float, norms: Mapping[str, Tensor]) -> None:
        elapsed = self.clock.elapsed
        per_group = {f"grad_norm/{k}": float(v) for k, v in norms.items()} if len(norms) > 1 else {}
        own = {"step": self.step, "lr": lr, "grad_norm": norm, **per_group, **self.part_norms, "seconds": elapsed}
        self.row = {**own, **self.window.row()}
        self.window, self.part_norms = Window(), {}
        if self.metrics is None:
            return
        self.metrics.write(self.row)
        left = elapsed / self.step * (self.config.max_steps - self.step)
        if self.config.max_seconds is not None:
            left = min(left, self.config.max_seconds - elapsed)
        self.metrics.show(self.row, left)

    def trainable(self) -> dict[str, Tensor]:
        """What training changes, by parameter name: fp32 masters and the running statistics of trained norms."""
        return {**self.optimizer.masters, **self.buffers}

    def _save(self) -> Path:
        """Checkpoint this step, unless that is done or begun."""
        target = checkpoint.folder(self.output_dir, self.step)
        if self.saved == target:
            return target
        ranks = groups.gather_objects({"data": self.source.state_dict(), "rng": rng.state()}, "data")
        state: dict[str, Any] = {}
        if self.metrics is not None:
            state = {
                "export": {n: str(t.dtype).removeprefix("torch.") for n, t in self._exported().items()},
                "averaged": self.average is not None and self.average.config.export,
                "step": self.step,
                "elapsed": self.clock.elapsed,
                "history": self.metrics.position,
                "window": self.window.state(),
                "ranks": ranks,
            }
        average = {} if self.average is None else self.average.values
        texts = {**self._texts(), **{f"{FINAL}{name}": text for name, text in self.hooks.texts.items()}}
        content = checkpoint.Checkpoint(self.trainable(), self.optimizer.state(), state, texts, average)
        self.saver.save(self.step, content)
        self.saved = target
        return target

    def _texts(self) -> dict[str, str]:
        return {"config.yaml": self.hooks.resolved or configs.dump(self.config), "versions.json": self.versions}

    def _exported(self) -> Mapping[str, Tensor]:
        return self.trainable() if self.hooks.export is None else self.hooks.export(self.model)

    def _export(self) -> Path:
        """``final/``: the trainable part alone, averaged where that is wanted, with its configuration."""
        target = self.output_dir / "final"
        swap: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.average is not None and self.average.config.export:
            swap = self.average.applied(self.optimizer.publish)
        with checkpoint.together(), swap:
            state = self.layout.whole(self._exported())
            if self.metrics is not None:
                texts = {**self._texts(), **self.hooks.texts}  # with the tensors, so that no half of it is ever seen
                checkpoint.write_folder(target, {"trainable.safetensors": state}, texts)
        return target

    def _resume(self, path: Path) -> int:
        """Take everything from a checkpoint. Returns the length of metrics.jsonl at that time."""
        compare(path, self.hooks.resolved)
        content = checkpoint.load(path, self.layout)
        own = self.trainable()
        check_names(content.trainable, own, f"{path}: what trains")
        with torch.no_grad():
            for name, value in content.trainable.items():
                if value.shape != own[name].shape:
                    raise ValueError(f"{path}: {name} has shape {list(value.shape)}, not {list(own[name].shape)}")
                own[name].copy_(value)
        self.optimizer.publish()
        self.optimizer.load_state(content.optimizer)
        if self.average is not None:
            self.average.load(content.average)
        restore(self.source, content.state["ranks"], path)
        self.step, self.saved = content.state["step"], None
        if path.resolve().parent == self.output_dir.resolve():
            self.saved = path
        self.clock = Clock(before=content.state["elapsed"])
        self.window = Window(**content.state["window"])
        return int(content.state["history"])
