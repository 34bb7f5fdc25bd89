"""Five ways to train the same model on the same rows: ours, and two each of transformers with peft and of the lineage.

All of them take their rows from one mixture in one order (whatever each makes of them), run the frozen tower on every
picture, train the projector and what the kind of tuning says, under bf16 autocast with AdamW and the same learning
rate; frozen weights lie in bf16, what trains in fp32. What differs is what a row becomes, and the code that computes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.data.collate import collate
from accessory.data.loader import Loader
from accessory.data.mixture import Mixture
from accessory.data.packing import PackingConfig
from accessory.data.sources import load_sources
from accessory.models import build
from accessory.models.build import Model, ModelConfig
from accessory.models.mllm import MLLM
from accessory.nn.linear import Linear
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec, TuningSpec
from accessory.schema import Batch
from accessory.tokens import IGNORE
from accessory.train import rng
from accessory.train.config import TrainConfig
from accessory.train.loop import Hooks, Trainer
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.optim import learning_rate
from benchmarks.generate import reference

FOREVER = 1_000_000
PROJECTOR = TrainSpec(("projector.*",))
KINDS: dict[str, tuple[tuple[TuningSpec, ...], float]] = {
    "full": ((TrainSpec(("backbone.*", "projector.*")),), 3e-4),
    "lora": ((LoraSpec(16, 32.0), PROJECTOR), 1e-3),
    "prefix": ((PrefixSpec(10), PROJECTOR), 2e-3),
}
"""What each kind of tuning trains, and its learning rate."""


@dataclass(frozen=True)
class Setting:
    """What all contenders share. An update sees ``rows`` rows, or a pack of as many on average; ``pad`` is the length
    that LLaMA-Adapter gives every row."""

    kind: str
    sources: Path
    model: ModelConfig
    rows: int = 16
    pad: int = 512
    workers: int = 1
    threads: int = 1
    autocast: bool = True
    seed: int = 0
    cache: Path | None = None

    def train(self, folder: str) -> TrainConfig:
        """The optimizer's settings, as our loop has them."""
        return TrainConfig(
            folder, FOREVER, KINDS[self.kind][1], batch_size=1, warmup_steps=5, checkpoint_every=FOREVER,
            log_every=FOREVER, seed=self.seed, threads=self.threads, tensorboard=False, cpu_autocast=self.autocast,
            precision="bf16" if self.autocast else "fp32", loss_chunk=256,
        )  # fmt: skip


@dataclass
class Tally:
    """What a contender has done so far: positions with a sample's token, positions that were computed at all (those of
    a pack's empty rest are none), seconds of waiting for batches."""

    updates: int = 0
    rows: int = 0
    learned: int = 0
    positions: int = 0
    computed: int = 0
    waited: float = 0.0

    def add(self, batch: Batch, computed: int) -> None:
        """Count a batch."""
        self.rows += len(batch.ids)
        self.learned += int((batch.labels[:, 1:] != IGNORE).sum())
        self.positions += int(batch.mask.sum())
        self.computed += computed


class Contender:
    """One way to train. ``micro`` rows a backward pass, padded to the longest of them, in the order they are drawn."""

    micro: int | None = None  # None: all rows of an update at once
    window = 1

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tally = Tally()
        torch.set_num_threads(setting.threads)
        rng.seed_all(setting.seed)
        config = replace(setting.model, tuning=self.tuning())
        self.model: Model = build.build(config, cache=setting.cache, train=True)
        self.net: MLLM = self.model.net
        backbone = self.net.backbone
        self.matrices = sum(m.weight.numel() for m in backbone.layers.modules() if isinstance(m, Linear))
        self.table = backbone.tok_embeddings.weight.numel()
        self.source = self.loader()
        self.prepare()

    def tuning(self) -> tuple[TuningSpec, ...]:
        """What our model is built to train."""
        return KINDS[self.setting.kind][0]

    def mixture(self, seed: int) -> Mixture:
        """The draws of a seed."""
        size = self.model.config.tiling.size
        return Mixture(load_sources(self.setting.sources, cache=self.setting.cache, seed=seed, size=size), seed)

    def loader(self) -> Loader:
        """Batches of :attr:`micro` rows."""
        s = self.setting
        return Loader(
            self.mixture(s.seed), self.model.encoder, self.micro or s.rows, num_workers=s.workers, window=self.window
        )

    def prepare(self) -> None:
        """Make the optimizer and what else an update needs."""
        self.rate = self.setting.train("-")
        self.batches: Any = iter(self.source)
        self.trained = [p for part in self.parts() for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.rate.lr, betas=self.rate.betas, eps=self.rate.eps, weight_decay=0.0, fused=True
        )

    def parts(self) -> Sequence[nn.Module]:
        """The modules that hold what trains."""
        return (self.net,)

    def update(self) -> None:
        """One step of the optimizer, as a plain loop takes it."""
        count = self.setting.rows // (self.micro or self.setting.rows)
        for _ in range(count):
            begin = time.monotonic()
            batch = self.shaped(next(self.batches))
            self.tally.waited += time.monotonic() - begin
            self.tally.add(batch, batch.ids.numel())
            with self.precision():
                loss = self.mean_loss(batch) / count
            loss.backward()
        assert self.rate.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(self.trained, self.rate.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.rate, self.tally.updates, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tally.updates += 1

    def close(self) -> None:
        """End the loader's process: it outlives signals, and the end of the program would wait for it for ever."""
        self.batches.close()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast, unless it is off."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.setting.autocast)

    def shaped(self, batch: Batch) -> Batch:
        """A batch of the loader as this contender pads it."""
        return batch

    def mean_loss(self, batch: Batch) -> Tensor:
        """Mean over the learned tokens of a batch, every position scored in full precision, as published loops do."""
        scores = self.scores(self.states(batch)).float()
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE)

    def states(self, batch: Batch) -> Tensor:
        """Last hidden states (B, T, D)."""
        return self.net(batch.ids, batch.tiles, counts=batch.counts)

    def scores(self, h: Tensor) -> Tensor:
        """Vocabulary scores of states."""
        return self.net.logits(h)

    def held_out(self, count: int) -> list[Batch]:
        """``count`` rows that every contender is tested on, of another seed."""
        mixture = self.mixture(self.setting.seed + 1)
        rows = [self.model.encoder.encode(mixture.sample(k)) for k in range(count)]
        size = self.setting.rows
        return [collate(rows[i : i + size], self.model.encoder.pad_id) for i in range(0, count, size)]

    @torch.no_grad()
    def test(self, batches: Sequence[Batch]) -> float:
        """Mean loss of a learned token."""
        total = count = 0.0
        for batch in batches:
            learned = batch.labels[:, 1:] != IGNORE
            with self.precision():
                scores = self.scores(self.states(batch)[:, :-1][learned])
            total += float(F.cross_entropy(scores.float(), batch.labels[:, 1:][learned], reduction="sum"))
            count += int(learned.sum())
        return total / count


class Ours(Contender):
    """Our loop: packs, scores only where something is learned and a part at a time."""

    window = 8

    def loader(self) -> Loader:
        """Packs of the positions that ``rows`` take on average."""
        s, mixture, encoder = self.setting, self.mixture(self.setting.seed), self.model.encoder
        lengths = [len(encoder.encode(mixture.sample(k)).ids) for k in range(200)]
        pack = PackingConfig(max(round(s.rows * sum(lengths) / len(lengths)), *lengths))
        return Loader(mixture, encoder, 1, num_workers=s.workers, window=self.window, packing=pack)

    def prepare(self) -> None:
        """Our own trainer, with a folder that it may write to."""
        self.folder = tempfile.TemporaryDirectory()
        config = self.setting.train(self.folder.name)
        self.objective = DialogueObjective(
            ObjectiveConfig(), self.model.tokenizer, self.setting.cache, config.loss_chunk
        )
        hooks = Hooks(blocks=self.net.backbone.layers)
        self.trainer = Trainer(self.net, self.source, self._counted, config, hooks)

    def _counted(self, model: Any, batch: Batch) -> Any:
        self.tally.add(batch, int(batch.mask.sum()))
        return self.objective(model, batch)

    def update(self) -> None:
        """All that our loop does for an update but asking for signals; the first one is logged too."""
        before = self.trainer.window.data_wait
        self.trainer._update(self.trainer.clock.elapsed)
        after = self.trainer.window.data_wait
        self.tally.waited += after - before if after >= before else after
        self.tally.updates += 1

    def close(self) -> None:
        """As the end of our trainer does."""
        self.batches = self.trainer._batches
        super().close()


class Transformers(Contender):
    """transformers' model with peft: padding to the longest of the batch, an attention mask, its own loss."""

    def tuning(self) -> tuple[TuningSpec, ...]:
        """peft brings the adapters."""
        return super().tuning() if self.setting.kind == "full" else (PROJECTOR,)

    def prepare(self) -> None:
        """Put transformers' model in the place of our backbone; tower and projector stay."""
        backbone = self.net.backbone
        state = backbone.state_dict()
        hf = reference(backbone.config, state, next(iter(state.values())).dtype)
        self.hf: Any = adapted(hf, self.setting.kind, backbone.config.n_layers).train()
        for parameter in self.hf.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.net.backbone = cast(Any, Table(self.hf.get_input_embeddings()))
        super().prepare()

    def parts(self) -> Sequence[nn.Module]:
        """Tower and projector with transformers' model."""
        assert self.net.projector is not None
        return (self.net.projector, self.hf)

    def mean_loss(self, batch: Batch) -> Tensor:
        """As transformers computes it."""
        x = self.net.embed(batch.ids, batch.tiles)
        return self.hf(inputs_embeds=x, attention_mask=batch.mask.long(), labels=batch.labels, use_cache=False).loss

    def states(self, batch: Batch) -> Tensor:
        """Last hidden states, for the test."""
        x = self.net.embed(batch.ids, batch.tiles)
        body = inner(self.hf).model
        return body(inputs_embeds=x, attention_mask=batch.mask.long(), use_cache=False).last_hidden_state

    def scores(self, h: Tensor) -> Tensor:
        """By transformers' head."""
        return inner(self.hf).lm_head(h)


class Grouped(Transformers):
    """The same with the rows of a batch about equally long (``group_by_length`` of transformers' trainer)."""

    window = 8


class Table(nn.Module):
    """What :class:`MLLM` asks of a backbone before its blocks: the vectors of ids (placeholders: anything)."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = table

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T, D) of (B, T)."""
        return self.embed_tokens(ids.clamp_min(0))


def adapted(hf: Any, kind: str, layers: int) -> Any:
    """transformers' model with peft's adapter of this kind; nothing else of it trains then."""
    if kind == "full":
        return hf
    from peft import AdaptionPromptConfig, LoraConfig, get_peft_model

    if kind == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return get_peft_model(hf, LoraConfig(r=16, lora_alpha=32, target_modules=names))
    return get_peft_model(hf, AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM"))


def inner(hf: Any) -> Any:
    """transformers' model under peft's."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf


class Adapter(Contender):
    """LLaMA-Adapter's way: every row padded to one length, rows at random, all positions scored; four rows a backward
    pass, as its script has them."""

    micro = 4

    def shaped(self, batch: Batch) -> Batch:
        """Padded to ``pad``."""
        more = self.setting.pad - batch.ids.shape[1]
        if more < 0:
            raise ValueError(f"a row of {batch.ids.shape[1]} positions is longer than --pad {self.setting.pad}")
        return replace(
            batch,
            ids=F.pad(batch.ids, (0, more), value=self.model.encoder.pad_id),
            labels=F.pad(batch.labels, (0, more), value=IGNORE),
            mask=F.pad(batch.mask, (0, more)),
        )


class Accessory(Contender):
    """LLaMA2-Accessory's way: rows sorted by length, the padding behind the longest cut off in the model, all positions
    scored."""

    window = 8


CONTENDERS: dict[str, tuple[str, type[Contender]]] = {
    "ours": ("ours", Ours),
    "transformers": ("(a) transformers + peft", Transformers),
    "grouped": ("(a') the same, rows grouped by length", Grouped),
    "adapter": ("(b) LLaMA-Adapter's way", Adapter),
    "accessory": ("(b') LLaMA2-Accessory's way", Accessory),
}
