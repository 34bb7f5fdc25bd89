"""What a model will need before it is loaded: bytes of weights, cache and activations, and roughly how long it takes.

Counted from the configuration alone; nothing is allocated. ``tests/unit/models/test_plan.py`` holds the sum against the
measured peak of real processes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from accessory import config as configuration
from accessory.backbone import store
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.quantized import layout
from accessory.backbone.sizes import SIZES
from accessory.models import build
from accessory.models.build import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, base_folder
from accessory.models.skeleton import sizes, stated
from accessory.nn.attention import SHORT
from accessory.peft.quantize import Quantization
from accessory.vision import presets
from accessory.vision.projector import Projector

KINDS: dict[str, Quantization | None] = {
    "bf16": None,
    "int8": Quantization("int8"),
    "int4": Quantization("int4"),
    "nf4": Quantization("nf4"),
}
WIDE = 2  # bytes of a number in bf16
# Bytes a weight of the largest layer while a prompt is fed: its dequantised copies, or the matrix kernel's own.
SCRATCH = {"bf16": 2, "int8": 4, "int4": 7, "nf4": 4}
KERNELS = 6_000_000  # bytes of code and scratch that the matrix kernels keep once they have run (measured)
FEW_SCRATCH = {"bf16": 0, "int8": 0, "int4": 7, "nf4": 2}  # the same for the output projection of few rows


@dataclass(frozen=True)
class Subject:
    """What is planned: a backbone, and the bytes of all else that is loaded with it (towers, projector, adapters)."""

    name: str
    backbone: LlamaConfig
    rest: int = 0


@dataclass(frozen=True)
class Load:
    """``batch`` sequences of ``prompt`` tokens that are continued by ``new`` ones."""

    batch: int = 1
    prompt: int = 1024
    new: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


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

    @property
    def total(self) -> int:
        """All at once."""
        return self.weights + self.rest + self.cache + self.activations


def plan(subject: Subject, kind: str, load: Load, rates: Rates) -> Plan:
    """The plan of one kind of weights.

    Not counted: the interpreter and its libraries, what a tower needs while it encodes, and the second copy of bf16
    weights that chatting on a CPU packs (as many bytes as ``weights``).

    Raises:
        ValueError: for a kind that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    c, weights = subject.backbone, weight_bytes(subject.backbone, KINDS[kind])
    length = load.prompt + load.new
    position = 2 * c.n_layers * c.kv_heads * c.head_width * WIDE
    matmul = product_weights(c)
    prompt = 2 * matmul * load.batch * load.prompt / rates.flops
    # Of the table only the rows of the tokens are read, unless it scores the vocabulary too.
    idle = 0 if c.tie_embeddings else c.vocab_size * c.dim * WIDE
    step = (weights - idle + load.batch * position * length) / rates.bytes
    return Plan(
        kind,
        weights,
        subject.rest,
        load.batch * position * length,
        activation_bytes(c, kind, load),
        prompt + weights / rates.bytes,
        load.batch / max(step, 2 * matmul * load.batch / rates.flops),
    )


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
    hidden = 3 * rows * c.hidden_width * WIDE
    attention = projected + max(turned, scores + 2 * rows * queries * WIDE)
    largest = max(queries * c.dim, c.hidden_width * c.dim)
    blocks = stream + max(attention, hidden) + SCRATCH[kind] * largest
    # Few rows are scored at a time, for which int8 needs no dequantised copy, nor int4 once it is packed.
    head = 0 if c.tie_embeddings else FEW_SCRATCH[kind] * c.vocab_size * c.dim
    return KERNELS + max(blocks, stream // 2 + head) + load.batch * c.vocab_size * (WIDE + 4)


def find(name: str) -> Subject:
    """What ``name`` means: ``SIZE``, ``SIZE+TOWER``, a model folder, a shipped model, or a folder of whole weights.

    Raises:
        ValueError: for anything else, with the names that come near.
    """
    size, plus, tower = name.partition("+")
    if size in SIZES and not Path(name).exists():
        return Subject(name, SIZES[size], _vision_bytes(tower, SIZES[size].dim) if plus else 0)
    folder = build.find(name)
    if (folder / CONFIG_FILE).is_file():
        return _of_folder(name, folder)
    if (folder / "config.json").is_file():
        return Subject(name, stated(folder))
    near = difflib.get_close_matches(size, SIZES, n=3)
    raise ValueError(
        f"{name} is neither a model folder nor a size; did you mean {' or '.join(near)}?"
        if near
        else f"{name} is neither a model folder nor a size; sizes are: {', '.join(SIZES)} (with a tower: SIZE+TOWER)"
    )


def _vision_bytes(tower: str, dim: int) -> int:
    """A preset's encoders and its projector into a backbone of width ``dim``, in bf16."""
    with torch.device("meta"):
        made = presets.build(tower)
        joined = Projector(made.groups, dim)
    return WIDE * sum(p.numel() for m in (made, joined) for p in m.parameters())


def _of_folder(name: str, folder: Path) -> Subject:
    """A model folder: its backbone, and everything beside that as it is loaded (fp32)."""
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    config = configuration.build(configuration.parse(text, name), ModelConfig, name)
    if config.base is not None:
        below = _of_folder(config.base, base_folder(config.base))
        return Subject(name, below.backbone, below.rest + (folder / WEIGHTS_FILE).stat().st_size)
    backbone = sizes(config.backbone)
    trained = store.read_file(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else {}
    added = [v.numel() for k, v in trained.items() if ".delta." in k or ".prefix." in k or k.startswith("resampler.")]
    parts: list[nn.Module] = []
    with torch.device("meta"):
        if config.tower is not None:
            tower = presets.build(config.tower.preset)
            parts.append(tower)
            if (p := config.projector) is not None:
                made = Projector(tower.groups, backbone.dim, p.layers, p.start_end, p.words, p.sharpness)
                parts.append(made)
    return Subject(name, backbone, 4 * (sum(added) + sum(p.numel() for m in parts for p in m.parameters())))


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
    lines = [
        f"{subject.name}: {product_weights(c) / 1e9:.3g} G weights in {c.n_layers} blocks; {load.batch} x "
        f"({load.prompt} + {load.new}) tokens",
        "",
        "| weights | backbone | rest | KV cache | activations | total | prefill s | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for p in plans.values():
        sizes = " | ".join(size(n) for n in (p.weights, p.rest, p.cache, p.activations, p.total))
        lines.append(f"| {p.kind} | {sizes} | {p.prefill_seconds:.2g} | {p.tokens_per_second:.3g} |")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
