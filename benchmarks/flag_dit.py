"""Sampling speed of our Next-DiT against diffusers' LuminaNextDiT2DModel: same configuration, same weights, one run.

``python -m benchmarks.flag_dit [--dim 384] [--layers 8] [--heads 6] [--kv-heads 2] [--size 32] [--batch 1]
    [--steps 3] [--repeats 3] [--threads N] [--dtype float32] [--device cpu|cuda] [--cpu-time] [--quick] [--json]``

Every contender draws the same pictures by Euler steps of a guided flow, through the sampler's public entry; diffusers'
model runs in the plainest loop there can be, with its rotary table made once beforehand. Contenders take turns, the
table shows medians. Random weights of standard deviation 0.05, half of the gates near zero, as trained ones are; the
conditional text is ``--text`` long and the null is one token. The floor is the arithmetic of a step (the text being
read already) at the measured rate of a matrix product, of plain or packed weights, whichever is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.diffusion.dit_fast import accelerate
from accessory.diffusion.dit_weights import diffusers_arguments, from_tensors, to_diffusers
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.gates import measure_gates, truncate
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Noise, Ode, SamplerSettings, sample
from accessory.diffusion.time_grid import Grid
from accessory.nn.linear import Linear
from accessory.nn.packed import Packed
from benchmarks.floors import floor_runs, interleaved, median

SCALE = 4.0
CUT = 0.8  # share of heads, the published claim
QUICK = {
    "dim": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "size": 8,
    "text": 5,
    "text_dim": 24,
    "steps": 2,
    "repeats": 1,
}


@dataclass(frozen=True)
class Line:
    """A contender: milliseconds a step, how many times as fast as diffusers' in the same mode, and how far its
    pictures are from diffusers' (in latents; truncation is meant to change them)."""

    contender: str
    guidance: str
    ms: float
    ratio: float
    difference: float


@dataclass(frozen=True)
class Result:
    """All lines, parameters in millions, tokens of a picture, and the floor."""

    lines: list[Line]
    parameters: float
    tokens: int
    gflop: float
    gflop_s: float

    @property
    def floor_ms(self) -> float:
        """The arithmetic of a guided step at the rate of a matrix product."""
        return 1e3 * self.gflop / self.gflop_s


class Unread(nn.Module):
    """A denoiser that reads its text anew at every step."""

    def __init__(self, net: FlagDiT) -> None:
        super().__init__()
        self.net = net
        self.prediction, self.latent_channels = net.prediction, net.latent_channels

    def forward(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        """Ask without a cache."""
        found: Latents = self.net(x, t, condition, steering=steering)
        return found


@dataclass(frozen=True)
class Task:
    """What every contender draws."""

    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    condition: Condition
    null: Condition
    device: torch.device

    def ours(self, denoiser: Any, batched: bool, steering: Steering | None = None) -> Tensor:
        """By the sampler."""
        guidance = Guidance(SCALE, batched=batched)
        settings = SamplerSettings(Ode(method="euler"), Grid(points=self.steps + 1), guidance)
        found = sample(
            denoiser,
            self.condition,
            self.null,
            shape=self.shape,
            seeds=self.seeds,
            settings=settings,
            steering=steering,
        )
        assert isinstance(found, Tensor)
        return found

    def theirs(self, model: Any, rope: Tensor, batched: bool) -> Tensor:
        """The same arithmetic around diffusers' network."""
        x = torch.stack(Noise(self.seeds).draw([self.shape] * len(self.seeds))).to(self.device)
        null = self.null[[0] * len(self.seeds)]
        asked = [join([self.condition, null])] if batched else [self.condition, null]
        copies = 2 if batched else 1
        times = torch.linspace(0, 1, self.steps + 1).tolist()
        for start, end in itertools.pairwise(times):
            t = torch.full((copies * len(x),), start, device=self.device)
            outputs = []
            for told in asked:
                assert told.seq is not None
                assert told.mask is not None
                state = x.repeat(copies, 1, 1, 1).to(told.seq.dtype)
                y = model(state, t, told.seq, told.mask.long(), rope, {}, return_dict=False)[0]
                outputs.append(y[:, : x.shape[1]].float())
            conditional, free = outputs[0].chunk(2) if batched else outputs
            x = x + (end - start) * (free + SCALE * (conditional - free))
        return x


def state(config: FlagDiTConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random weights whose output is not zero."""
    torch.manual_seed(0)
    out = {}
    for name, value in FlagDiT(config).state_dict().items():
        drawn = torch.randn(value.shape)
        if name.endswith("gate"):
            drawn = torch.where(torch.rand(value.shape) < 0.5, 0.01, 0.7) * drawn
        else:
            drawn = 0.05 * drawn + (1.0 if value.ndim == 1 and name.endswith("weight") else 0.0)
        out[name] = drawn.to(device=device, dtype=dtype)
    return out


def library(config: FlagDiTConfig, weights: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """diffusers' model with these weights, and its rotary table."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

    model = LuminaNextDiT2DModel(**diffusers_arguments(config)).eval()
    model.load_state_dict(to_diffusers(weights), assign=True)
    device = next(model.parameters()).device
    return model, get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384).to(device)


def arithmetic(model: FlagDiT, tokens: int, batch: int, text: int) -> float:
    """GFLOP of one guided step, two for a multiplication with its addition; text keys are made before."""
    config, rows = model.config, 2 * batch  # both halves
    total = 0
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or name.rpartition(".")[2] in ("wk_y", "wv_y"):
            continue
        once = any(part in name for part in ("adaLN", "t_embedder", "cap_embedder"))
        cached = "cap_embedder" in name
        total += 0 if cached else 2 * module.weight.numel() * rows * (1 if once else tokens)
    total += config.n_layers * rows * 4 * config.dim * tokens * (tokens + text)
    return total / 1e9


def contenders(
    task: Task, config: FlagDiTConfig, weights: dict[str, Tensor]
) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """What draws the pictures, by name and mode."""
    other, rope = library(config, weights)
    ours = from_tensors(weights, config).eval()
    cut = truncate(measure_gates(ours).threshold(CUT))
    kinds: dict[str, Callable[[bool], Tensor]] = {
        "diffusers": lambda batched: task.theirs(other, rope, batched),
        "ours, text read anew": partial(task.ours, Unread(ours)),
        "ours": partial(task.ours, ours),
        f"ours, {CUT:.0%} of heads cut": partial(task.ours, ours, steering=cut),
    }
    if task.device.type == "cpu":
        fast = accelerate(from_tensors(weights, config).eval())
        kinds["ours, accelerated"] = partial(task.ours, fast)
        kinds[f"ours, accelerated, {CUT:.0%} cut"] = partial(task.ours, fast, steering=cut)
    modes = {"batched": True, "two calls": False}
    return {(name, mode): partial(draw, batched) for mode, batched in modes.items() for name, draw in kinds.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device, clock: Callable[[], float], size: int) -> float:
    """GFLOP/s of a square product, at best: of a packed weight too, which is faster in fp32 on a CPU."""
    with torch.device(device):
        runs = {"plain": floor_runs(dtype, megabytes=1, size=size)["matmul"]}
    if device.type == "cpu":
        x, packed = torch.ones(size, size, dtype=dtype), Packed((torch.ones(size, size, dtype=dtype),))
        runs["packed"] = lambda: packed(x)
    return 2 * size**3 / 1e9 / min(min(seconds) for seconds in interleaved(runs, 5, clock).values())


@torch.no_grad()
def measure(args: argparse.Namespace) -> Result:
    """The table."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    config = FlagDiTConfig(
        dim=args.dim, n_layers=args.layers, n_heads=args.heads, n_kv_heads=args.kv_heads, text_dim=args.text_dim,
        norms="sandwich", final_shift=False, eol_token=False, rope_axes=2,
    )  # fmt: skip
    weights = state(config, dtype, device)

    def text(rows: int, length: int) -> Condition:
        seq = torch.randn(rows, length, args.text_dim).to(device=device, dtype=dtype)
        return Condition(seq=seq, mask=torch.ones(rows, length, dtype=torch.bool, device=device))

    shape, seeds = (config.latent_channels, args.size, args.size), tuple(range(args.batch))
    task = Task(shape, seeds, args.steps, text(args.batch, args.text), text(1, 1), device)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if args.cpu_time else time.perf_counter()

    draws = contenders(task, config, weights)
    pictures = {key: draw() for key, draw in draws.items()}
    timed = interleaved({"|".join(key): draw for key, draw in draws.items()}, args.repeats, clock)
    ms = {key: 1e3 * median(timed["|".join(key)]) / args.steps for key in draws}
    lines = []
    for name, mode in draws:
        base = ("diffusers", mode)
        change = float((pictures[name, mode] - pictures[base]).abs().max())
        lines.append(Line(name, mode, ms[name, mode], ms[base] / ms[name, mode], change))
    model = from_tensors(weights, config)
    tokens = (args.size // config.patch[1]) ** 2
    return Result(
        lines,
        sum(p.numel() for p in model.parameters()) / 1e6,
        tokens,
        arithmetic(model, tokens, args.batch, args.text),
        matmul_rate(dtype, device, clock, 256 if args.quick else 2048),
    )


def show(args: argparse.Namespace, result: Result) -> None:
    """Print the markdown table."""
    print(
        f"Next-DiT of {result.parameters:.1f} M parameters (dim {args.dim}, {args.layers} layers), {args.batch} x "
        f"{result.tokens} tokens, text of {args.text}; {args.steps} Euler steps, guidance {SCALE:g}, {args.dtype} on "
        f"{args.device}, {args.threads} threads, medians of {args.repeats}.\n"
    )
    print("| contender | guidance | ms a step | times diffusers | of the floor | largest difference |")
    print("|---|---|---:|---:|---:|---:|")
    for x in result.lines:
        print(
            f"| {x.contender} | {x.guidance} | {x.ms:.1f} | {x.ratio:.2f} | {result.floor_ms / x.ms:.0%} "
            f"| {x.difference:.1e} |"
        )
    floor = f"floor: {result.gflop:.1f} GFLOP a step at {result.gflop_s:.0f} GFLOP/s"
    print(f"| {floor} | | {result.floor_ms:.1f} | | | |")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--text-dim", type=int, default=576)
    parser.add_argument("--text", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count only the seconds in which the process ran")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main() -> None:
    """Measure and print a markdown table."""
    args = parse()
    torch.set_num_threads(args.threads)
    result = measure(args)
    if args.json:
        print(json.dumps(asdict(result) | {"floor_ms": result.floor_ms}))
        return
    show(args, result)


if __name__ == "__main__":
    main()
