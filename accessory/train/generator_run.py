"""An experiment file with a ``generator`` section, from its text to a trained generator folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from accessory import config as configuration
from accessory import log
from accessory.backbone.store import read_file
from accessory.data import assets
from accessory.data.encode import DreamLayout, Encoder
from accessory.data.loader import Loader, RowEncoder
from accessory.data.rows import RowRejected
from accessory.data.targets import TargetEncoder
from accessory.models import build
from accessory.models.conditioner import DreamConditioner
from accessory.models.generator import Generator, GeneratorConfig, build_generator, saved_state
from accessory.parallel import groups
from accessory.train import checkpoint, rng
from accessory.train.config import TrainConfig
from accessory.train.features import CachedFeatures, Features
from accessory.train.generation import DiffusionObjective, GenerationConfig, JointObjective
from accessory.train.loop import Hooks, Result, train
from accessory.train.optim import Optimizer
from accessory.train.run import DataConfig, describe, open_loader, report_rejected, sources_file

LOG = log.get(__name__)


@dataclass(frozen=True)
class GeneratorRunConfig:
    """One experiment. ``init`` names a generator folder whose tensors are the start of this run. ``cache_features``
    computes latents and conditions once and keeps them in ``cache`` (the folder of the assets). ``seen``: in
    dialogues the model also sees each picture that it has drawn, as the user's."""

    train: TrainConfig
    data: DataConfig
    generator: GeneratorConfig
    objective: GenerationConfig = field(default_factory=GenerationConfig)
    init: str | None = None
    cache_features: bool = False
    seen: bool = True
    cache: str | None = None


def main_config(
    path: str | Path, overrides: Sequence[str] = (), resume: str | None = None, *, dry_run: bool = False
) -> Result | None:
    """Train what an experiment file says; with ``dry_run`` build everything, describe it and return None."""
    config = configuration.load(path, GeneratorRunConfig, overrides)
    world = groups.setup()
    try:
        return run(config, resume, folder=Path(path).parent, device=world.device, dry_run=dry_run)
    finally:
        groups.shutdown()


def run(
    config: GeneratorRunConfig,
    resume: str | None = None,
    *,
    folder: Path = Path(),
    device: torch.device | str = "cpu",
    dry_run: bool = False,
) -> Result | None:
    """Build, train and export; the generator folder is ``<output_dir>/final``, with ``run.yaml`` and ``sources.yaml``
    as of :func:`accessory.train.run.run`."""
    cache = Path(config.cache).expanduser() if config.cache else None
    rng.seed_all(config.train.seed)  # fresh weights are part of what a seed reproduces
    generator = build_generator(config.generator, cache=cache, train=True).to(device)
    if config.init is not None and checkpoint.resolve(resume, config.train.output_dir) is None:
        warm_start(generator, Path(config.init))
    encoder = row_encoder(config, generator)
    size = max(generator.size[0], encoder.tile_size)  # dialogues show some pictures that others draw
    source = open_loader(config.data, config.train, encoder, size, folder, cache)
    describe(generator, source)
    # A resume asks whether the base is still the same, so the run's configuration says which one it was.
    named = replace(config.generator, base_sha256=generator.config.base_sha256)
    resolved = configuration.dump(replace(config, generator=named))
    if dry_run:
        _plan(generator, source, config.train, resolved)
        return None
    features = _features(config, generator, cache)
    hooks = Hooks(
        blocks=getattr(generator.denoiser, "layers", ()),
        export=lambda _: saved_state(generator),
        resolved=resolved,
        texts={
            build.CONFIG_FILE: configuration.dump(generator.config),
            "run.yaml": resolved,
            "sources.yaml": sources_file(config.data, folder).read_text(encoding="utf-8"),
        },
    )
    try:
        return train(generator, source, objective_of(config, features), config.train, resume=resume, hooks=hooks)
    finally:
        report_rejected(source.ledger)
        if isinstance(features, CachedFeatures):
            features.close()


def objective_of(config: GeneratorRunConfig, features: Features) -> Any:
    """The objective that the configuration names."""
    if config.objective.loss is not None:
        return JointObjective(config.objective, config.train.seed, features)
    return DiffusionObjective(config.objective.diffusion, config.train.seed, features)


def row_encoder(config: GeneratorRunConfig, generator: Generator) -> RowEncoder:
    """What writes rows: prompts and pictures, or with ``objective.loss`` dialogues with dream spans."""
    size = generator.size[0]
    if config.objective.loss is None:
        return TargetEncoder(size)
    if not isinstance(generator.conditioner, DreamConditioner):
        raise ValueError(
            "objective.loss needs a generator whose conditioner is a dream bridge (conditioner.kind: dream)"
        )
    own, queries = generator.conditioner.model.encoder, generator.conditioner.dream.config.num_queries
    seen = config.seen and generator.conditioner.dream.net.projector is not None
    return Encoder(
        own.tokenizer, own.template, own.tiling, own.runs, own.max_length, own.start_end,
        DreamLayout(queries, size, seen),
    )  # fmt: skip


def warm_start(generator: Generator, folder: Path) -> None:
    """Copy the tensors of a generator folder over those of the same names.

    Raises:
        ValueError: when the folder has a tensor that the generator lacks, that has another shape, or that this run's
            folder would not hold: what was learned would be lost without a word.
    """
    state, own, kept = read_file(folder / build.WEIGHTS_FILE), generator.state_dict(), saved_state(generator)
    bad = [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
    if bad:
        raise ValueError(f"init {folder}: {len(bad)} tensors do not fit the generator: {', '.join(bad[:10])}")
    if lost := sorted(state.keys() - kept.keys()):
        raise ValueError(
            f"init {folder} holds {len(lost)} tensors that this run neither trains nor exports: "
            f"{', '.join(lost[:10])}; to stand on a generator as it is, name it as generator.base"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _features(config: GeneratorRunConfig, generator: Generator, cache: Path | None) -> Features:
    if not config.cache_features:
        return Features()
    if config.objective.loss is not None:
        raise ValueError("cache_features is for prompts and pictures; dialogues (objective.loss) go through the model")
    about = configuration.dump(generator.config.conditioner)
    return CachedFeatures(generator, (cache or assets.default_cache()) / "features", about, groups.rank())


def _plan(generator: Generator, source: Loader, config: TrainConfig, resolved: str) -> None:
    """What a dry run shows: the configuration as it was resolved and what the first row asks for."""
    optimizer = Optimizer(generator, config)  # complains about group patterns
    if groups.rank():
        return
    for (label, scale, decay), names in optimizer.groups.items():
        LOG.info("group %s: %d tensors, lr x %g, weight decay %g", label, len(names), scale, decay)
    print(resolved)
    for k in range(source.ledger.after):
        try:
            row = source.encoder.encode(source.mixture.sample(k))
        except RowRejected:
            continue
        asked = [t.prompt or f"a span among {len(row.ids)} positions" for t in row.targets]
        print(f"the first row, {row.source} {row.index}, asks for pictures with {asked}")
        return
    raise ValueError(f"none of the first {source.ledger.after} rows can be used")
