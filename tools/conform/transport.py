"""Paths, losses, samplers, the DDPM process and the buckets: cases without a network of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.diffusion.batch import StepEvent
from accessory.diffusion.buckets import best_sizes, bucket_sizes, plan_crop
from accessory.diffusion.condition import Condition
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Latents, Prediction, Steering
from accessory.diffusion.objective import loss
from accessory.diffusion.sampler import Ode, SamplerSettings, likelihood
from accessory.diffusion.solvers import METHODS, Sde, adaptive, fixed, stochastic
from accessory.diffusion.time_grid import Grid
from accessory.diffusion.transport import TimeSampling, Transport
from tools.conform.comparison import Comparison, Handler

LOSSES, SAMPLERS = "transport of Next-DiT-ImageNet / Flag-DiT-ImageNet", "transport Sampler"
PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
FORMS = {"SBDM": "sbdm", "increasing-decreasing": "increasing_decreasing"}


def transport_of(path: str, target: str, weighting: str = "none", **eps: float) -> Transport:
    """A transport by the names of the case."""
    return Transport(PATHS[path], target, weighting, **eps)  # type: ignore[arg-type]


# --- Losses -----------------------------------------------------------------------------------------------------------


class Toy:
    """A network of one line: ``a x + b t + c sin(x)``."""

    prediction: Prediction = "flow"
    latent_channels = 3

    def __init__(self, a: float, b: float, c: float) -> None:
        self.a, self.b, self.c = a, b, c

    def one(self, x: Tensor, t: Tensor) -> Tensor:
        """For a batch and its times (B,)."""
        return self.a * x + self.b * t.reshape(-1, *[1] * (x.ndim - 1)) + self.c * torch.sin(x)

    def __call__(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        if isinstance(x, Tensor):
            return self.one(x, t)
        return [self.one(part[None], t[i : i + 1])[0] for i, part in enumerate(x)]


def losses_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Coefficients, targets, conversions, losses of every combination, a list, and the times of training."""
    io = load_file(folder / "io.safetensors")
    toy = Toy(*(config["toy_model"][name] for name in "abc"))
    x0, x1, t = (io.pop(f"in.{name}") for name in ("x0", "x1", "t"))
    nothing = Condition(labels=torch.zeros(len(t), dtype=torch.long))
    for name in PATHS:
        path = transport_of(name, "velocity")
        k = path.coefficients(t)
        for part in ("alpha", "sigma", "d_alpha", "d_sigma"):
            c.tensor(f"{name}.{part}", getattr(k, part), io.pop(f"{name}.{part}"))
        x, output = io.pop(f"{name}.xt"), io.pop(f"{name}.model_output")
        c.tensor(f"{name}.xt", as_tensor(path.interpolate(x1, x0, t)), x)
        c.tensor(f"{name}.ut", as_tensor(path.derivative(x1, x0, t)), io.pop(f"{name}.ut"))
        c.tensor(f"{name}.model_output", toy.one(x, t), output)
        c.tensor(f"{name}.drift_var", k.score_factor, io.pop(f"{name}.drift_var"))
        # The reference's mean is that of the reverse process, hence the sign.
        c.tensor(f"{name}.drift_mean", -k.rate.reshape(-1, 1, 1, 1) * x, io.pop(f"{name}.drift_mean"))
        conversions = {
            "score_from_velocity": path.score,
            "noise_from_velocity": path.noise,
            "velocity_from_score": transport_of(name, "score").velocity,
        }
        for conversion, convert in conversions.items():
            c.tensor(f"{name}.{conversion}", as_tensor(convert(output, x, t)), io.pop(f"{name}.{conversion}"))
    for combo in config["combos"]:
        name = combo["name"]
        path = transport_of(*name.split("."), train_eps=combo["train_eps"], sample_eps=combo["sample_eps"])
        x = path.interpolate(x1, x0, t)
        output = toy(x, t, nothing)
        losses = loss(toy, x1, nothing, noise=x0, t=t, process=path)
        c.tensor(f"{name}.loss_per_sample", losses, io.pop(f"{name}.out.loss_per_sample"))
        c.tensor(f"{name}.ode_drift", as_tensor(path.velocity(output, x, t)), io.pop(f"{name}.out.ode_drift"))
        c.tensor(f"{name}.score", as_tensor(path.score(output, x, t)), io.pop(f"{name}.out.score"))
        ends = {
            "interval_train": path.interval("train"),
            "interval_eval": path.interval("ode"),
            "interval_sde_mean": path.interval("sde", last_size=0.04),
            "interval_sde_sbdm": path.interval("sde", last_size=0.04, early=True),
        }
        c.equal(f"{name}.intervals", {n: rounded(v) for n, v in ends.items()}, {n: rounded(combo[n]) for n in ends})
    rows: dict[str, Latents] = {n: [io.pop(f"list.in.{n}.{i}") for i in (0, 1)] for n in ("x0", "x1")}
    ours = loss(toy, rows["x1"], nothing[:2], noise=rows["x0"], t=io.pop("list.in.t"))
    c.tensor("list.loss_per_image", ours, io.pop("list.out.loss_per_image"))
    times(io, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def times(io: dict[str, Tensor], c: Comparison) -> None:
    """Numbers drawn, as times of training."""
    normal, uniform = io.pop("time.in.normal"), io.pop("time.in.uniform")
    ends = {"VP_velocity": transport_of("VP", "velocity"), "noise_pred_eps1e-3": transport_of("Linear", "noise")}
    for key in [k for k in io if k.startswith("time.out.")]:
        name = key.removeprefix("time.out.")
        end = next((e for e in ends if name.endswith(e)), None)
        sampling = TimeSampling.parse(name.removesuffix(f"_{end}") if end else name)
        interval = ends[end].interval("train") if end else (0.0, 1.0)
        drawn = normal if sampling.kind == "lognorm" else uniform
        c.tensor(name, sampling.times(drawn, interval), io.pop(key))


def rounded(ends: Sequence[float]) -> list[float]:
    """Both ends of an interval, without the last bits."""
    return [round(float(end), 9) for end in ends]


def as_tensor(x: Latents) -> Tensor:
    """Latents that are one tensor."""
    assert isinstance(x, Tensor)
    return x


# --- Samplers ---------------------------------------------------------------------------------------------------------


class Field:
    """``x W^T (1 + cos(2 pi t) / 2) + b t + k tanh(x)``, as a network of a flow."""

    prediction: Prediction = "flow"
    latent_channels = 4

    def __init__(self, w: Tensor, b: Tensor, k: float) -> None:
        self.w, self.b, self.k, self.calls = w, b, k, 0

    def at(self, t: float, x: Latents) -> Latents:
        """The field at one time."""
        self.calls += 1
        x = as_tensor(x)
        return x @ self.w.T * (1 + 0.5 * math.cos(2 * math.pi * t)) + self.b * t + self.k * torch.tanh(x)

    def __call__(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        return self.at(float(t[0]), x)


class Kept:
    """All states of a sampler, for cases that hold them."""

    def __init__(self, *states: Latents) -> None:
        self.states = list(states)

    def __call__(self, event: StepEvent) -> None:
        self.states.append(event.latents)

    def stacked(self) -> Tensor:
        return torch.stack([as_tensor(s) for s in self.states])


def samplers_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Grids, trajectories of ODE and SDE, numbers of evaluations, and the likelihood."""
    io = load_file(folder / "io.safetensors")
    w, b, x = (io.pop(f"in.{name}") for name in ("W", "b", "x_init"))
    counted = {(row["method"], row.get("shift"), row.get("strength")): row["nfe"] for row in config["nfe"]}
    points = config["points"]
    for key in [k for k in io if k.endswith(".grid")]:
        name = key.removesuffix(".grid")
        grid, transport = grid_of(name, points)
        if name == "mini.sd3_shift3":
            c.tensor(key, torch.tensor(grid.sigmas()), io.pop(key))
            continue
        times = grid.times(transport.interval("ode"))
        c.tensor(key, torch.tensor(times), io.pop(key))
        for out in [k for k in io if k.startswith(f"{name}.") and k.endswith(".out.trajectory")]:
            method = out.split(".")[-3]
            small = name.count(".") == 2 and not name.startswith(("ode.shift", "mini"))
            field = Field(w * 0.3, b * 0.3, 0.1) if small else Field(w, b, config["k_ode"])
            c.tensor(out, trajectory(field, transport, x, times, method), io.pop(out))
            strength = grid.strength if name.startswith("mini") else None
            label = "mini midpoint shift 4" if name.startswith("mini") else method
            shift = None if name.startswith("mini") or name.endswith("None") else grid.shift
            if not small:
                c.equal(f"{out} evaluations", field.calls, counted[label, shift, strength])
    key = "mini.dopri5_default_tol.out.trajectory"
    field = Field(w, b, config["k_ode"])
    times = Grid(points).times()
    states = adaptive(field.at, x, times, "dopri5", rtol=1e-7, atol=1e-9, exact_end=False)
    c.equal(f"{key} evaluations", field.calls, counted["mini dopri5", None, None])
    c.tensor(key, torch.stack([as_tensor(s) for s in states]), io.pop(key))
    sde_trajectories(io, config, Field(w * 0.5, b * 0.5, 0.1), x, c)
    probe = io.pop("likelihood.in.probe_pm1")
    settings = SamplerSettings(Ode(method="euler"), Grid(points), None)
    whole = Field(w, b, config["k_ode"])
    nothing = Condition(labels=torch.zeros(len(x), dtype=torch.long))
    found = likelihood(whole, x, nothing, settings=settings, probe=probe)
    c.tensor("likelihood.latent", as_tensor(found.noise), io.pop("likelihood.euler.out.latent"))
    c.tensor("likelihood.logp", found.log_p, io.pop("likelihood.euler.out.logp"))
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def grid_of(name: str, points: int) -> tuple[Grid, Transport]:
    """The grid and the transport that a name of the case stands for."""
    if name == "mini.sd3_shift3":
        return Grid(points, shift=3.0), Transport()
    if name.startswith("mini.strength"):
        return Grid(points, shift=4.0, strength=float(name.removeprefix("mini.strength"))), Transport()
    if name.startswith("ode.shift"):
        shift = name.removeprefix("ode.shift")
        return Grid(points, shift=1.0 if shift == "None" else float(shift)), Transport()
    _, path, target = name.split(".")
    return Grid(points), transport_of(path, target)


def trajectory(field: Field, transport: Transport, x: Tensor, times: list[float], method: str) -> Tensor:
    """All states of an ODE, the first included."""

    def velocity(t: float, x: Latents) -> Latents:
        return transport.velocity(field.at(t, x), x, torch.tensor(t))

    if method in METHODS:
        kept = Kept(x)
        fixed(velocity, x, times, method, kept)  # type: ignore[arg-type]
        return kept.stacked()
    states = adaptive(velocity, x, times, method, exact_end=False)  # type: ignore[arg-type]
    return torch.stack([as_tensor(s) for s in states])


def sde_trajectories(io: dict[str, Tensor], config: dict[str, Any], field: Field, x: Tensor, c: Comparison) -> None:
    """Every form, solver and last step; the noise of every step is given."""
    noise = io.pop("sde.in.noise")
    for key in [k for k in io if k.startswith("sde.")]:
        _, path, target, form, method, last, *_ = key.split(".")
        eps = {"sample_eps": 0.04} if form == "SBDM" and target == "velocity" else {}
        transport = transport_of(path, target, **eps)
        sde = Sde(
            method=method.lower(),  # type: ignore[arg-type]
            form=FORMS.get(form, form),  # type: ignore[arg-type]
            norm=config["sde_diffusion_norm"],
            last_step=last.lower(),  # type: ignore[arg-type]
            last_size=config["sde_last_step_size"],
        )
        times = Grid(config["sde_points"]).times(sde.interval(transport))
        kept, given = Kept(), iter(noise)
        stochastic(field.at, x, times, sde, transport, lambda _, given=given: next(given), kept)
        if last == "None":
            kept.states.append(kept.states[-1])  # the reference lists the end twice
        c.tensor(key, kept.stacked(), io.pop(key))


# --- The process of Large-DiT -----------------------------------------------------------------------------------------


def ddpm_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Schedules, noised states, losses, posteriors and an ancestral trajectory."""
    io = load_file(folder / "io.safetensors")
    process, short = Ddpm(), Ddpm(respaced=int(config["respacing"]))
    c.tensor("betas", process.betas, io.pop("betas"))
    c.tensor("sqrt_alphas_cumprod", process.alphas_cumprod.sqrt(), io.pop("sqrt_alphas_cumprod"))
    c.tensor("respaced.betas", short.betas, io.pop("respaced.betas"))
    c.equal("respaced.timestep_map", short.step_map, io.pop("respaced.timestep_map").tolist())
    data, noise, t = io.pop("in.x0"), io.pop("in.noise"), io.pop("in.t")
    toy = Toy(config["toy_model"]["a"], config["toy_model"]["b"] / 1000, config["toy_model"]["c"])

    def model(t: Tensor, x: Tensor) -> Tensor:
        spread = t.reshape(-1, 1, 1, 1) / 1000
        return torch.cat([toy.one(x, t), 0.5 * torch.sin(2 * x + spread)], 1)

    state, output = io.pop("xt"), io.pop("model_output")
    c.tensor("xt", as_tensor(process.add_noise(data, noise, t)), state)
    c.tensor("model_output", model(t, state), output)
    losses = process.losses(output, data, noise, t)
    assert losses.bound is not None
    for name, ours in (("mse", losses.mse), ("vb", losses.bound), ("loss", losses.total)):
        c.tensor(f"train.{name}", ours, io.pop(f"train.out.{name}"))
    p = process.posterior(output, state, t.reshape(-1, 1, 1, 1))
    named = {"mean": p.mean, "log_variance": p.log_variance, "variance": p.log_variance.exp(), "pred_xstart": p.data}
    for name, ours in named.items():
        c.tensor(f"p.{name}", ours, io.pop(f"p.out.{name}"))
    given, kept = iter(io.pop("sample.in.step_noise")), Kept()
    start = io.pop("sample.in.z")
    short.sample(lambda step, x: model(torch.tensor([step]), as_tensor(x)), start, lambda _: next(given), kept)
    c.tensor("sample.trajectory", kept.stacked(), io.pop("sample.out.trajectory"))
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


# --- Buckets ----------------------------------------------------------------------------------------------------------


def buckets_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Lists of sizes, the best four of some pictures, and the steps to them; all exact."""
    for side, sizes in config["lists"].items():
        c.equal(f"sizes of {side}", [list(s) for s in bucket_sizes(int(side))], sizes)
    for name, expected in config["top4"].items():
        side, size = name.split(":")
        width, height = map(int, size.split("x"))
        best = best_sizes(width, height, bucket_sizes(int(side)))
        c.equal(f"best of {name}", [[share, list(size)] for share, size in best], expected)
        plans = [plan_crop(width, height, size) for _, size in best]
        ours = [
            [[list(s), "box"] for s in p.halved]
            + [[list(p.resized), "bicubic"], ["crop", list(p.box(lambda n: n // 3))]]
            for p in plans
        ]
        c.equal(f"crops of {name}", ours, config["crops"][name])


HANDLERS: dict[str, Handler] = {
    f"{LOSSES} (full) and lumina_next_t2i / mini (list + time types)": losses_case,
    f"{SAMPLERS} (lumina_next_t2i for shifted ODE, Next-DiT-ImageNet for SDE/likelihood, mini ODE)": samplers_case,
    "Large-DiT-ImageNet GaussianDiffusion / SpacedDiffusion": ddpm_case,
    "any-resolution crop helpers of lumina_next_t2i": buckets_case,
}
"""By the reference class that the case was computed with."""
