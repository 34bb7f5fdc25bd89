"""Whole trajectories of small networks: guided flows of Flag-DiT and Next-DiT, ancestral sampling of Large-DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from accessory.diffusion.condition import Condition
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.guidance import Guidance, Guided
from accessory.diffusion.sampler import Ode, SamplerSettings, sample
from accessory.diffusion.solvers import METHODS, adaptive
from accessory.diffusion.time_grid import Grid
from tools.conform.comparison import Comparison, Handler
from tools.conform.dit_common import IO, build, guided, left_over
from tools.conform.transport import Kept, as_tensor

CHANNELS = 3  # that the references guide


def flow_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Every solver, plain and beyond the trained resolution."""
    io = load_file(folder / "io.safetensors")
    model = build(load_file(folder / "weights.safetensors"), config["constructor"])
    text = Condition(seq=io.pop("in.cap_feats"), mask=io.pop("in.cap_mask").bool())
    z, k = io.pop("in.z"), config["extrapolate"]
    base = k["base_seqlen"] if k["proportional_attn"] else None
    wider = Steering(k.get("ntk_factor", 1.0), "ntk", base_tokens=base)
    if "scale_watershed" in k:
        wider = Steering(k["scale_factor"], "time_switch", k["scale_watershed"], base)
    for method in config["solvers"]:
        for name, steering in (("plain", None), ("extrapolate", wider)):
            one_flow(model, io, c, text, z, f"{method}.{name}", settings_of(config, method), steering)
    left_over(io, c)


def settings_of(config: dict[str, Any], method: str) -> SamplerSettings:
    """The settings of a case."""
    grid = Grid(config["points"], shift=config["time_shift"])
    return SamplerSettings(Ode(method=method, exact_end=False), grid, Guidance(config["cfg_scale"], CHANNELS))  # type: ignore[arg-type]


def one_flow(
    model: FlagDiT,
    io: IO,
    c: Comparison,
    text: Condition,
    z: torch.Tensor,
    name: str,
    settings: SamplerSettings,
    steering: Steering | None,
) -> None:
    """One trajectory and its end."""
    count = len(z)
    kept = Kept(z)
    end = sample(
        model, text[:count], text[count:], shape=tuple(z.shape[1:]), seeds=[0] * count, settings=settings,
        steering=steering, initial=z, on_step=kept,
    )  # fmt: skip
    assert isinstance(settings.solver, Ode)
    expected, states = io.pop(f"{name}.out.latents"), io.pop(f"{name}.mid.trajectory_first_half")
    if settings.solver.method in METHODS:
        c.tensor(f"{name}.trajectory", kept.stacked(), states)
        c.tensor(f"{name}.latents", as_tensor(end), expected)
        return
    # The reference integrates a second half that is never looked at, and chooses its steps by it too. With it our
    # solver gives the same numbers; without it, as we sample, the same to the solver's tolerance.
    scale = settings.guidance.scale if settings.guidance is not None else 1.0

    def doubled(t: float, x: Latents) -> Latents:
        return guided(model, as_tensor(x), torch.full((len(x),), t), text, scale, steering)

    times = settings.grid.times()
    found = [as_tensor(s)[:count] for s in adaptive(doubled, torch.cat([z, z]), times, "dopri5", exact_end=False)]
    c.tensor(f"{name}.trajectory", torch.stack(found), states)
    c.tensor(f"{name}.latents", found[-1], expected)
    apart = (as_tensor(end) - expected).abs().max() / expected.abs().max()
    c.equal(f"{name}.latents without the second half, to 2e-3", bool(apart < 2e-3), True)


def ancestral_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Guided ancestral sampling with the given noise of every step."""
    io = load_file(folder / "io.safetensors")
    weights = load_file(folder / "weights.safetensors")
    model = build(weights, config["constructor"], prediction="epsilon", keep_sigma=True)
    z, labels, drawn = io.pop("in.z"), io.pop("in.y_with_null"), io.pop("in.step_noise")
    count, kept = len(z), Kept()
    null, guidance = Condition(labels=labels[count:]), Guidance(config["cfg_scale"], CHANNELS)
    network = Guided(model, Condition(labels=labels[:count]), null, guidance)
    given = iter(drawn[:, :count])

    def shown(step: int, x: Latents) -> Latents:
        return network(x, torch.full((count,), step), 0.5)

    with torch.no_grad():
        end = Ddpm(respaced=config["respacing"]).sample(shown, z, lambda _: next(given), kept)
    # The reference carries a second half that never reaches the network.
    c.tensor("trajectory", kept.stacked(), io.pop("mid.trajectory")[:, :count])
    c.tensor("latents", as_tensor(end), io.pop("out.latents"))
    left_over(io, c)


HANDLERS: dict[str, Handler] = {
    "Flag-DiT T2I + transport Sampler": flow_case,
    "Next-DiT T2I (mini) + ODE": flow_case,
    "Large-DiT-ImageNet + SpacedDiffusion": ancestral_case,
}
"""By the reference class that the case was computed with."""
