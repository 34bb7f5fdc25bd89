"""Prefill and decoding speed against transformers on the same weights, beside the machine's floors.

``python -m benchmarks.generate [--model FILE.gguf|FOLDER] [--threads N] [--dtype bfloat16]
    [--repeats 5] [--new 64] [--compile] [--quantize int8 int4] [--tasks decode-1] [--cpu-time] [--json]``

Without ``--model`` the cached SmolLM2-135M is used if it is there, random weights of its shape otherwise (which take
the same time). All contenders take turns in one process; the table shows medians. On a busy machine
``--threads 1 --cpu-time`` counts only the seconds in which the process ran. ``--compile`` adds a column for the
compiled step, which decodes single sequences, and ``--quantize`` one for each kind of weights (accelerated, and with
the compiled step where ``--compile`` is given): ``int8``, ``int4,group=32``, ``int8,embeddings`` ...
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from accessory.backbone.fast import accelerate
from accessory.backbone.generate import Sampling, generate
from accessory.backbone.gguf import load_gguf
from accessory.backbone.hf import to_hf
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.sizes import to_hf_config
from accessory.backbone.weights import from_tensors, read_folder
from accessory.data.assets import find
from accessory.peft.quantize import Quantization, num_bytes, quantize
from benchmarks.floors import floor_runs, interleaved, median, products, rates

SMOLLM2 = LlamaConfig(
    dim=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    ffn_dim=1536,
    vocab_size=49152,
    rope_theta=1e5,
    tie_embeddings=True,
)
PROMPT = 64
TASKS = ("prefill-1", "prefill-8", "decode-1", "decode-8", "agree")
OWN = ("transformers", "eager", "accelerated", "compiled", "linears")  # columns with a name of their own


@dataclass(frozen=True)
class Line:
    """One row of the table, in tokens/s."""

    task: str
    transformers: float
    eager: float
    accelerated: float
    linears: float
    floor: float
    compiled: float | None = None
    quantized: dict[str, float] = field(default_factory=dict)


def load(source: Path | None, dtype: torch.dtype) -> tuple[str, LlamaConfig, dict[str, Tensor]]:
    """A name for the table, the configuration and the weights."""
    if source is None and (folder := find("smollm2")) is not None:
        source = next(iter(sorted(folder.rglob("*.gguf"))), folder)
    if source is None:
        torch.manual_seed(0)
        state = Llama(SMOLLM2).state_dict()
        return "random weights of SmolLM2-135M's shape", SMOLLM2, {k: v.to(dtype) for k, v in state.items()}
    config, tensors = load_gguf(source) if source.suffix == ".gguf" else read_folder(source)
    return source.stem, config, {k: v.to(dtype) for k, v in tensors.items()}


def reference(config: LlamaConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The model of transformers that computes the same."""
    fields = to_hf_config(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype).eval()
    missing = model.load_state_dict(to_hf(config, tensors), strict=False).missing_keys
    if [key for key in missing if key != "lm_head.weight"]:
        raise ValueError(f"transformers misses {missing}")
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prefill_runs(hf: Any, models: dict[str, Llama], ids: Tensor) -> dict[str, Callable[[], object]]:
    """Prompt in, cache filled, scores of the last position out."""

    def ours(model: Llama) -> Tensor:
        cache = model.cache(*ids.shape)
        return model.logits(model(model.embed(ids), cache=cache)[:, -1:])

    runs: dict[str, Callable[[], object]] = {"transformers": lambda: hf(ids, use_cache=True, logits_to_keep=1)}
    return runs | {name: lambda m=model: ours(m) for name, model in models.items()}  # type: ignore[misc]


def decode_runs(hf: Any, models: dict[str, Llama], ids: Tensor, new: int) -> dict[str, Callable[[], object]]:
    """Greedy generation through the public entry of each library."""

    def ours(model: Llama) -> list[list[int]]:
        return generate(model, list(model.embed(ids)), sampling=Sampling(max_new_tokens=new))

    def theirs() -> Tensor:
        return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

    runs: dict[str, Callable[[], object]] = {"transformers": theirs}
    return runs | {name: lambda m=model: ours(m) for name, model in models.items()}  # type: ignore[misc]


def linears_run(model: Llama, rows: int) -> Callable[[], object]:
    """Every weight of the model times ``rows`` vectors, and nothing else (the output table once per sequence)."""
    weights = [w for name, w in model.layers.named_parameters() if w.ndim == 2]
    table = model.tok_embeddings.weight if model.output is None else model.output.weight
    x = {w.shape[1]: torch.ones(rows, w.shape[1], dtype=w.dtype) for w in [*weights, table]}
    scored = {table.shape[1]: x[table.shape[1]][: min(rows, 8)]}
    return lambda: (products(weights, x), products([table], scored))


def line(task: str, speed: dict[str, float], floor: float) -> Line:
    """A row from the speed of every contender."""
    own = {k: v for k, v in speed.items() if k in OWN}
    return Line(task, **own, floor=floor, quantized={k: v for k, v in speed.items() if k not in OWN})


@dataclass(frozen=True)
class Contest:
    """The models to compare and how to time them."""

    hf: Any
    models: dict[str, Llama]
    floors: dict[str, float]
    repeats: int
    clock: Callable[[], float]

    def prefill(self, batch: int, length: int) -> Line:
        """Tokens/s of a prompt."""
        model = self.models["eager"]
        ids = torch.randint(0, model.config.vocab_size, (batch, length))
        runs = prefill_runs(self.hf, self.models, ids) | {"linears": linears_run(model, batch * length)}
        seconds = interleaved(runs, self.repeats, self.clock)
        speed = {name: batch * length / median(s) for name, s in seconds.items()}
        floor = self.floors["matmul_gflop_s"] * 1e9 / (2 * sum(w.numel() for w in model.layers.parameters()))
        return line(f"prefill {batch} x {length}", speed, floor)

    def decode(self, batch: int, new: int) -> Line:
        """Tokens/s after the prompt: a generation of one token is the prompt's cost, and is subtracted pairwise."""
        model = self.models["eager"]
        ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT))
        runs = {f"{name} {n}": run for n in (1, new) for name, run in decode_runs(self.hf, self.models, ids, n).items()}
        seconds = interleaved(runs | {"linears": linears_run(model, batch)}, self.repeats, self.clock)
        speed = {
            name: batch * (new - 1) / median([b - a for a, b in zip(seconds[f"{name} 1"], seconds[f"{name} {new}"])])
            for name in ("transformers", *self.models)
        }
        moved = sum(w.numel() * w.itemsize for w in model.parameters())
        floor = batch * max(self.floors["read_gb_s"], self.floors["copy_gb_s"]) * 1e9 / moved
        return line(f"decode, batch {batch}", speed | {"linears": batch / median(seconds["linears"])}, floor)


def measure(config: LlamaConfig, tensors: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """All lines and floors in one run."""
    dtype = getattr(torch, args.dtype)
    hf = reference(config, tensors, dtype)
    models = {"eager": from_tensors(config, dict(tensors)), "accelerated": from_tensors(config, dict(tensors))}
    accelerate(models["accelerated"])
    if args.compile:
        models["compiled"] = accelerate(from_tensors(config, dict(tensors)), compile=True)
    sizes = {"bf16" if dtype == torch.bfloat16 else "fp32": num_bytes(models["eager"])}
    for text in args.quantize:
        model = from_tensors(config, dict(tensors))
        quantize(model, Quantization.parse(text))
        sizes[text] = num_bytes(model)
        models[text] = accelerate(model, compile=args.compile)
    clock = time.process_time if args.cpu_time else time.perf_counter
    floors = rates(interleaved(floor_runs(dtype), args.repeats, clock))
    contest = Contest(hf, models, floors, args.repeats, clock)
    tasks: dict[str, Callable[[], Line]] = {
        "prefill-1": lambda: contest.prefill(1, 512),
        "prefill-8": lambda: contest.prefill(8, 128),
        "decode-1": lambda: contest.decode(1, args.new),
        "decode-8": lambda: contest.decode(8, args.new),
    }
    lines = []
    for name in [n for n in tasks if n in args.tasks]:
        lines.append(tasks[name]())
        print(lines[-1], file=sys.stderr, flush=True)
    ids = torch.randint(0, config.vocab_size, (8, PROMPT))
    agree = agreement(decode_runs(hf, models, ids, args.new), PROMPT) if "agree" in args.tasks else {}
    return {"floors": floors, "lines": lines, "agree": agree, "bytes": sizes}


def agreement(runs: dict[str, Callable[[], object]], prompt: int) -> dict[str, float]:
    """Share of greedy tokens equal to those of transformers (below 1 in bf16, where near ties fall differently)."""
    theirs = runs["transformers"]()[:, prompt:]  # type: ignore[index]
    return {
        name: float((torch.tensor(run()) == theirs).float().mean())
        for name, run in runs.items()
        if name != "transformers"
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or a model folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens to decode after a prompt of 64")
    parser.add_argument("--compile", action="store_true", help="also decode with the compiled step")
    parser.add_argument("--quantize", nargs="+", default=[], metavar="KIND", help="also these kinds of weights")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; needs --threads 1")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the threads' seconds, so it needs --threads 1")
    torch.set_num_threads(args.threads)
    name, config, tensors = load(args.model, getattr(torch, args.dtype))
    with torch.inference_mode():
        result = measure(config, tensors, args)
    if args.json:
        print(json.dumps({"model": name, **result, "lines": [asdict(line) for line in result["lines"]]}))
        return
    show(name, args, result)


def show(name: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the table."""
    floors, lines = result["floors"], result["lines"]
    clock = "CPU" if args.cpu_time else "wall"
    print(f"{name}, {args.dtype}, {args.threads} threads, {clock} time, medians of {args.repeats}, tokens/s.")
    print(
        f"Floors: memory copy {floors['copy_gb_s']:.1f} GB/s, read {floors['read_gb_s']:.1f} GB/s, "
        f"matrix product {floors['matmul_gflop_s']:.0f} GFLOP/s."
    )
    print("Weights: " + ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in result["bytes"].items()) + ".\n")
    extra = [*(["compiled"] if args.compile else []), *args.quantize]
    heads = "".join(
        f"| {kind}{', compiled' if args.compile and kind in args.quantize else ''} | ratio " for kind in extra
    )
    print(f"| | transformers | ours | ratio | ours, accelerated | ratio {heads}| linears alone | machine floor |")
    print(f"|---|---|---|---|---|---{'|---|---' * len(extra)}|---|---|")
    for x in lines:
        speeds = [x.eager, x.accelerated, *(x.compiled if k == "compiled" else x.quantized[k] for k in extra)]
        cells = " | ".join(f"{speed:.1f} | {speed / x.transformers:.2f}" for speed in speeds)
        print(f"| {x.task} | {x.transformers:.1f} | {cells} | {x.linears:.1f} | {x.floor:.1f} |")
    if result["agree"]:
        shares = ", ".join(f"{k} {v:.0%}" for k, v in result["agree"].items())
        print(f"\nGreedy tokens equal to transformers', batch 8: {shares}")


if __name__ == "__main__":
    main()
