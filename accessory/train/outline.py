"""What an experiment would be: sizes, what trains, its schedule and its data, without weights, rows or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.llama import Llama
from accessory.backbone.quantized import layout
from accessory.data.sources import SourceConfig, missing, read_configs
from accessory.models import build
from accessory.models.build import DTYPES, ModelConfig
from accessory.models.mllm import MLLM
from accessory.models.plan import size
from accessory.models.skeleton import absent, resolved, skeleton
from accessory.peft.quantize import Quantization
from accessory.schema import Batch
from accessory.train.config import TrainConfig
from accessory.train.optim import Optimizer, moment_bytes
from accessory.train.run import RunConfig, grouped, sources_file, trained_parts

# The pictures that a model is asked about: a square and one of twice the width, both larger than any canvas.
SHAPES = {"square": (4096, 4096), "2:1": (4096, 2048)}


@dataclass(frozen=True)
class Outline:
    """``parts``: parameters of each part and how many of them train. ``positions``: those of a picture, by its shape.

    ``memory``: bytes of weights, gradients and moments on every rank. ``absent``: files of the data that are not there,
    ``lacking``: of the weights.
    """

    parts: dict[str, tuple[int, int]]
    positions: dict[str, int]
    max_length: int
    memory: int
    sources: tuple[SourceConfig, ...]
    absent: tuple[str, ...]
    train: TrainConfig
    lacking: tuple[str, ...] = ()


def outline(config: RunConfig, folder: Path = Path()) -> Outline:
    """The outline of an experiment whose file lies in ``folder``.

    Raises:
        ValueError: for whatever would keep it from being built: sizes, patterns, groups, the data configuration.
    """
    net, model = skeleton(config.model), resolved(config.model)
    parts = {name: (total, trained) for name, (trained, total) in trained_parts(net).items()}
    frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    Optimizer(net, config.train)  # complains about group patterns, as the next line about those of rows
    grouped(config, _nothing, net)
    spec = config.model.quantization or model.quantization
    if spec is not None:  # the skeleton has the full weights
        frozen += _codes(net.backbone, spec, DTYPES[model.backbone.dtype])
    found, mistakes = read_configs(sources_file(config.data, folder))
    if mistakes:
        raise ValueError(f"the data configuration {config.data.sources} cannot be used:\n  " + "\n  ".join(mistakes))
    gone = [missing(source) for _, source in found]
    seen = {} if net.tower is None else {name: _positions(net, model, sides) for name, sides in SHAPES.items()}
    _, limit = model.dialogues
    if (most := max(seen.values(), default=0)) >= limit:
        raise ValueError(f"model.max_length is {limit}, and a picture alone takes {most} positions: no row would fit")
    return Outline(
        parts,
        seen,
        limit,
        frozen + sum(8 * p.numel() + moment_bytes(config.train, n, p, p.numel()) for n, p in trained),
        tuple(source for _, source in found),
        tuple(problem for problem in gone if problem is not None),
        config.train,
        tuple(_lacking(config)),
    )


def _lacking(config: RunConfig) -> list[str]:
    """Weights that are not there, among them those of ``init``."""
    lost = absent(config.model, Path(config.cache).expanduser() if config.cache else None)
    if config.init is not None and not (file := build.find(config.init) / build.WEIGHTS_FILE).is_file():
        lost.append(f"init: no file {file}")
    return lost


def _codes(backbone: Llama, spec: Quantization, dtype: torch.dtype) -> int:
    """By how many bytes the frozen weights of a backbone of ``dtype`` change when it is quantised."""
    full, made, own = layout(backbone.config, None), layout(backbone.config, spec), dict(backbone.named_parameters())
    gone = sum(own[name].nbytes for name in full.keys() - made.keys() if not own[name].requires_grad)
    added = [made[name] for name in made.keys() - full.keys()]
    return sum(prod(shape) * (kept or dtype).itemsize for shape, kept in added) - gone


def _nothing(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor | float]]:
    """The objective of what has no weights."""
    raise ValueError("an outline has nothing to learn")


def _positions(net: MLLM, config: ModelConfig, sides: tuple[int, int]) -> int:
    """Places in the sequence that a picture takes."""
    if net.projector is None:
        return 0
    plan = config.tiling.plan(*sides)
    return plan.num_real * net.positions_per_tile + len(plan.tiles) - plan.num_real


def main_outline(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The outline of an experiment file as text.

    Raises:
        ValueError: as :func:`outline`, and for the file of a generator.
    """
    if "generator" in configuration.read(path):
        raise ValueError(f"{path} trains a generator; --outline is for language models, --dry-run builds either")
    config = configuration.load(path, RunConfig, overrides)
    return "\n".join(_lines(str(path), outline(config, Path(path).parent)))


def _lines(name: str, found: Outline) -> list[str]:
    t = found.train
    out = [name, "", "| part | parameters | trained |", "|---|---:|---:|"]
    total = (sum(n for n, _ in found.parts.values()), sum(n for _, n in found.parts.values()))
    out += [f"| {part} | {n:,} | {trained:,} |" for part, (n, trained) in {**found.parts, "all": total}.items()]
    shown = ", ".join(f"{shape} {n}" for shape, n in found.positions.items())
    out += ["", f"length: {found.max_length} positions" + (f"; a picture takes: {shown}" if shown else "")]
    update = t.global_batch or t.batch_size * t.accumulation
    each = "" if t.global_batch else " on each rank"
    out.append(f"updates: {t.max_steps:,} of {update} samples{each}, {t.batch_size} at once: {t.max_steps * update:,}")
    clipped = "not clipped" if t.clip_norm is None else f"clipped to {t.clip_norm:g}"
    out.append(
        f"learning rate: 0 to {t.lr:g} over {t.warmup_steps:,} updates, half a cosine to {t.min_lr:g}; weight decay "
        f"{t.weight_decay:g}, betas {t.betas[0]:g} {t.betas[1]:g}, gradients {clipped}"
    )
    out.append(f"memory of every rank before activations: {size(found.memory)}")
    out.append("weights: " + ("all there" if not found.lacking else f"{len(found.lacking)} of them not there"))
    out += [f"  {problem}" for problem in found.lacking]
    there = len(found.sources) - len(found.absent)
    out.append(f"data: {len(found.sources)} sources, {there} of them there")
    return out + [f"  {problem}" for problem in found.absent]
