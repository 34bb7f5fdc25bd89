"""What fewer bits cost: bytes, loss in nats on text and on pictures, and decoding speed, for every kind of weights.

``python -m benchmarks.quantize [--model nano-sphinx] [--kinds bf16 int8 int4 ...] [--windows 8] [--questions 8]
    [--new 32] [--threads 1] [--cpu-time] [--json]``
``python -m benchmarks.quantize --spoil``: what the gate (``models/gate.py``) sees of each kind, good and damaged.

Text: the reference manual that comes with Python (``pydoc_data``), windows of 512 tokens, mean loss a token, of the
model and of the language model that it was tuned from. Pictures: the built-in test sets, mean loss a token of the true
answers. LoRA is folded into the weights before they are quantised, as ``chat --quantize`` does it; the bf16 row is the
model as it is. Decoding is that of the chat (accelerated, not compiled), batch 1; on a busy machine ``--threads 1
--cpu-time`` counts only the seconds in which the process ran.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.backbone.fast import accelerate
from accessory.backbone.generate import Sampling, generate
from accessory.data.builtin import build as build_set
from accessory.data.collate import collate
from accessory.models import build
from accessory.models.build import Model, ModelConfig
from accessory.models.gate import drift
from accessory.models.gate import measure as measure_prompts
from accessory.peft.attach import find_backbone, merge
from accessory.peft.quantize import Quantization, code_error, found, kernels, num_bytes, quantized
from accessory.serve.chat import find_model
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from benchmarks.floors import median

FULL, FOLDED = "bf16", "bf16, LoRA folded"
KINDS = (FULL, FOLDED, "int8", "int8,embeddings", "int4,group=32", "int4", "int4,embeddings", "nf4")
SETS = ("emoji-names", "scenes-grounding", "scenes-count", "scenes-relation", "scenes-colour", "words-ocr", "easy-vqa")
WINDOW, PROMPT = 512, 64


@dataclass(frozen=True)
class Row:
    """One kind: bytes of the backbone, nats a token, tokens/s."""

    kind: str
    bytes: int
    text: float
    text_untuned: float
    pictures: float
    tokens_per_second: float


def text_ids(model: Model, windows: int) -> Tensor:
    """Token ids (windows, 512) of the manual, spread evenly over it."""
    whole = "\n".join(topics[name] for name in sorted(topics))
    step = len(whole) // windows
    rows = [model.tokenizer.encode(whole[i * step : i * step + WINDOW * 8])[:WINDOW] for i in range(windows)]
    return torch.tensor(rows)


@torch.inference_mode()
def text_loss(model: Model, windows: int) -> float:
    """Nats a token of text, every window by itself."""
    backbone, total = model.net.backbone, []
    for ids in text_ids(model, windows):
        h = backbone(backbone.embed(ids[None]))[0, :-1]
        total.append(F.cross_entropy(backbone.logits(h).float(), ids[1:]))
    return float(torch.stack(total).mean())


@torch.inference_mode()
def picture_loss(model: Model, questions: int, cache: Path | None) -> float:
    """Nats a token of the answers to questions about pictures, over all sets together."""
    objective = DialogueObjective(ObjectiveConfig(), model.tokenizer, cache)
    loss = count = 0.0
    for name in SETS:
        rows = build_set(name, "test", cache=cache, size=model.config.tiling.size)
        chosen = [rows[k * len(rows) // questions] for k in range(questions)]
        batch = collate([model.encoder.encode(sample) for sample in chosen], model.tokenizer.pad_id)
        one, tokens, _ = objective(model.net, batch)
        loss, count = loss + float(one), count + float(tokens)
    return loss / count


def decode_speed(model: Model, new: int, repeats: int, clock: Callable[[], float]) -> float:
    """Tokens/s after a prompt of 64: a generation of one token is the prompt's cost, and is subtracted."""
    backbone = model.net.backbone
    ids = torch.arange(PROMPT) * 7 % backbone.config.vocab_size
    rows = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            seconds = []
            for count in (1, new):
                begin = clock()
                generate(backbone, [backbone.embed(ids)], sampling=Sampling(max_new_tokens=count))
                seconds.append(clock() - begin)
            rows.append((new - 1) / (seconds[1] - seconds[0]))
    return median(rows[1:])


def measure(kind: str, args: argparse.Namespace) -> Row:
    """One row of the table, with a model of its own."""
    model = build.load(find_model(args.model), cache=args.cache)
    if kind == FOLDED:
        merge(model.net)
    elif kind != FULL:
        build.shrink(model, Quantization.parse(kind))
    untuned = build.build(ModelConfig(model.config.backbone, None, None), cache=args.cache)
    if kind not in (FULL, FOLDED):
        build.shrink(untuned, Quantization.parse(kind))
    size = num_bytes(model.net.backbone)
    accelerate(model.net.backbone)
    clock = time.process_time if args.cpu_time else time.perf_counter
    speed = decode_speed(model, args.new, args.repeats, clock)
    texts = text_loss(model, args.windows), text_loss(untuned, args.windows)
    return Row(kind, size, *texts, picture_loss(model, args.questions, args.cache), speed)


def swapped(net: nn.Module) -> None:
    """Two blocks of a quantised backbone change places."""
    layers: nn.ModuleList = find_backbone(net).get_submodule("layers")  # type: ignore[assignment]
    layers[0], layers[1] = layers[1], layers[0]


def zeroed(net: nn.Module) -> None:
    """One scale is lost: the weights of its group become 0."""
    kernel = dict(kernels(net))["layers.0.attention.wq"]
    if kernel.kind == "nf4":
        kernel.codes[: kernel.group // 2] = 0x77  # type: ignore[operator]  # level 7 is 0, the scale a code of its own
    else:
        kernel.scales[(0,) * (kernel.scales.ndim - 1)] = 0  # type: ignore[operator]


def transposed(net: nn.Module) -> None:
    """A square matrix was written the other way round."""
    backbone, spec = find_backbone(net), found(net)
    assert spec is not None
    linear = backbone.get_submodule("layers.0.attention.wo")
    linear.kernel = quantized(spec, linear.kernel.dequantized().t().contiguous())  # type: ignore[operator, union-attr]


def good(net: nn.Module) -> None:
    """As it is."""


SPOILS = (good, swapped, zeroed, transposed)


def spoil(kind: str, args: argparse.Namespace) -> None:
    """Print what the gate sees of one kind and of its damaged copies."""
    model = build.load(find_model(args.model), cache=args.cache)
    merge(model.net)
    full = {n: m.weight for n, m in find_backbone(model.net).named_modules() if hasattr(m, "weight")}
    before = measure_prompts(model)
    build.shrink(model, Quantization.parse(kind))
    for damage in SPOILS:
        net = copy.deepcopy(model.net)
        damage(net)
        moved = drift(before, measure_prompts(replace(model, net=net)))
        worst = max(code_error(kernel, full[name]) for name, kernel in kernels(net))
        print(f"| {kind} | {damage.__name__} | {moved.nats:.4f} | {moved.agreement:.1%} | {worst:.4f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-sphinx", help="a model folder, or the name of a shipped model")
    parser.add_argument("--kinds", nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--windows", type=int, default=8, help="windows of text")
    parser.add_argument("--questions", type=int, default=8, help="questions of every picture set")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; needs --threads 1")
    parser.add_argument("--cache", type=Path, help="asset cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--spoil", action="store_true", help="print what the gate sees instead")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the threads' seconds, so it needs --threads 1")
    torch.set_num_threads(args.threads)
    if args.spoil:
        print("| weights | what was done | nats a position | likeliest stayed | worst code |\n|---|---|---:|---:|---:|")
        for kind in args.kinds:
            if kind not in (FULL, FOLDED):
                spoil(kind, args)
        return
    rows = []
    for kind in args.kinds:
        rows.append(measure(kind, args))
        print(rows[-1], file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    clock = "CPU" if args.cpu_time else "wall"
    print(
        f"{args.model}, {args.threads} threads, {clock} time; text: {args.windows} x {WINDOW} tokens, pictures: "
        f"{args.questions} questions of each of {len(SETS)} sets.\n"
    )
    print("| weights | backbone MB | nats, text | text, untuned | nats, pictures | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|")
    for r in rows:
        nats = f"{r.text:.4f} | {r.text_untuned:.4f} | {r.pictures:.4f}"
        print(f"| {r.kind} | {r.bytes / 1e6:.0f} | {nats} | {r.tokens_per_second:.1f} |")


if __name__ == "__main__":
    main()
