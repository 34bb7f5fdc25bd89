"""What a model will need before it is loaded: bytes of weights, cache and activations, and roughly how long it takes.

Counted from the configuration alone; nothing is allocated. ``tests/unit/models/test_plan.py`` holds the sum against the
measured peak of real processes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F

from accessory import config as configuration
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.quantized import layout
from accessory.backbone.sizes import SIZES
from accessory.models import build, published_keys
from accessory.models.build import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, base_folder
from accessory.models.published import LLAMA_TYPES, SPHINX_X, LlamaType
from accessory.models.skeleton import skeleton, stated
from accessory.nn.attention import SHORT
from accessory.peft.quantize import Quantization
from accessory.vision import meta
from accessory.vision.meta import Encoding
from accessory.vision.projector import Projector

KINDS: dict[str, Quantization | None] = {
    "bf16": None,
    "int8": Quantization("int8"),
    "int4": Quantization("int4"),
    "nf4": Quantization("nf4"),
}
WIDE = 2  # bytes of a number in bf16
FULL = 4  # and in fp32, in which towers and what joins them are loaded
SEQUENCE = 4096  # positions that the published code reads, where the language model can
# Bytes a weight of the largest layer while a prompt is fed: its dequantised copies, or the matrix kernel's own.
SCRATCH = {"bf16": 2, "int8": 4, "int4": 7, "nf4": 4}
KERNELS = 6_000_000  # bytes of code and scratch that the matrix kernels keep once they have run (measured)
FEW_SCRATCH = {"bf16": 0, "int8": 0, "int4": 7, "nf4": 2}  # the same for the output projection of few rows


@dataclass(frozen=True)
class Subject:
    """What is planned: a backbone, and the bytes of all else that is loaded with it (towers, projector, adapters).

    ``tower``: the preset that it sees with; ``positions`` of a tile in the sequence; ``source``: what a published
    preset is made of.
    """

    name: str
    backbone: LlamaConfig
    rest: int = 0
    tower: str | None = None
    positions: int = 0
    source: str = ""

    @property
    def encoding(self) -> Encoding:
        """What one tile takes, with its projection."""
        if self.tower is None:
            return Encoding(0, 0)
        one, width = meta.encoding(self.tower), self.backbone.dim
        # Projected, normed and joined, in fp32.
        return Encoding(one.flops, one.peak + 3 * FULL * self.positions * width)

    def load(self) -> Load:
        """One picture, where it sees, in as long a sequence as its published code reads."""
        length = min(self.backbone.max_length, SEQUENCE) if self.source else Load.prompt + Load.new
        return Load(1, length - Load.new, Load.new, int(self.tower is not None))


@dataclass(frozen=True)
class Load:
    """``batch`` sequences of ``prompt`` tokens, those of ``pictures`` tiles each among them, that are continued by
    ``new`` ones."""

    batch: int = 1
    prompt: int = 1024
    new: int = 256
    pictures: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (name != "pictures"):
                raise ValueError(f"--{name} must be at least {int(name != 'pictures')}, got {value}")


@dataclass(frozen=True)
class Rates:
    """What the machine does at best: FLOP/s of a bf16 product, bytes/s read from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak, and seconds."""

    kind: str
    weights: int
    rest: int
    cache: int
    activations: int
    prefill_seconds: float
    tokens_per_second: float
    encoding: int = 0

    @property
    def total(self) -> int:
        """All at once; pictures are encoded before the language model reads them."""
        return self.weights + self.rest + self.cache + max(self.activations, self.encoding)


def plan(subject: Subject, kind: str, load: Load, rates: Rates) -> Plan:
    """The plan of one kind of weights.

    Not counted: the interpreter and its libraries, and the second copy of bf16 weights that chatting on a CPU packs (as
    many bytes as ``weights``). Towers compute in fp32, for which ``rates`` are too good.

    Raises:
        ValueError: for a kind that there is not, and for a prompt that is too short for its pictures.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if load.pictures and subject.tower is None:
        raise ValueError(f"--pictures {load.pictures}: {subject.name} does not see")
    if load.prompt < load.pictures * subject.positions:
        raise ValueError(
            f"--prompt {load.prompt} is too short: {load.pictures} x {subject.positions} positions are pictures"
        )
    c, weights = subject.backbone, weight_bytes(subject.backbone, KINDS[kind])
    length, tiles = load.prompt + load.new, load.batch * load.pictures
    position = 2 * c.n_layers * c.kv_heads * c.head_width * WIDE
    matmul = product_weights(c)
    seen = subject.encoding if tiles else Encoding(0, 0)
    prompt = (2 * matmul * load.batch * load.prompt + tiles * seen.flops) / rates.flops
    step = (bytes_read(c, kind, load.batch) + load.batch * position * length) / rates.bytes
    return Plan(
        kind,
        weights,
        subject.rest,
        load.batch * position * length,
        activation_bytes(c, kind, load),
        prompt + bytes_read(c, kind, load.batch * load.prompt) / rates.bytes,
        load.batch / max(step, 2 * matmul * load.batch / rates.flops),
        tiles * seen.peak,
    )


def bytes_read(config: LlamaConfig, kind: str, tokens: int) -> int:
    """Bytes of weights that are read to compute ``tokens`` positions at once.

    Of the table only the rows of the tokens are read, unless it scores the vocabulary too. Of E experts a token takes
    k: where any k are as likely, ``tokens`` of them take ``E * (1 - (1 - k / E) ** tokens)``.
    """
    sizes = {n: prod(s) * (WIDE if d is None else d.itemsize) for n, (s, d) in layout(config, KINDS[kind]).items()}
    total = sum(sizes.values()) - (0 if config.tie_embeddings else config.vocab_size * config.dim * WIDE)
    if config.moe is None:
        return total
    idle = (1 - config.moe.top / config.moe.experts) ** tokens
    return total - int(idle * sum(n for name, n in sizes.items() if ".experts." in name))


def weight_bytes(config: LlamaConfig, spec: Quantization | None) -> int:
    """Bytes of a backbone's parameters, with full ones in bf16."""
    kept = layout(config, spec)
    return sum(prod(shape) * (WIDE if dtype is None else dtype.itemsize) for shape, dtype in kept.values())


def product_weights(config: LlamaConfig) -> int:
    """Weights that every token is multiplied with: all matrices of the blocks, of experts those that are chosen."""
    sizes = {name: prod(s) for name, (s, _) in layout(config, None).items() if len(s) == 2}
    total = sum(n for name, n in sizes.items() if name.startswith("layers."))
    if config.moe is None:
        return total
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    return total - experts + experts * config.moe.top // config.moe.experts


def activation_bytes(config: LlamaConfig, kind: str, load: Load) -> int:
    """The largest sum of intermediate results that live together while the prompt is fed (inference, bf16)."""
    c, rows = config, load.batch * load.prompt
    queries, keys = c.n_heads * c.head_width, c.kv_heads * c.head_width
    stream = 2 * rows * c.dim * WIDE  # what is added to, and its norm
    projected = rows * (queries + 2 * keys) * WIDE
    turned = rows * queries * (2 * 4 + WIDE)  # rotation computes in fp32
    scores = 0
    if load.prompt**2 <= SHORT:  # the explicit formula: scores, the same with their mask or as weights, and the mask
        scores = (2 * load.batch * c.n_heads + 1) * load.prompt**2 * WIDE
    hidden = 3 * rows * c.hidden_width * WIDE  # of experts too: one may be every token's choice
    if c.moe is not None:  # the tokens sorted by expert, and what the experts made of them
        hidden += 2 * rows * c.moe.top * c.dim * WIDE
    attention = projected + max(turned, scores + 2 * rows * queries * WIDE)
    largest = max(queries * c.dim, c.hidden_width * c.dim)
    blocks = stream + max(attention, hidden) + SCRATCH[kind] * largest
    # Few rows are scored at a time, for which int8 needs no dequantised copy, nor int4 once it is packed.
    head = 0 if c.tie_embeddings else FEW_SCRATCH[kind] * c.vocab_size * c.dim
    return KERNELS + max(blocks, stream // 2 + head) + load.batch * c.vocab_size * (WIDE + 4)


def published() -> dict[str, tuple[str, LlamaType]]:
    """Every published model that sees, by what it is planned as: how it is joined, and its row."""
    types = {kind: (kind, row) for kind, row in LLAMA_TYPES.items() if row.tower is not None and row.size in SIZES}
    return types | {name: ("llama_ens5_light", row) for name, row in SPHINX_X.items()}


def find(name: str) -> Subject:
    """What ``name`` means: ``SIZE``, ``SIZE+TOWER``, a type of LLaMA2-Accessory (``llama_ens5``) or a model of it
    (``SPHINX-1k``), a model folder, a shipped model, or a folder of whole weights.

    Raises:
        ValueError: for anything else, with the names that come near.
    """
    size, plus, tower = name.partition("+")
    if size in SIZES and not Path(name).exists():
        subject = Subject(name, SIZES[size])
        return _seeing(subject, tower) if plus else subject
    for kind, (joint, row) in published().items():
        if name.lower() in (kind.lower(), *map(str.lower, row.released)) and not Path(name).exists():
            return _published(name if name in row.released else kind, joint, row)
    folder = build.find(name)
    if build.is_generator(folder):
        raise ValueError(f"{name} is a generator; plan is for models that read and speak")
    if (folder / CONFIG_FILE).is_file():
        return _of_folder(name, folder)
    if (folder / "config.json").is_file():
        return Subject(name, stated(folder))
    known = [*SIZES, *published(), *(shown for _, row in published().values() for shown in row.released)]
    near = difflib.get_close_matches(size, known, n=3)
    raise ValueError(
        f"{name} is neither a model folder nor a size; did you mean {' or '.join(near)}?"
        if near
        else f"{name} is neither a model folder nor a size; sizes are: {', '.join(SIZES)} (with a tower: SIZE+TOWER)"
    )


def _published(name: str, joint: str, row: LlamaType) -> Subject:
    """A row of the published models: its encoders as they are loaded, and its joint."""
    assert row.tower is not None
    config = SIZES[row.size]
    joints = published_keys.count(published_keys.joints(joint, config.dim))
    encoders = sum(p.numel() for p in meta.tower_of(row.tower).parameters())
    return Subject(
        name, config, FULL * (encoders + joints), row.tower, row.positions, f"{row.size} with the tower {row.tower}"
    )


def _seeing(subject: Subject, tower: str) -> Subject:
    """``subject`` with a preset's encoders, and the projector that a new model gets."""
    made = meta.tower_of(tower)
    with torch.device("meta"):
        joined = Projector(made.groups, subject.backbone.dim)
    count = sum(p.numel() for m in (made, joined) for p in m.parameters())
    return replace(subject, rest=FULL * count, tower=tower, positions=joined.num_tokens)


def _of_folder(name: str, folder: Path) -> Subject:
    """A model folder: its backbone, and everything beside that as it is loaded (fp32)."""
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    config = configuration.build(configuration.parse(text, name), ModelConfig, name)
    if config.base is not None:
        below = _of_folder(config.base, base_folder(config.base))
        return replace(below, name=name, rest=below.rest + (folder / WEIGHTS_FILE).stat().st_size)
    net = skeleton(config)
    plain = {f"backbone.{key}" for key in layout(net.backbone.config, None)}
    rest = FULL * sum(p.numel() for n, p in net.named_parameters() if n not in plain)
    preset = None if config.tower is None else config.tower.preset
    return Subject(name, net.backbone.config, rest, preset, net.positions_per_tile)


def measured_rates(seconds: float = 0.3) -> Rates:
    """What this machine does now, from a short product and a short pass over memory (busy machines look slow)."""
    a, b = torch.ones(1024, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    matrix, row = torch.ones(32 << 10, 1024, dtype=torch.bfloat16), torch.ones(1, 1024, dtype=torch.bfloat16)
    best = {"flops": 0.0, "bytes": 0.0}
    work = {"flops": (a, b, 2 * 1024**3), "bytes": (row, matrix, matrix.nbytes)}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(best.values()):
        for name, (x, w, amount) in work.items():
            begin = time.perf_counter()
            F.linear(x, w)
            best[name] = max(best[name], amount / (time.perf_counter() - begin))
    return Rates(**best)


def table(subject: Subject, plans: Mapping[str, Plan], load: Load) -> str:
    """A Markdown table of plans."""
    c = subject.backbone
    seen = f", {load.pictures} x {subject.positions} of a prompt's are pictures" if load.pictures else ""
    name = f"{subject.name} ({subject.source})" if subject.source else subject.name
    lines = [
        f"{name}: {product_weights(c) / 1e9:.3g} G weights in {c.n_layers} blocks; {load.batch} x ({load.prompt} + "
        f"{load.new}) tokens{seen}",
        "",
        "| weights | backbone | rest | KV cache | activations | encoding | total | prefill s | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in plans.values():
        sizes = " | ".join(size(n) for n in (p.weights, p.rest, p.cache, p.activations, p.encoding, p.total))
        lines.append(f"| {p.kind} | {sizes} | {p.prefill_seconds:.2g} | {p.tokens_per_second:.3g} |")
    return "\n".join(lines)


def overview(kinds: Sequence[str], rates: Rates, loads: Mapping[str, int]) -> str:
    """A Markdown table of all published models, a line each: totals and tokens/s for every kind of weights.

    ``loads``: fields of :class:`Load` that are not the model's own.
    """
    shown = " | ".join
    lines = [
        f"| model | made of | positions | tokens | towers | KV cache | activations | {shown(kinds)} | prefill s | "
        f"{shown(f'tokens/s {k}' for k in kinds)} |",
        "|---|---|" + "---:|" * (6 + 2 * len(kinds)),
    ]
    for name, (joint, row) in published().items():
        subject = _published(name, joint, row)
        load = replace(subject.load(), **loads)
        plans = [plan(subject, kind, load, rates) for kind in kinds]
        first = plans[0]
        used = shown(size(n) for n in (first.rest, first.cache, max(first.activations, first.encoding)))
        called = f"{name} ({', '.join(row.released)})" if row.released else name
        lines.append(
            f"| {called} | {row.size}+{row.tower} | {subject.positions} | {load.prompt + load.new} | {used} | "
            f"{shown(size(p.total) for p in plans)} | {first.prefill_seconds:.2g} | "
            f"{shown(f'{p.tokens_per_second:.3g}' for p in plans)} |"
        )
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
