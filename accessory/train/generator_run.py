"""An experiment file with a ``generator`` section, from its text to a trained generator folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accessory import config as configuration
from accessory.backbone.store import read_file
from accessory.data import assets
from accessory.data.encode import DreamLayout
from accessory.data.loader import Loader, RowEncoder
from accessory.data.targets import TargetEncoder
from accessory.diffusion.buckets import Nearest, bucket_sizes
from accessory.models import build
from accessory.models.conditioner import DreamConditioner
from accessory.models.generator import Generator, GeneratorConfig, build_generator, saved_state
from accessory.parallel import groups
from accessory.parallel.layout import Layout, ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.schema import Encoded
from accessory.train import checkpoint, rng
from accessory.train.config import TrainConfig
from accessory.train.features import CachedFeatures, Features
from accessory.train.generation import DiffusionObjective, GenerationConfig, JointObjective
from accessory.train.loop import Hooks, Result, train
from accessory.train.run import DataConfig, describe, export_texts, open_loader, plan, reported, started


@dataclass(frozen=True)
class DrawnDataConfig(DataConfig):
    """``aspects``: the longest side of a drawn picture to its shortest. At 1 the middle square of every picture is
    drawn, at ``generator.size``. Beyond it each picture keeps the aspect of the nearest of all sizes with about as many
    pixels (:mod:`accessory.diffusion.buckets`), and those of a batch differ."""

    aspects: float = 1.0

    def __post_init__(self) -> None:
        if not self.aspects >= 1:
            raise ValueError(f"data.aspects {self.aspects} is a longer side to a shorter one, so at least 1")


@dataclass(frozen=True)
class GeneratorRunConfig:
    """One experiment. ``init`` names a generator folder whose tensors are the start of this run. ``cache_features``
    computes latents and conditions once and keeps them in ``cache`` (the folder of the assets). ``seen``: in
    dialogues the model also sees each picture that it has drawn, as the user's."""

    train: TrainConfig
    data: DrawnDataConfig
    generator: GeneratorConfig
    objective: GenerationConfig = field(default_factory=GenerationConfig)
    init: str | None = None
    cache_features: bool = False
    seen: bool = True
    cache: str | None = None

    def __post_init__(self) -> None:
        of_dialogues = {"data.packing": self.data.packing, "train.loss_chunk": self.train.loss_chunk}
        given = [name for name, value in of_dialogues.items() if value is not None]
        if given and self.objective.loss is None:
            raise ValueError(f"{given[0]} is for dialogues (objective.loss); prompts and pictures have no positions")
        # A rank whose rows ask for no picture would leave the others waiting for its blocks.
        spread = self.train.parallel
        if spread.tensor > 1 or (spread.data == "fsdp" and self.objective.loss is not None):
            raise ValueError(
                f"train.parallel {spread}: of a generator, data: fsdp cuts the denoiser's blocks where every row asks "
                "for a picture (objective.loss null); all else lies whole on every rank"
            )


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
    asked, config = config, replace(config, train=config.train.on(groups.world_size()))
    cache = Path(config.cache).expanduser() if config.cache else None
    rng.seed_all(config.train.seed)  # fresh weights are part of what a seed reproduces
    generator = build_generator(config.generator, cache=cache, train=True).to(device)
    fresh = checkpoint.resolve(resume, config.train.output_dir, repair=not dry_run) is None
    if config.init is not None and fresh:
        warm_start(generator, build.base_folder(config.init))
    layout = _spread(generator, config, device)
    source = open_rows(config, generator, row_encoder(config, generator), folder, cache)
    describe(generator, source, layout)
    if dry_run:
        resolved = configuration.dump(replace(asked, generator=generator.config))
        plan(generator, source, config.train, resolved, _asked)
        return None
    # A resume asks whether the base is still the same, so the run's configuration says which one it was. All else is as
    # it was written: what it came to is the configuration of the exported folder.
    named = replace(config.generator, base_sha256=generator.config.base_sha256)
    resolved = configuration.dump(replace(asked, generator=named))
    features = _features(config, generator, cache)
    hooks = Hooks(
        blocks=getattr(generator.denoiser, "layers", ()),
        export=lambda _: saved_state(generator),
        resolved=resolved,
        texts=export_texts(generator.config, resolved, config.data, folder),
        layout=layout,
    )
    try:
        with reported(source):
            return train(generator, source, objective_of(config, features), config.train, resume=resume, hooks=hooks)
    finally:
        if isinstance(features, CachedFeatures):
            features.close()


def _spread(generator: Generator, config: GeneratorRunConfig, device: torch.device | str) -> Layout:
    """Cut the blocks of the denoiser over the ranks; conditioner and codec stay whole on each."""
    spread = config.train.parallel
    if spread == ParallelConfig():
        return Layout()
    return of_denoiser(parallelize(generator.denoiser, spread, blocks_of(generator), device))


def blocks_of(generator: Generator) -> list[torch.nn.Module]:
    """What ``data: fsdp`` cuts."""
    return list(getattr(generator.denoiser, "layers", ()))


def of_denoiser(found: Layout) -> Layout:
    """Places of a denoiser's parameters under the names that they have in the generator."""
    return Layout(found.plan, {f"denoiser.{name}": place for name, place in found.places.items()})


main_config = partial(started, run, GeneratorRunConfig)
"""As that of :mod:`accessory.train.run`."""


def open_rows(
    config: GeneratorRunConfig, generator: Generator, encoder: RowEncoder, folder: Path, cache: Path | None
) -> Loader:
    """The batches of this rank."""
    size = max(generator.size[0], encoder.tile_size)  # dialogues show some pictures that others draw
    return open_loader(config.data, config.train, encoder, size, folder, cache)


def objective_of(config: GeneratorRunConfig, features: Features) -> Any:
    """The objective that the configuration names."""
    if config.objective.loss is not None:
        return JointObjective(config.objective, config.train.seed, features, config.train.loss_chunk)
    return DiffusionObjective(config.objective.diffusion, config.train.seed, features)


def row_encoder(config: GeneratorRunConfig, generator: Generator) -> RowEncoder:
    """What writes rows: prompts and pictures, or with ``objective.loss`` dialogues with dream spans."""
    size, fit = generator.size[0], fitting(generator, config.data.aspects)
    if config.objective.loss is None:
        return TargetEncoder(size, fit)
    if not isinstance(generator.conditioner, DreamConditioner):
        raise ValueError(
            "objective.loss needs a generator whose conditioner is a dream bridge (conditioner.kind: dream)"
        )
    own, queries = generator.conditioner.model.encoder, generator.conditioner.dream.config.num_queries
    seen = config.seen and generator.conditioner.dream.net.projector is not None
    return own.under(own.template, DreamLayout(queries, size, seen, fit))


def fitting(generator: Generator, aspects: float) -> Nearest | None:
    """The size that each picture is drawn at; None for squares.

    Raises:
        ValueError: when ``generator.size`` is no whole number of patches.
    """
    if aspects == 1:
        return None
    grain = math.lcm(*generator.grain)
    try:
        return Nearest(bucket_sizes(generator.size[0], patch=grain, max_aspect=aspects))
    except ValueError as error:
        raise ValueError(f"data.aspects {aspects} with generator.size {generator.size[0]}: {error}") from None


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
    return CachedFeatures(generator, (cache or assets.default_cache()) / "features", about)


def _asked(row: Encoded) -> str:
    asked = [t.prompt or f"a span among {len(row.ids)} positions" for t in row.targets]
    return f", asks for pictures with {asked}"
