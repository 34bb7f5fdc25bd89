"""LLaMA2-Accessory's models with pictures and LLaMA-Adapter's releases, as model folders of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.backbone import store
from accessory.backbone.hf import TOKENIZER_FILES, has_tokenizer
from accessory.backbone.keys import expected_shapes
from accessory.backbone.reference_folders import CONFIG, META, laid_over, llama_type
from accessory.backbone.weights import save_accessory
from accessory.data.tiling import TilingConfig
from accessory.models import build
from accessory.models.adapter_release import is_release, read_release
from accessory.models.build import (
    WEIGHTS_FILE,
    BackboneConfig,
    ModelConfig,
    ProjectorConfig,
    ResamplerConfig,
    TowerSource,
    write_config,
)
from accessory.models.encoder_store import keep_encoder
from accessory.models.gate import Measure, Row, hold, measure, prompt_rows
from accessory.models.published import find_type
from accessory.models.reference import SKIP, Published, assemble, fill_resampler, read_published
from accessory.peft.attach import PrefixSpec, TrainSpec, TuningSpec
from accessory.peft.prefix import Gate
from accessory.vision import presets
from accessory.vision.presets import Activation


def read_pictured(folders: Sequence[Path], kind: str | None = None, *, pickles: bool = False) -> Published:
    """The first of ``folders`` with the others laid over it (what was trained, or a difference).

    ``kind`` None takes the ``llama_type`` of the last ``meta.json``; ``config.json`` is the last one too.

    Raises:
        ValueError: for folders without shards or ``config.json``, a type without a vision part, and keys that do not
            fit.
    """
    folders = [Path(f) for f in folders]
    shown = " + ".join(map(str, folders))
    kinds = [found for f in folders if (found := llama_type(f)) is not None]
    configs = [f / CONFIG for f in folders if (f / CONFIG).is_file()]
    if not configs or (kind is None and not kinds):
        raise ValueError(f"{shown}: no folder has {CONFIG if kinds or kind else META}")
    kind = kind or kinds[-1]
    if find_type(kind).tower is None:
        raise ValueError(f"{shown}: a {kind} only reads; it is converted as a language model")
    published = read_published(laid_over(folders, pickles=pickles), store.read_json(configs[-1]), kind)
    reads = any(isinstance(s, PrefixSpec) for s in published.specs)  # no plain language model, though it may not see
    if (not published.sees or not published.encoders) and (published.sees or published.encoders or not reads):
        raise ValueError(f"{shown} holds no encoder or no projection of a {kind}: it is a language model alone")
    return published


def _read(folders: Sequence[Path], kind: str | None, gate: Gate | None, pickles: bool) -> Published:
    """What either reader makes of ``folders``."""
    folders = [Path(f) for f in folders]
    if is_release(folders, kind):
        return read_release(folders[0], folders[1:], kind, gate=gate, pickles=pickles)
    if gate is not None:
        raise ValueError(f"gate {gate} is for releases of LLaMA-Adapter, not for {kind or 'folders with a meta.json'}")
    return read_pictured(folders, kind, pickles=pickles)


def convert_pictured(
    folders: Sequence[Path],
    out: Path,
    *,
    kind: str | None = None,
    activation: Activation | None = None,
    template: str | None = None,
    cache: Path | None = None,
    pickles: bool = False,
    tokenizer: Path | None = None,
    gate: Gate | None = None,
    bgr: bool = False,
) -> ModelConfig:
    """Write a model folder from published ones, all or nothing; its encoders go to the store of ``cache``.

    The language model is in ``out/backbone``; what the type tunes, with the projection, is what the model folder
    holds. ``activation`` and ``template`` None are those of the type; ``tokenizer`` None: the folder's own; ``bgr``:
    the encoder sees red and blue exchanged. Over the
    first of ``folders`` may lie files of LLaMA-Adapter, for which ``gate`` is. Raises as :func:`read_pictured` and
    :func:`accessory.models.adapter_release.read_release`.
    """
    published = _read(folders, kind, gate, pickles)
    plain = set(expected_shapes(published.llama))
    base = {k: v for k, v in published.backbone.items() if k in plain}
    encoders = {name: keep_encoder(state, cache) for name, state in published.encoders.items()}
    config = model_config(published, f"{Path(out).resolve().name}/backbone", encoders, activation, template, bgr)
    with store.atomic_folder(out) as private:
        save_accessory(published.llama, base, private / "backbone")
        words = [f for f in (*folders, *((tokenizer,) if tokenizer else ())) if has_tokenizer(f)]
        for file in TOKENIZER_FILES if words else ():
            if (words[-1] / file).is_file():
                shutil.copyfile(words[-1] / file, private / "backbone" / file)
        save_file(trained(published), private / WEIGHTS_FILE)
        write_config(private, config)
    return config


def hold_pictured(
    folders: Sequence[Path],
    out: Path,
    *,
    kind: str | None = None,
    cache: Path | None = None,
    pickles: bool = False,
    gate: Gate | None = None,
    tolerance: float | None = None,
) -> float | None:
    """Compare the model folder ``out`` with the network of the published tensors themselves, by fixed prompts with
    pictures, and remove it where they differ; returns how far. None where no tokenizer lies with them.

    Raises:
        GateError: when the logits moved too far, or ``out`` cannot even be opened.
    """
    if not has_tokenizer(Path(out) / "backbone"):
        return None
    rows: list[Row] = []
    tower: TowerSource | None = None

    def measured(model: build.Model) -> Measure:
        nonlocal tower
        rows[:], tower = prompt_rows(model), model.config.tower
        return measure(model, rows)

    def before() -> Measure:
        seen = None if tower is None else presets.build(tower.preset, tower.activation, tower.bgr)
        return measure(assemble(_read(folders, kind, gate, pickles), seen), rows)

    opened = partial(build.load, cache=cache)
    return hold(before, Path(out), "converting to", tolerance=tolerance, opened=opened, measured=measured)


def trained(published: Published) -> dict[str, Tensor]:
    """What the model folder holds beside the language model: projections, and what hangs on the model."""
    plain = set(expected_shapes(published.llama))
    tuned = any(spec.kind == "norm" for spec in published.specs)
    out = {f"backbone.{k}": v for k, v in published.backbone.items() if k not in plain or (tuned and "norm" in k)}
    out |= {f"projector.{k}": v for k, v in published.projector.items()}
    out |= {f"resampler.{k}": v for k, v in published.resampler.items()}
    if published.projector:
        some = next(iter(published.projector.values()))
        out[f"projector.{SKIP}"] = torch.zeros(published.llama.dim, dtype=some.dtype)
    return {k: v.detach().clone().contiguous() for k, v in out.items()}


def model_config(
    published: Published,
    backbone: str,
    encoders: Mapping[str, str],
    activation: Activation | None = None,
    template: str | None = None,
    bgr: bool = False,
) -> ModelConfig:
    """The configuration of a converted checkpoint; ``backbone``: where its language model lies, as ``build.find``
    finds it.

    Raises:
        ValueError: for ``bgr`` or an ``activation`` of a type that sees nothing.
    """
    if not published.sees and (bgr or activation is not None):
        said = "bgr" if bgr else f"clip activation {activation}"
        raise ValueError(f"{said} is for what a model sees with, and this {published.kind} has no encoder")
    config = published_config(published.kind, backbone, published.specs, published.llama.max_length)
    whole = published.backbone["tok_embeddings.weight"].dtype
    projector, resampler, tuning = None, None, published.specs
    if published.projector:
        projector, tuning = config.projector, config.tuning
    if published.resampler:
        made = fill_resampler(published.resampler, published.llama.dim)
        resampler = ResamplerConfig(
            made.kind, length=made.prefix_len, width=made.width, depth=made.depth, heads=made.heads
        )
        tuning = (*tuning, TrainSpec(("resampler.*",)))
    tower = str(published.type.tower)
    return replace(
        config,
        backbone=BackboneConfig(backbone, dtype="fp32" if whole == torch.float32 else "bf16"),
        tower=TowerSource(tower, None, activation, bgr, dict(encoders)) if published.sees else None,
        projector=projector,
        resampler=resampler,
        tuning=tuning,
        template=template or config.template,
    )


def published_config(kind: str, backbone: str, specs: tuple[TuningSpec, ...], max_length: int) -> ModelConfig:
    """The configuration of a type that sees through a projection, without its tensors; ``specs``: what hangs on the
    language model, which lies at ``backbone`` and reads ``max_length`` positions."""
    row = find_type(kind)
    return ModelConfig(
        backbone=BackboneConfig(backbone),
        tower=None if row.tower is None else TowerSource(row.tower, None),
        projector=ProjectorConfig("linear_norm", start_end=row.start_end),
        tuning=(*specs, TrainSpec(("projector.*",))),
        template=_template(kind),
        tiling=TilingConfig(row.image_size, skip=False),
        max_length=max_length,
    )


def _template(kind: str) -> str:
    """SPHINX's dialogues, and the instructions that the models with one encoder were tuned on."""
    row: Any = find_type(kind)
    if len(row.encoders) > 1 or (row.adapter is not None and row.adapter.scaled):
        return "sphinx"
    return "alpaca_clip" if row.before_bos else "alpaca"
