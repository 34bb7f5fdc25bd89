"""From noise to latents: the one entry of sampling, its inverse, and the likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from accessory.diffusion import schedule as schedules
from accessory.diffusion.batch import Model, Noise, OnStep, Shape, device_of, moved
from accessory.diffusion.condition import Condition
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Denoiser, Latents, Steering
from accessory.diffusion.guidance import Guidance, Guided
from accessory.diffusion.solvers import METHODS, AdaptiveMethod, FixedMethod, Sde, adaptive, fixed, stochastic
from accessory.diffusion.time_grid import Grid
from accessory.diffusion.transport import Transport


@dataclass(frozen=True)
class Ode:
    """The probability flow. Evaluations of N points: N - 1 times 1 (euler), 2 (midpoint, heun), 3 (heun3), 4 (rk4).

    ``dopri5`` and ``dopri8`` choose their steps for the whole batch at once, so with them alone a picture depends a
    little on what it is sampled with; ``atol``, ``rtol`` and ``exact_end`` (see ``solvers.adaptive``) are theirs.
    """

    kind: Literal["ode"] = "ode"
    method: FixedMethod | AdaptiveMethod = "midpoint"
    atol: float = 1e-6
    rtol: float = 1e-3
    exact_end: bool = True


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling of Large-DiT's process, on as many steps as the grid has points."""

    kind: Literal["ancestral"] = "ancestral"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass(frozen=True)
class Scheduled:
    """Any scheduler of diffusers, on as many steps as the grid has points.

    Attributes:
        name: of its class.
        options: of its constructor; ``prediction_type`` must say what the network predicts.
    """

    kind: Literal["scheduled"] = "scheduled"
    name: str = "DDIMScheduler"
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplerSettings:
    """How latents are made.

    Attributes:
        solver: None takes ``Ode()`` for flows and ``Ancestral()`` for epsilon; v has no default.
        grid: the times; schedulers of steps take its number of points and its strength alone.
        guidance: None for the condition alone.
        transport: what path a flow network was trained on, and what it predicts.
    """

    solver: Ode | Sde | Ancestral | Scheduled | None = None
    grid: Grid = field(default_factory=Grid)
    guidance: Guidance | None = field(default_factory=Guidance)
    transport: Transport = field(default_factory=Transport)

    @property
    def steps(self) -> int:
        """Of the solver: schedulers take one at each point of the grid, all others go from point to point."""
        return self.grid.points - (not isinstance(self.solver, Ancestral | Scheduled))

    @property
    def scale(self) -> float:
        """Of the guidance; 1 where there is none."""
        return 1.0 if self.guidance is None else self.guidance.scale


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition | None = None,
    *,
    shape: Shape | Sequence[Shape],
    seeds: Sequence[int],
    settings: SamplerSettings = SamplerSettings(),
    steering: Steering | None = None,
    on_step: OnStep | None = None,
    source: Latents | None = None,
    initial: Latents | None = None,
) -> Latents:
    """Latents of B pictures, in fp32, where the condition lies.

    A picture depends on its seed, condition and settings, not on what is sampled beside it (but see :class:`Ode`).

    Args:
        condition, null: of B pictures; ``null`` may be one row, and is needed where guidance acts.
        shape: (C, ...) of every picture, which gives one tensor; or one shape a picture, which gives a list.
        seeds: one a picture.
        on_step: told after every step; what it raises ends the sampling.
        source: pictures to start from (image to image), mixed with noise for the grid's first time: strength 1 and
            start 0 leave nothing of them.
        initial: the state at the grid's first time, instead of noise; what :func:`invert` returns, for instance.

    Raises:
        ValueError: for settings that do not fit the denoiser, wrong numbers of pictures, or latents that are not
            finite, naming the step.
    """
    device = next(iter(condition.parts().values())).device
    solver = settings.solver if settings.solver is not None else _default_solver(denoiser)
    _check(denoiser, settings, solver, source, initial)
    noise = Noise(seeds)
    drawn = _start(shape, noise, len(condition), device)
    guided = Guided(denoiser, condition, null, settings.guidance, steering)
    _same_layout(drawn, source=source, initial=initial)
    source = moved(source, device, torch.float32) if source is not None else None
    initial = moved(initial, device, torch.float32) if initial is not None else None
    if isinstance(solver, Ancestral | Scheduled):
        return _by_steps(guided, drawn, noise, settings.grid, solver, source, initial, on_step)
    return _by_time(guided, drawn, noise, settings, solver, source, initial, on_step)


def _default_solver(denoiser: Denoiser) -> Ode | Ancestral:
    if denoiser.prediction == "v":
        raise ValueError("a network that predicts v needs a solver: Scheduled with the scheduler that it was made for")
    return Ode() if denoiser.prediction == "flow" else Ancestral()


def _check(
    denoiser: Denoiser,
    settings: SamplerSettings,
    solver: Ode | Sde | Ancestral | Scheduled,
    source: Latents | None,
    initial: Latents | None,
) -> None:
    grid, predicts = settings.grid, denoiser.prediction
    wanted = {"ode": "flow", "sde": "flow", "ancestral": "epsilon"}.get(solver.kind, predicts)
    if predicts != wanted:
        raise ValueError(f"the solver {solver.kind!r} is not for a network that predicts {predicts!r}")
    if isinstance(solver, Ancestral | Scheduled) and (grid.shift != 1 or grid.kind != "shifted" or grid.start):
        raise ValueError(
            "shift, sigmoid and start of the grid are for ode and sde; schedulers have options of their own"
        )
    if isinstance(solver, Scheduled) and initial is not None:
        raise ValueError("a scheduler of diffusers starts from noise or from a source, not from a state")
    if source is not None and initial is not None:
        raise ValueError("source (a picture that gets noise) and initial (a state) exclude each other")
    if source is None and initial is None and not grid.whole:
        raise ValueError(f"strength {grid.strength} and start {grid.start} need a source or an initial state")


def _start(shape: Shape | Sequence[Shape], noise: Noise, count: int, device: torch.device) -> Latents:
    single = isinstance(shape[0], int)
    shapes = [cast(Shape, shape)] * count if single else list(cast(Sequence[Shape], shape))
    if not len(shapes) == len(noise.generators) == count:
        raise ValueError(f"{count} conditions, {len(shapes)} shapes, {len(noise.generators)} seeds: one each a picture")
    drawn = [part.to(device) for part in noise.draw(shapes)]
    return torch.stack(drawn) if single else drawn


def _same_layout(drawn: Latents, **given: Latents | None) -> None:
    for name, latents in given.items():
        if latents is not None and [part.shape for part in latents] != [part.shape for part in drawn]:
            shapes = [tuple(part.shape) for part in latents], [tuple(part.shape) for part in drawn]
            raise ValueError(f"{name} has shapes {shapes[0]}, the pictures are {shapes[1]}")


def _network(guided: Guided) -> Model:
    """The guided output at one time of a flow."""

    def model(t: float, x: Latents) -> Latents:
        return guided(x, torch.full((len(x),), t, dtype=torch.float32, device=device_of(x)), t)

    return model


def _velocity(guided: Guided, transport: Transport) -> Model:
    network = _network(guided)

    def model(t: float, x: Latents) -> Latents:
        return transport.velocity(network(t, x), x, torch.tensor(t, dtype=torch.float32))

    return model


def _by_time(
    guided: Guided,
    drawn: Latents,
    noise: Noise,
    settings: SamplerSettings,
    solver: Ode | Sde,
    source: Latents | None,
    initial: Latents | None,
    on_step: OnStep | None,
) -> Latents:
    transport = settings.transport
    interval = solver.interval(transport) if isinstance(solver, Sde) else transport.interval("ode")
    times = settings.grid.times(interval)
    if len(times) < 2:
        return initial if initial is not None else cast(Latents, source)
    x = drawn if initial is None else initial
    if source is not None:
        x = transport.interpolate(source, drawn, torch.tensor(times[0], dtype=torch.float32))
    if isinstance(solver, Sde):
        return stochastic(_network(guided), x, times, solver, transport, noise, on_step)
    return _flow(_velocity(guided, transport), x, times, solver, on_step)


def _flow(model: Model, x: Latents, times: Sequence[float], solver: Ode, on_step: OnStep | None) -> Latents:
    if solver.method in METHODS:
        return fixed(model, x, times, cast(FixedMethod, solver.method), on_step)
    method, ends = cast(AdaptiveMethod, solver.method), [times[0], times[-1]]
    limits = {"atol": solver.atol, "rtol": solver.rtol}
    return adaptive(model, x, ends, method, **limits, exact_end=solver.exact_end, on_step=on_step)[-1]


def _by_steps(
    guided: Guided,
    drawn: Latents,
    noise: Noise,
    grid: Grid,
    solver: Ancestral | Scheduled,
    source: Latents | None,
    initial: Latents | None,
    on_step: OnStep | None,
) -> Latents:
    steps, skipped = grid.points, grid.skipped
    if skipped >= steps:
        return initial if initial is not None else cast(Latents, source)

    def rows(t: Tensor, x: Latents) -> Tensor:
        return t.to(device_of(x)).expand(len(x))

    if isinstance(solver, Ancestral):
        process = Ddpm(solver.steps, solver.beta_start, solver.beta_end, steps)
        x = drawn if initial is None else initial
        if source is not None:
            x = process.add_noise(source, drawn, torch.tensor(steps - 1 - skipped))
        last = solver.steps - 1

        def ancestral(step: int, x: Latents) -> Latents:
            return guided(x, rows(torch.tensor(step), x), 1 - step / last)

        return process.sample(ancestral, x, noise, on_step, skipped=skipped)
    scheduler = schedules.make_scheduler(solver.name, solver.options)
    schedules.check_prediction(scheduler, guided.denoiser.prediction)
    trained = scheduler.config.num_train_timesteps

    def scheduled(t: Tensor, x: Latents) -> Latents:
        return guided(x, rows(t, x), 1 - float(t) / trained)

    def flow(t: Tensor, x: Latents) -> Latents:
        return guided(x, rows(t.float(), x), float(t))

    model = schedules.flow_model(scheduler, flow) if guided.denoiser.prediction == "flow" else scheduled
    return schedules.run(scheduler, model, noise, drawn, steps=steps, skipped=skipped, source=source, on_step=on_step)


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    latents: Latents,
    condition: Condition,
    null: Condition | None = None,
    *,
    settings: SamplerSettings = SamplerSettings(),
    steering: Steering | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """From data back to the state at the grid's first time (noise, or ``start`` for editing): the ODE in reverse.

    The result is the ``initial`` of :func:`sample`, with the same settings and another condition for an edit.

    Raises:
        ValueError: for anything but a flow network under an ODE.
    """
    solver = settings.solver if settings.solver is not None else Ode()
    if not isinstance(solver, Ode) or denoiser.prediction != "flow":
        raise ValueError(f"only a flow can be inverted, by an ODE: {solver.kind!r}, {denoiser.prediction!r}")
    guided = Guided(denoiser, condition, null, settings.guidance, steering)
    times = settings.grid.times(settings.transport.interval("ode"))[::-1]
    x = moved(latents, next(iter(condition.parts().values())).device, torch.float32)
    return _flow(_velocity(guided, settings.transport), x, times, solver, on_step) if len(times) > 1 else x


@dataclass(frozen=True)
class Likelihood:
    """``log_p`` (B,) in nats over all elements of a picture, and the ``noise`` that the picture came from."""

    log_p: Tensor
    noise: Latents


def likelihood(
    denoiser: Denoiser,
    latents: Latents,
    condition: Condition,
    null: Condition | None = None,
    *,
    seeds: Sequence[int] = (),
    settings: SamplerSettings = SamplerSettings(solver=Ode(method="dopri5"), guidance=None),
    steering: Steering | None = None,
    probe: Latents | None = None,
) -> Likelihood:
    """Density of latents under the flow (Grathwohl et al. 2019): the divergence is estimated along the way to noise.

    Args:
        seeds: one a picture, for the probe.
        probe: of the layout of ``latents``, each element +1 or -1, instead of one from ``seeds``. It is held fixed on
            the way, so a run repeats and an adaptive solver can converge; average over seeds for less variance.

    Raises:
        ValueError: for anything but a flow network under an ODE over the whole grid.
    """
    solver = settings.solver if settings.solver is not None else Ode()
    if not isinstance(solver, Ode) or denoiser.prediction != "flow" or not settings.grid.whole:
        raise ValueError(f"the likelihood is of a flow under an ODE, whole: {solver.kind!r}, {denoiser.prediction!r}")
    if probe is None:
        probe = [torch.sign(part) for part in Noise(seeds).draw([tuple(part.shape) for part in latents])]
    field_of = _velocity(Guided(denoiser, condition, null, settings.guidance, steering), settings.transport)
    probes = [part.to(device_of(latents)) for part in probe]

    def augmented(t: float, state: Latents) -> Latents:
        with torch.enable_grad():
            x = [part.detach().requires_grad_() for part in state[:-1]]
            velocity = list(field_of(t, torch.stack(x) if isinstance(latents, Tensor) else x))
            grads = torch.autograd.grad(sum((v * p).sum() for v, p in zip(velocity, probes)), x)
        divergence = torch.stack([(g * p).sum() for g, p in zip(grads, probes)])
        # Time falls on the way to noise, and the sum is to grow by the divergence.
        return [*(v.detach() for v in velocity), -divergence]

    start = [part.float() for part in latents]
    times = settings.grid.times(settings.transport.interval("ode"))[::-1]
    *ends, total = _flow(augmented, [*start, start[0].new_zeros(len(start))], times, solver, None)
    prior = torch.stack([-0.5 * (part**2).sum() - 0.5 * part.numel() * math.log(2 * math.pi) for part in ends])
    return Likelihood(prior - total, torch.stack(ends) if isinstance(latents, Tensor) else ends)
