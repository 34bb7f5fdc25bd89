"""An experiment file, from its text to a trained model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory import config as configuration
from accessory import log
from accessory.backbone.store import file_entries, read_file
from accessory.data.audit import render_row
from accessory.data.loader import Loader, RowEncoder
from accessory.data.mixture import Ledger, Mixture
from accessory.data.packing import PackingConfig
from accessory.data.rows import RowRejected
from accessory.data.sources import load_sources
from accessory.models import build
from accessory.models.align import Aligner, match_scale
from accessory.models.build import Model, ModelConfig
from accessory.nn import unread
from accessory.parallel import groups
from accessory.parallel.layout import Layout, ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.peft.attach import trainable_state
from accessory.schema import Batch, Encoded
from accessory.train import checkpoint, rng
from accessory.train.config import TrainConfig
from accessory.train.disjoint import DisjointObjective
from accessory.train.loop import Hooks, Result, train
from accessory.train.objective import DialogueObjective, Objective, ObjectiveConfig
from accessory.train.optim import Optimizer

LOG = log.get(__name__)


@dataclass(frozen=True)
class DataConfig:
    """``sources``: a file of ``data_configs/``, relative to the working directory or to the experiment file.

    ``window`` batches are sorted by length, or packed, together; ``workers`` processes encode ahead. ``packing`` puts
    samples into packs without padding, which do not see each other; ``train.batch_size`` then counts packs.
    """

    sources: str
    workers: int = 1
    window: int = 8
    max_bad_rate: float = 0.05
    packing: PackingConfig | None = None


@dataclass(frozen=True)
class RunConfig:
    """One experiment. ``init`` names a model folder whose trained tensors are the start of this run; ``match_scale``
    then brings its projected features to the length of token embeddings (after a run of alignment alone)."""

    train: TrainConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init: str | None = None
    match_scale: bool = False
    cache: str | None = None


def started(
    run: Callable[..., Result | None],
    kind: type,
    path: str | Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train, among the ranks that there are, what a file says in the fields of ``kind``; with ``dry_run`` build
    everything, describe it and return None. ``run`` is told the configuration and what stands around it."""
    config: Any = configuration.load(path, kind, overrides)
    world = groups.setup()
    try:
        return run(config, resume, folder=Path(path).parent, device=world.device, dry_run=dry_run)
    finally:
        groups.shutdown()


def run(
    config: RunConfig,
    resume: str | None = None,
    *,
    folder: Path = Path(),
    device: torch.device | str = "cpu",
    dry_run: bool = False,
) -> Result | None:
    """Build, train and export; the model folder is ``<output_dir>/final``.

    Beside the model's own files it holds ``run.yaml``, the experiment as it was resolved, and ``sources.yaml``, its
    data configuration.
    """
    ranks = groups.world_size() // config.train.parallel.tensor
    asked, config = config, replace(config, train=config.train.on(ranks))
    cache = Path(config.cache).expanduser() if config.cache else None
    spread = not dry_run and config.train.parallel != ParallelConfig()
    model, objective = assemble(config, cache, later=spread)
    minimised = grouped(config, objective, model.net)
    # What a checkpoint holds replaces the whole start, so a resumed run needs its init no more.
    fresh = checkpoint.resolve(resume, config.train.output_dir, repair=not dry_run) is None
    if config.init is not None and fresh:
        warm_start(model.net, build.base_folder(config.init))
    layout = Layout()
    if dry_run:
        model.net.to(device)
    else:
        layout = parallelize(model.net, config.train.parallel, list(model.net.backbone.layers), device)
    size = model.config.tiling.size
    source = open_loader(config.data, config.train, model.encoder, size, folder, cache)
    if config.match_scale and fresh:
        _match_scale(model, source)
    describe(model.net, source, layout)
    # With all that the base decides, and which one it was: a resume asks whether it is still the same. The batch is as
    # it was asked for: on other ranks it is the same recipe.
    resolved = configuration.dump(replace(asked, model=model.config))
    if dry_run:
        plan(model.net, source, config.train, resolved, lambda row: _learned(row, model))
        return None
    hooks = Hooks(
        blocks=model.net.backbone.layers,
        export=lambda net: build.exported(net),
        resolved=resolved,
        texts=export_texts(model.config, resolved, config.data, folder),
        layout=layout,
    )
    with reported(source):
        return train(model.net, source, minimised, config.train, resume=resume, hooks=hooks)


main_config = partial(started, run, RunConfig)
"""``main_config(path, overrides, resume, dry_run=False)``: see :func:`started`."""


def assemble(config: RunConfig, cache: Path | None, *, later: bool = False) -> tuple[Model, DialogueObjective]:
    """The model as a run begins with it, but for ``init``, and what it is trained on; ``later``: as :func:`build.build`
    has it."""
    rng.seed_all(config.train.seed)  # fresh projectors and LoRA are part of what a seed reproduces
    model = build.build(config.model, cache=cache, train=True, later=later)
    objective = DialogueObjective(config.objective, model.tokenizer, cache, config.train.loss_chunk)
    objective.prepare(model.net)
    return model, objective


def export_texts(config: Any, resolved: str, data: DataConfig, folder: Path) -> dict[str, str]:
    """What lies beside the tensors of an exported model or generator."""
    return {
        build.CONFIG_FILE: configuration.dump(config),
        "run.yaml": resolved,
        "sources.yaml": sources_file(data, folder).read_text(encoding="utf-8"),
    }


def grouped(config: RunConfig, objective: Objective, net: nn.Module) -> Objective:
    """``objective``, with the disjoint groups where the experiment names some; ValueError when they do not fit."""
    groups = config.objective.disjoint
    if groups and config.train.block_checkpointing:
        raise ValueError(
            "train.block_checkpointing runs blocks again when objective.disjoint has thawed them; leave one of them out"
        )
    if groups and config.train.parallel.data == "fsdp":
        raise ValueError("objective.disjoint freezes what it does not train; with it, train.parallel.data is ddp")
    if groups and config.train.loss_chunk:
        raise ValueError(
            "train.loss_chunk computes scores again when objective.disjoint has thawed what makes them; leave one of "
            "them out"
        )
    return DisjointObjective(objective, groups, net) if groups else objective


def warm_start(net: nn.Module, folder: Path) -> None:
    """Copy the tensors of a model folder over the parameters of the same names.

    Raises:
        ValueError: when the folder has a tensor that the model lacks or that has another shape: part of what was
            learned would be lost without a word. So too when it has a tensor that is frozen here: the export holds
            what trains and nothing else.
    """
    state = read_file(folder / build.WEIGHTS_FILE)
    own = net.state_dict()
    bad = [k for k, v in state.items() if k not in own or own[k].shape != v.shape]
    if bad:
        raise ValueError(f"init {folder}: {len(bad)} tensors do not fit the model: {', '.join(bad[:10])}")
    lost = sorted(state.keys() - trainable_state(net).keys())
    if lost:
        raise ValueError(
            f"init {folder} holds {len(lost)} tensors that this run neither trains nor exports: "
            f"{', '.join(lost[:10])}; to stand on a model as it is, name it as model.base"
        )
    there = {k: v for k, v in state.items() if not own[k].is_meta}
    net.load_state_dict({**own, **{k: v.to(own[k].dtype) for k, v in there.items()}})
    unread.point(net, {name: entry.read for name, entry in file_entries(folder / build.WEIGHTS_FILE).items()})


def _match_scale(model: Model, source: Loader) -> None:
    net = model.net
    batch = _peek(source)
    if not isinstance(net.aligner, Aligner) or net.projector is None or not len(batch.tiles):
        raise ValueError("match_scale needs objective.align and pictures in the data")
    if frozen := [n for n, p in net.projector.named_parameters() if not p.requires_grad]:
        raise ValueError(f"match_scale changes the projector, but {', '.join(frozen)} of it is frozen and not exported")
    with torch.no_grad():
        features = net.encode(batch.tiles.to(net.aligner.centre.device))[:, : net.projector.num_projected]
    LOG.info("projected features scaled by %.3f", match_scale(net.aligner, net.projector, features))


def _peek(source: Loader) -> Batch:
    """The first draws as a batch."""
    return next(iter(_copy(source)))


def _copy(source: Loader, window: int = 1) -> Loader:
    """The same data from its first draw on. ``source`` still stands where it stood, and no rejected row is booked."""
    ledger = Ledger(max_rate=source.ledger.max_rate)
    return Loader(
        source.mixture, source.encoder, source.batch_size, rank=source.rank, world=source.world, ledger=ledger,
        window=window, packing=source.packing,
    )  # fmt: skip


def sources_file(data: DataConfig, folder: Path) -> Path:
    """The file of ``data.sources``, which counts from the working directory or from ``folder``.

    Raises:
        ValueError: when it is in neither, naming both.
    """
    named = Path(data.sources)
    tried = (named, folder / named)
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise ValueError(f"data.sources: no file {' and no file '.join(str(p) for p in dict.fromkeys(tried))}")
    return found


def open_loader(
    data: DataConfig, train: TrainConfig, encoder: RowEncoder, size: int, folder: Path, cache: Path | None
) -> Loader:
    """The batches of this rank; ``size``: side in pixels of the built-in sets' pictures."""
    sources = load_sources(sources_file(data, folder), cache=cache, seed=train.seed, size=size)
    rows = sum(len(s) for s in sources)  # a small set is judged once it was read, not after 25 epochs
    # Ranks of a tensor group read the same rows, and one of them keeps the book.
    book = None if groups.tensor_rank() else Path(train.output_dir) / "rejected.jsonl"
    ledger = Ledger(book, max_rate=data.max_bad_rate, after=min(200, rows))
    return Loader(
        Mixture(sources, train.seed),
        encoder,
        train.batch_size,
        num_workers=data.workers,
        window=data.window,
        rank=groups.data_rank(),
        world=groups.data_size(),
        ledger=ledger,
        packing=data.packing,
    )


@contextmanager
def reported(source: Loader) -> Iterator[None]:
    """Say at the end of a run how many rows it could not use, and how full its packs were."""
    try:
        yield
    except BaseException:
        report_rejected(source.ledger)  # of this rank alone: the others may not come to be asked
        raise
    report_rejected(source.ledger, together=True)
    report_filled(source)


def report_filled(source: Loader) -> None:
    """Say how full the packs are that were handed out."""
    if source.packing is not None and source.filled is not None:
        LOG.info("packs of %d positions were %.1f %% full", source.packing.length, 100 * source.filled)


def report_rejected(ledger: Ledger, *, together: bool = False) -> None:
    """Say how many rows this rank, or all ranks ``together``, could not use, and where they are listed."""
    ranks = groups.gather_objects(ledger.state_dict(), "data") if together else [ledger.state_dict()]
    bad, seen = (sum(rank[name] for rank in ranks) for name in ("bad", "seen"))
    if bad:
        LOG.warning("%d of %d rows rejected, see %s", bad, seen, ledger.path)


def plan(net: nn.Module, source: Loader, config: TrainConfig, resolved: str, show: Callable[[Encoded], str]) -> None:
    """What a dry run shows: the configuration as it was resolved, and the first row as ``show`` tells it."""
    optimizer = Optimizer(net, config)  # complains about group patterns
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
        print(f"the first row, {row.source} {row.index}{show(row)}")
        if source.packing is not None:
            look = _copy(source, source.window)
            for _ in islice(look, source.window):  # a window has so many batches at least
                pass
            report_filled(look)
        LOG.info("a dry run encodes no more rows than this; python -m accessory doctor looks at all of them")
        return
    raise ValueError(f"none of the first {source.ledger.after} rows can be used")


def _learned(row: Encoded, model: Model) -> str:
    return f"; ⟦what is learned⟧:\n{render_row(row, model.tokenizer)}"


def describe(net: nn.Module, source: Loader, layout: Layout | None = None) -> None:
    """Say what trains and on what."""
    parts = trained_parts(net, layout)
    total = sum(whole for _, whole in parts.values())
    trained = ", ".join(f"{k} {v / 1e6:.2f} M" for k, (v, _) in parts.items() if v) or "nothing"
    LOG.info("%.1f M parameters, trained: %s", total / 1e6, trained)
    for s in source.mixture.sources:
        LOG.info("source %s: %d rows, weight %g", s.name, len(s), s.weight)


def trained_parts(net: nn.Module, layout: Layout | None = None) -> dict[str, tuple[int, int]]:
    """Parameters of every part of a net, however it lies: those that train, and all."""
    parts: dict[str, tuple[int, int]] = {}
    for name, p in net.named_parameters():
        number = p.numel() if layout is None else layout.numel(name, p)
        trained, total = parts.get(name.split(".")[0], (0, 0))
        parts[name.split(".")[0]] = (trained + number * p.requires_grad, total + number)
    return parts
