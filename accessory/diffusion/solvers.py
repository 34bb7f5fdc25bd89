"""Integrators: explicit Runge-Kutta methods on a grid, adaptive ones through torchdiffeq, and the SDE.

The state is fp32 and only the last one is kept; a network in bf16 is asked through ``model``, which converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from accessory.diffusion.batch import Model, OnStep, add, report
from accessory.diffusion.denoiser import Latents
from accessory.diffusion.transport import Transport

FixedMethod = Literal["euler", "midpoint", "heun", "heun3", "rk4"]
AdaptiveMethod = Literal["dopri5", "dopri8"]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i looks at ``nodes[i]`` of the step, ``rows[i]`` of earlier slopes on."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int


METHODS: dict[str, Tableau] = {
    "euler": Tableau((0,), ((),), (1,), 1),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1), 2),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2), 2),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4), 3),
    # Kutta's 3/8 rule, which torchdiffeq and with it Lumina call rk4.
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4
    ),
}  # fmt: skip


def fixed(
    model: Model, x: Latents, times: Sequence[float], method: FixedMethod, on_step: OnStep | None = None
) -> Latents:
    """Integrate ``dx/dt = model(t, x)`` over the times, which may rise or fall. Returns the last state.

    Raises:
        ValueError: for a state that is not finite, naming the step.
    """
    tableau = METHODS[method]
    for number, (t, after) in enumerate(pairwise(times), 1):
        step = after - t
        slopes: list[Latents] = []
        for node, row in zip(tableau.nodes, tableau.rows):
            at = add(x, *((step * a, slope) for a, slope in zip(row, slopes) if a))
            slopes.append(model(after if node == 1 else t + step * node, at))
        x = add(x, *((step * b, slope) for b, slope in zip(tableau.weights, slopes) if b))
        report(x, number, len(times) - 1, after, on_step)
    return x


def adaptive(
    model: Model,
    x: Latents,
    times: Sequence[float],
    method: AdaptiveMethod,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    exact_end: bool = True,
    on_step: OnStep | None = None,
) -> list[Latents]:
    """The same with steps that torchdiffeq chooses, one choice for the whole batch. Returns the states at the times.

    Args:
        exact_end: step onto the last time. Otherwise the last step goes beyond it, where the network is asked about a
            time that it has never seen, and the state is interpolated back; Lumina's samplers do so.

    Raises:
        ValueError: for a slope or a state that is not finite, naming the time or the step.
    """
    from torchdiffeq import odeint

    parts = [x] if isinstance(x, Tensor) else x
    sizes, single = [part.numel() for part in parts], isinstance(x, Tensor)

    def unpack(flat: Tensor) -> Latents:
        cut = [piece.reshape(part.shape) for piece, part in zip(flat.split(sizes), parts)]
        return cut[0] if single else cut

    def pack(latents: Latents) -> Tensor:
        return torch.cat([part.reshape(-1) for part in ([latents] if isinstance(latents, Tensor) else latents)])

    class Slope(torch.nn.Module):
        steps = 0

        def forward(self, t: Tensor, flat: Tensor) -> Tensor:
            slope = pack(model(float(t), unpack(flat)))
            if not bool(torch.isfinite(slope).all()):
                raise ValueError(f"the slope is not finite after step {self.steps} (t = {float(t):.4g})")
            return slope

        def callback_accept_step(self, t: Tensor, flat: Tensor, dt: Tensor) -> None:
            if self.steps:  # it is told the state before the step
                report(unpack(flat), self.steps, None, float(t), on_step)
            self.steps += 1

    grid = torch.tensor(list(times), dtype=torch.float32, device=parts[0].device)
    slope = Slope()
    options = {"step_t": grid[-1:]} if exact_end else {}
    states = [
        unpack(flat) for flat in odeint(slope, pack(x), grid, method=method, atol=atol, rtol=rtol, options=options)
    ]
    report(states[-1], slope.steps, None, times[-1], on_step)
    return states


# --- The SDE ----------------------------------------------------------------------------------------------------------

Form = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]


@dataclass(frozen=True)
class Sde:
    """The reverse SDE of SiT: drift ``velocity + w score``, noise ``sqrt(2 w dt)``.

    Attributes:
        method: ``euler`` (Euler-Maruyama) or ``heun`` (noise first, then a Heun step of the drift).
        form: w over time: ``constant``; ``sbdm``, the factor of the score in the velocity; ``sigma``; ``linear``,
            1 - t; ``decreasing``, (norm cos(pi t) + 1)^2 / 4; ``increasing_decreasing``, sin(pi t)^2.
        norm: factor of w (inside the square for ``decreasing``).
        last_step: how the last stretch to the data is taken, without noise: ``none``, ``mean`` (drift of the SDE),
            ``euler`` (velocity alone) or ``tweedie`` (the data that the state is thought to come from).
        last_size: length of that stretch.
    """

    kind: Literal["sde"] = "sde"
    method: Literal["euler", "heun"] = "euler"
    form: Form = "sigma"
    norm: float = 1.0
    last_step: Literal["none", "mean", "euler", "tweedie"] = "mean"
    last_size: float = 0.04

    def __post_init__(self) -> None:
        if not 0 < self.last_size < 0.5 or self.norm < 0:
            raise ValueError(f"last_size {self.last_size} must be in (0, 0.5), norm {self.norm} not below 0")

    def interval(self, transport: Transport) -> tuple[float, float]:
        """The times of the grid; the last step comes after it.

        Raises:
            ValueError: for a form or an end that divides by zero at the border of the interval.
        """
        last = 0.0 if self.last_step == "none" else self.last_size
        low, high = transport.interval("sde", last_size=last, early=self.form == "sbdm")
        if low == 0 and self.form == "sbdm" and transport.path != "vp":
            raise ValueError("the form sbdm is infinite at t = 0: give transport.sample_eps, for instance 0.04")
        return low, high

    def w(self, transport: Transport, t: float) -> float:
        """The diffusion at a time."""
        c = transport.coefficients(torch.tensor(t, dtype=torch.float64))
        if self.form == "decreasing":
            return 0.25 * (self.norm * math.cos(math.pi * t) + 1) ** 2
        shapes: dict[str, Callable[[], float]] = {
            "constant": lambda: 1.0,
            "sbdm": lambda: float(c.score_factor),
            "sigma": lambda: float(c.sigma),
            "linear": lambda: 1 - t,
            "increasing_decreasing": lambda: math.sin(math.pi * t) ** 2,
        }
        return self.norm * shapes[self.form]()


def stochastic(
    model: Model,
    x: Latents,
    times: Sequence[float],
    sde: Sde,
    transport: Transport,
    noise: Callable[[Latents], Latents],
    on_step: OnStep | None = None,
) -> Latents:
    """Integrate the SDE over rising times, then take its last step.

    Args:
        model: gives the network's output, of the transport's target.
        noise: gives fresh noise of the layout of its argument.

    Raises:
        ValueError: for a state that is not finite, naming the step.
    """

    def drift(t: float, x: Latents, w: float) -> Latents:
        output, at = model(t, x), torch.tensor(t, dtype=torch.float32)
        velocity = transport.velocity(output, x, at)
        return add(velocity, (w, transport.score(output, x, at))) if w else velocity

    steps = len(times) - (sde.last_step == "none")
    for number, (t, after) in enumerate(pairwise(times), 1):
        step, w = after - t, sde.w(transport, t)
        kick = (math.sqrt(2 * w * step), noise(x))
        if sde.method == "euler":
            x = add(x, (step, drift(t, x, w)), kick)
        else:
            x = add(x, kick)
            first = drift(t, x, w)
            second = drift(after, add(x, (step, first)), sde.w(transport, after))
            x = add(x, (step / 2, first), (step / 2, second))
        report(x, number, steps, after, on_step)
    if sde.last_step == "none":
        return x
    end = times[-1]
    if sde.last_step == "tweedie":
        x = transport.data(model(end, x), x, torch.tensor(end, dtype=torch.float32))
    else:
        x = add(x, (sde.last_size, drift(end, x, sde.w(transport, end) if sde.last_step == "mean" else 0.0)))
    report(x, steps, steps, end + sde.last_size, on_step)
    return x
