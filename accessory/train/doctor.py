"""Looking at a run before it starts: what it would read, learn, lose and need, through the code that it runs with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from accessory import config as configuration
from accessory.data.audit import Counts, count, histogram, pictures, render_row
from accessory.data.encode import Encoder
from accessory.data.loader import Loader, RowEncoder
from accessory.data.sources import FileConfig, Source, SourceConfig, open_source, read_configs
from accessory.data.survey import EXAMPLES, Reader, Survey, rows_of, shared
from accessory.models import build
from accessory.models.align import Aligner
from accessory.models.generator import Generator, build_generator
from accessory.models.mllm import MLLM
from accessory.models.plan import size as readable
from accessory.parallel import groups
from accessory.parallel.layout import Layout, ParallelConfig
from accessory.parallel.shard import planned
from accessory.peft.quantize import found as quantization
from accessory.schema import Batch, Encoded, Sample
from accessory.tokens import DREAM_START, IGNORE, NAMES
from accessory.train import footprint, generator_run, rng, run
from accessory.train.checks import after_reading, placeholders, prompts_cut, template_gaps
from accessory.train.config import TrainConfig
from accessory.train.findings import Finding, Meaning
from accessory.train.footprint import Footprint, Shape
from accessory.train.generation import dream_of
from accessory.train.generator_run import GeneratorRunConfig
from accessory.train.objective import first_answer
from accessory.train.optim import Optimizer
from accessory.train.run import DataConfig, RunConfig
from accessory.train.updates import course, shares


@dataclass(frozen=True)
class Asked:
    """``rows`` read of each source at most (0: all), ``samples`` rows shown of each, ``tests``: files that no row of
    the training may stand in, ``bytes`` of the device's memory (None: this machine's), ``ranks`` of the run (None: one
    copy of the model)."""

    rows: int = 1000
    samples: int = 1
    tests: tuple[Source, ...] = ()
    bytes: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 0), ("samples", 0), ("ranks", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Subject:
    """A run that is built. ``copies``: its data ranks. ``reads``: the net that rows go into, ``embed`` how they do
    (None: they hold no ids); ``learns``: how much is learned of a row; ``lost``: what of a row's prompts the
    conditioner cuts; ``takes``: whether rows of a source train something."""

    train: TrainConfig
    data: DataConfig
    net: nn.Module
    encoder: RowEncoder
    copies: int
    open: Callable[[], Loader]
    learns: Callable[[Encoded], int]
    reads: MLLM | None = None
    embed: Callable[[Batch], Any] | None = None
    lost: Callable[[Encoded], list[int]] | None = None
    takes: Callable[[str], bool] | None = None
    language: bool = True
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What was found. ``facts``: plain values, for people and for programs; ``samples``: rows as the model sees them,
    each with a heading, without and with colours."""

    config: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    samples: tuple[tuple[str, str, str], ...]

    def code(self, strict: bool = False) -> int:
        """The exit code: 1 where there is an error or, with ``strict``, a warning."""
        return int(any(strict or f.level == "error" for f in self.findings))

    def plain(self, strict: bool = False) -> dict[str, Any]:
        """All of it as JSON knows it."""
        findings = [{"level": f.level, **configuration.plain(f)} for f in self.findings]
        rows = [{"row": heading, "text": text} for heading, text, _ in self.samples]
        return {
            "config": self.config, "exit": self.code(strict), "findings": findings,
            **configuration.plain(self.facts), "samples": rows,
        }  # fmt: skip


def examine(path: str | Path, overrides: Sequence[str], asked: Asked) -> Report:
    """Build the run of an experiment file on the CPU, read its data, and say what was found; nothing is trained.

    Raises:
        ValueError: for an experiment that cannot be read or built at all.
    """
    folder = Path(path).parent
    subject = subject_of(path, overrides, asked.ranks)
    findings = list(subject.findings)
    loader, sources, complaints = _opened(subject, folder)
    findings += complaints
    if subject.takes is not None:
        strays = [s.name for s in sources if not subject.takes(s.name)]
        findings += [Finding("disjoint", f"no group of objective.disjoint takes rows of source {n!r}") for n in strays]
    total = [0]

    def look(sample: Sample, row: Encoded) -> None:
        total[0] += subject.learns(row)
        if subject.lost is not None:
            findings.extend(prompts_cut(subject.lost, row))

    reader = Reader(sources, subject.encoder, look, subject.data.packing)
    for number, source in enumerate(sources):
        for row in rows_of(number, source, None if loader is None else loader.mixture, asked.rows):
            reader.read(number, row)
    updates = None
    if loader is not None and any(reader.known.values()):  # which may read a few rows more
        updates = course(loader, reader, subject.train, subject.copies)
    drawn = [] if loader is None else shares(loader)
    findings += after_reading(reader, drawn, subject.data.max_bad_rate, subject.encoder, total[0])
    if subject.reads is not None and subject.embed is not None:
        findings += placeholders(reader, subject.reads, subject.embed, subject.encoder)
    facts: dict[str, Any] = {"sources": [_of_source(s) for s in reader.surveys], "learned": total[0]}
    facts |= _lengths(reader.surveys)
    facts["trains"] = run.trained_parts(subject.net)
    findings += _trains(subject)
    longest = None
    if updates is not None:
        facts, findings, longest = facts | updates.facts, findings + updates.findings, updates.longest
    facts["memory"] = _memory(subject, longest, asked, findings)
    if asked.tests:
        findings += _tests(reader, asked.tests)
    return Report(str(path), _merged(findings), facts, _shown(reader, subject.encoder, asked.samples))


# --- building -----------------------------------------------------------------------------------------------------


def subject_of(path: str | Path, overrides: Sequence[str], ranks: int | None = None) -> Subject:
    """The run of an experiment file on so many ``ranks``, built on the CPU."""
    folder = Path(path).parent
    if "generator" in configuration.read(path):
        return _generator(configuration.load(path, GeneratorRunConfig, overrides), folder, ranks or 1)
    config = configuration.load(path, RunConfig, overrides)
    width = config.train.parallel.tensor
    if ranks is not None and ranks % width:
        raise ValueError(f"train.parallel.tensor is {width}, and --ranks {ranks} is no multiple of it")
    return _dialogues(config, folder, 1 if ranks is None else ranks // width)


def _dialogues(config: RunConfig, folder: Path, copies: int) -> Subject:
    cache = Path(config.cache).expanduser() if config.cache else None
    model, objective = run.assemble(config, cache)
    net, findings = model.net, list[Finding]()
    with Meaning("disjoint", findings):
        run.grouped(config, objective, net)
    if config.init is not None:
        with Meaning("init", findings):
            run.warm_start(net, build.base_folder(config.init))
    findings += template_gaps(model.encoder)

    def learns(row: Encoded) -> int:
        if config.objective.language:
            return count(row).learned
        align = config.objective.align
        assert align is not None
        assert isinstance(net.aligner, Aligner)
        if not len(row.tiles) or align.source not in (None, row.source):
            return 0
        answer = first_answer(row.labels.tolist(), objective.ends)
        return int((net.aligner.targets([answer]) != IGNORE).sum())

    size, divided = model.config.tiling.size, config.objective.disjoint
    return Subject(
        config.train.on(copies), config.data, net, model.encoder, copies,
        lambda: run.open_loader(config.data, config.train, model.encoder, size, folder, cache),
        learns, net, lambda b: (net.embed(b.ids, b.tiles), net.context(b.ids, b.tiles, b.counts)),
        takes=(lambda name: any(g.takes(name) for g in divided)) if divided else None,
        language=config.objective.language > 0, findings=findings,
    )  # fmt: skip


def _generator(config: GeneratorRunConfig, folder: Path, copies: int) -> Subject:
    cache = Path(config.cache).expanduser() if config.cache else None
    rng.seed_all(config.train.seed)
    made = build_generator(config.generator, cache=cache, train=True)
    findings: list[Finding] = []
    if config.init is not None:
        with Meaning("init", findings):
            generator_run.warm_start(made, build.base_folder(config.init))
    encoder = generator_run.row_encoder(config, made)
    weights = config.objective.loss

    def learns(row: Encoded) -> int:
        found = count(row)
        if weights is None:
            return found.targets
        return found.learned * (weights.language > 0) + found.targets * (weights.picture > 0)

    subject = Subject(
        config.train.on(copies), config.data, made, encoder, copies,
        lambda: generator_run.open_rows(config, made, encoder, folder, cache),
        learns, lost=lambda row: _lost(made, row), findings=findings,
    )  # fmt: skip
    if weights is None:
        return subject
    dream = dream_of(made)
    assert isinstance(encoder, Encoder)
    findings += template_gaps(encoder)

    def embed(batch: Batch) -> Any:
        spans, wanted = int((batch.ids == DREAM_START).sum()), 0 if batch.targets is None else len(batch.targets)
        if spans != wanted:
            raise ValueError(f"{spans} {NAMES[DREAM_START]} for {wanted} pictures that are to be drawn")
        return dream.embed(batch.ids, None if dream.net.tower is None else batch.tiles)

    return dataclasses.replace(subject, reads=dream.net, embed=embed)


def _lost(generator: Generator, row: Encoded) -> list[int]:
    return generator.conditioner.lost([t.prompt for t in row.targets if t.prompt])


def _opened(subject: Subject, folder: Path) -> tuple[Loader | None, list[Source], list[Finding]]:
    """The loader of the run; where it cannot be made, at least the files that can be opened."""
    try:
        loader = subject.open()
    except ValueError as error:
        said = [Finding("data", str(error))]
    else:
        return loader, list(loader.mixture.sources), []
    sources: list[Source] = []
    configs: list[tuple[str, SourceConfig]] = []
    with Meaning("data", []):  # said above already, as what follows
        configs = read_configs(run.sources_file(subject.data, folder))[0]
    for _, config in configs:
        with Meaning("data", []):
            if isinstance(config, FileConfig):
                sources.append(open_source(config))
    return None, [s for s in sources if len(s)], said


# --- judging ------------------------------------------------------------------------------------------------------


def _trains(subject: Subject) -> list[Finding]:
    """Whether there is something to train, by patterns that each match something."""
    train = subject.train
    try:
        optimizer = Optimizer(subject.net, train)
    except ValueError as error:
        return [Finding("unused-group" if str(error).startswith("train.groups") else "trainable", str(error))]
    if any(train.lr * scale for _, scale, _ in optimizer.groups):
        return []
    return [Finding("trainable", f"train.lr {train.lr:g} times the lr_scale of every group is 0")]


def _memory(subject: Subject, longest: Shape | None, asked: Asked, findings: list[Finding]) -> dict[str, Any]:
    device, net, train = groups.choose_device(), subject.net, subject.train
    has = footprint.memory(device) if asked.bytes is None else asked.bytes
    layout, unknown = Layout(), list[str]()
    if isinstance(net, MLLM):
        with Meaning("parallel", findings):
            layout = planned(net, train.parallel, list(net.backbone.layers), subject.copies)
    elif isinstance(net, Generator) and train.parallel != ParallelConfig():
        blocks = generator_run.blocks_of(net)
        layout = generator_run.of_denoiser(planned(net.denoiser, train.parallel, blocks, subject.copies))
    needs: Footprint = footprint.standing(net, train, layout, subject.copies)
    if not isinstance(net, MLLM) or longest is None or quantization(net) is not None:
        unknown.append("what a batch takes was not counted")
    else:
        kept = footprint.activations(net, longest, train, device, subject.language)
        needs = dataclasses.replace(needs, activations=kept)
        if layout.plan.tensor > 1:
            unknown.append("of the batch less, as the ranks share what layers keep that are cut")
    if any(place.rows is not None for place in layout.places.values()):
        unknown.append("more while a block is gathered from the ranks that share it")
    for code, size, what in (
        ("memory", needs.certain, "weights, gradients and the optimizer alone take"),
        ("memory-tight", needs.total, "weights, optimizer and the activations of the longest batch take about"),
    ):
        if size > has:
            findings.append(Finding(code, f"{what} {readable(size)}, the device has {readable(has)}"))
            break
    ranks = subject.copies * train.parallel.tensor
    return {**dataclasses.asdict(needs), "total": needs.total, "device": has, "ranks": ranks, "unknown": unknown}


def _tests(reader: Reader, tests: Sequence[Source]) -> list[Finding]:
    rows, seen = shared(reader, tests)
    have = sum(len(s.source) for s in reader.surveys)
    of = "the training" if len(reader.known) >= have else f"the {len(reader.known)} rows that were read of {have}"
    found = []
    for tally, what in ((rows, "are rows of"), (seen, "show a picture of")):
        if tally.count:
            text = f"{tally.count} rows of the test {what} {of}"
            found.append(Finding("leak", text, tally.count, tuple(tally.examples)))
    return found


def _merged(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings that say the same of several rows as one; errors first."""
    out: dict[tuple[str, str], Finding] = {}
    for f in findings:
        if before := out.get((f.code, f.text)):
            f = dataclasses.replace(before, count=before.count + f.count, examples=before.examples + f.examples)
        out[f.code, f.text] = dataclasses.replace(f, examples=f.examples[:EXAMPLES])
    return tuple(sorted(out.values(), key=lambda f: f.level != "error"))


# --- showing ------------------------------------------------------------------------------------------------------


def _of_source(survey: Survey) -> dict[str, Any]:
    counts = survey.counts
    return {
        "name": survey.source.name, "weight": survey.source.weight, "rows": len(survey.source), "read": survey.read,
        "dropped": survey.dropped, "tiles": sum(c.tiles for c in counts), "targets": sum(c.targets for c in counts),
        "positions": sum(c.positions for c in counts), "learned": sum(c.learned for c in counts),
        "longest": max((c.positions for c in [*counts, *survey.over]), default=0),
    }  # fmt: skip


def _lengths(surveys: Sequence[Survey]) -> dict[str, Any]:
    """Histograms of positions of text and of pictures, of rows that fit and of those that are too long."""
    counts: list[Counts] = [c for s in surveys for c in (*s.counts, *s.over)]
    return {
        "positions": histogram([c.positions for c in counts]),
        "text_positions": histogram([c.text for c in counts]),
        "picture_positions": histogram([c.placeholders for c in counts if c.placeholders]),
    }


def _shown(reader: Reader, encoder: RowEncoder, number: int) -> tuple[tuple[str, str, str], ...]:
    """The first rows of every source as the model sees them."""
    out = []
    for survey in reader.surveys:
        for sample, row in survey.kept[:number]:
            found = count(row)
            drawn = f", {found.targets} pictures to draw" if found.targets else ""
            heading = f"{row.source}, row {row.index}: {found.positions} positions, {found.learned} learned{drawn}"
            if isinstance(encoder, Encoder):
                shown = pictures(sample, encoder) if sample.turns else []
                plain, green = (render_row(row, encoder.tokenizer, shown, colour=c) for c in (False, True))
            else:
                sizes = [f"{t.pixels.shape[2]} x {t.pixels.shape[1]} of {t.prompt!r}" for t in row.targets]
                plain = green = "\n".join(sizes)
            out.append((heading, plain, green))
    return tuple(out)
