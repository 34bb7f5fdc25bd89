"""One small model with pictures, tuned in four ways, trained on rows that differ between the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.models.build import Model
from accessory.nn.moe import MoEConfig
from accessory.parallel.layout import Layout, ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.peft.attach import BiasSpec, LoraSpec, NormSpec, PrefixSpec, ScaleSpec, TrainSpec, TuningSpec
from accessory.peft.quantize import Quantization
from accessory.schema import Batch
from accessory.tokens import IGNORE, IMAGE
from accessory.train.config import TrainConfig
from accessory.train.loop import Hooks, train
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from tests.tiny import disturb, tiny_config, tiny_model, tiny_tokenizer

VISION = TrainSpec(("projector.*",))
EVERYTHING: tuple[TuningSpec, ...] = (
    LoraSpec(rank=3, alpha=6.0, dropout=0.2), PrefixSpec(length=3, new_gate=True), BiasSpec(), ScaleSpec(),
    TrainSpec(("*",)),
)  # fmt: skip
METHODS: dict[str, tuple[TuningSpec, ...]] = {
    "full": (TrainSpec(("backbone.*", "projector.*", "tower.*")),),
    "lora": (LoraSpec(rank=3, alpha=6.0), VISION),
    "prefix": (PrefixSpec(length=3, new_gate=True), BiasSpec(), NormSpec(), VISION),
    "moe": (TrainSpec(("backbone.*", "projector.*")),),
    "qlora": (LoraSpec(rank=3, alpha=6.0), VISION),
}
LENGTH, ROWS, TILE_TOKENS = 16, 2, 4
PICTURES = (0, 1, 3)


def made(folder: Path, method: str = "full", specs: Sequence[TuningSpec] | None = None, **llama: Any) -> Model:
    """The same model whenever it is called; gates and deltas are away from zero."""
    backbone = tiny_config(tiny_tokenizer(folder / "tokenizer")).backbone
    assert backbone.llama is not None
    moe = MoEConfig(experts=4, top=1, balance=0.01) if method == "moe" else None
    sizes = replace(backbone.llama, **{"moe": moe, "ffn_dim": 48, **llama})
    tuning = METHODS[method] if specs is None else tuple(specs)
    few = Quantization("int8") if method == "qlora" else None
    model = tiny_model(folder, train=True, tuning=tuning, quantization=few, backbone=replace(backbone, llama=sizes))
    disturb(model.net, std=0.05)
    return model


def batch(number: int, pictures: int, padding: int = 0) -> Batch:
    """Two rows; the second has all ``pictures``, so that text-only rows and rows with one and many are mixed. The first
    ends with so much ``padding``."""
    g = torch.Generator().manual_seed(number)
    ids = torch.randint(6, 300, (ROWS, LENGTH), generator=g)
    labels = ids.clone()
    labels[:, : 1 + number % 3] = IGNORE
    ids[1, 1 : 1 + pictures * TILE_TOKENS] = IMAGE
    labels[ids == IMAGE] = IGNORE
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, LENGTH - padding :] = False
    labels[~mask] = IGNORE
    tiles = torch.rand(pictures, 3, 64, 64, generator=g)
    return Batch(ids, labels, mask, tiles, (f"made:{number}",) * ROWS)


class Mixed:
    """Draws of one of ``parts`` data ranks, or of all in turn (None); none, one or three pictures in each.

    ``kind`` None: rows of equal lengths; else of unequal ones, ``padded``, ``packed``, or one ``leaking`` row of them.
    """

    def __init__(self, part: int | None, parts: int = 2, kind: str | None = None) -> None:
        self.part, self.parts, self.given, self.kind = part, parts, 0, kind

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.given if self.part is None else self.parts * self.given + self.part
            self.given += 1
            padding = 0 if self.kind is None else 3 + number % 6
            b = batch(number % 6, PICTURES[number % 3], padding)  # few rows, so that they can be learned in few steps
            if self.kind == "leaking":
                b = replace(b, ids=b.ids[b.mask][None], labels=b.labels[b.mask][None], mask=b.mask[b.mask][None])
            yield replace(b, packed=self.kind == "packed")

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.given = state["given"]


def config(folder: Path, steps: int, plan: ParallelConfig | None = None, **options: Any) -> TrainConfig:
    """Of a run that sees two micro-batches of each update on one data rank."""
    return TrainConfig(
        output_dir=str(folder), max_steps=steps, lr=0.01, weight_decay=0.1, clip_norm=0.5, log_every=1,
        precision="fp32", tensorboard=False, eps=1e-6, parallel=plan or ParallelConfig(),
        **{"accumulation": 2, **options},
    )  # fmt: skip


def trained(model: Model, source: Mixed, settings: TrainConfig, resume: str | None = None) -> list[dict[str, float]]:
    """Spread and train ``model``; the logged rows of all steps, on rank 0."""
    blocks = list(model.net.backbone.layers)
    layout = parallelize(model.net, settings.parallel, blocks)
    objective = DialogueObjective(ObjectiveConfig(), model.tokenizer, chunk=settings.loss_chunk)
    train(model.net, source, objective, settings, resume=resume, hooks=Hooks(blocks=blocks, layout=layout))
    lines = (Path(settings.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def gradients(model: Model, plan: ParallelConfig, numbers: Sequence[int] = (1,)) -> tuple[dict[str, Any], Layout]:
    """Gradients of some batches' loss: whole ones on rank 0, and what this rank holds of them by ``own/NAME``."""
    layout = parallelize(model.net, plan, list(model.net.backbone.layers))
    objective = DialogueObjective(ObjectiveConfig(), model.tokenizer)
    for number in numbers:
        torch.manual_seed(number)
        objective(model.net, batch(number, PICTURES[number % 3]))[0].backward()
    found = {n: p.grad for n, p in model.net.named_parameters() if p.grad is not None}
    whole = {n: g.numpy() for n, g in layout.whole(found).items()}
    return {**whole, **{f"own/{n}": g.numpy() for n, g in found.items() if layout.place(n).rows is None}}, layout


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest difference of any tensor, relative to its largest entry."""
    assert a.keys() == b.keys()
    assert a
    pairs = [(np.asarray(a[n], np.float64), np.asarray(b[n], np.float64)) for n in a]
    assert all(x.shape == y.shape for x, y in pairs)
    return float(max(np.abs(x - y).max() / max(np.abs(x).max(), 1e-12) for x, y in pairs))


def column(rows: Sequence[Mapping[str, float]], name: str) -> Tensor:
    """One number of every logged row."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)
