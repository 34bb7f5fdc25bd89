"""Solvers on a flow whose solution is known: order of convergence, exactness, the SDE's statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.diffusion.batch import Noise, StepEvent
from accessory.diffusion.denoiser import Latents
from accessory.diffusion.solvers import METHODS, Sde, adaptive, fixed, stochastic
from accessory.diffusion.time_grid import Grid
from accessory.diffusion.transport import Transport
from tests.unit.diffusion.gaussian import SPREAD, Gaussian, told

MEAN = 0.75


def field(path: str = "linear", target: str = "velocity") -> tuple[Gaussian, Transport]:
    transport = Transport(path, target)
    return Gaussian(transport=transport), transport


def velocity(network: Gaussian, transport: Transport) -> object:
    def model(t: float, x: Latents) -> Latents:
        at = torch.full((len(x),), t, dtype=x[0].dtype)
        return transport.velocity(network(x, at, told(*[MEAN] * len(x))), x, at)

    return model


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method: str) -> None:
    """The error falls with the power of the step that the method promises."""
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    # On the linear path, whose variance is a parabola, the midpoint's leading error vanishes.
    network, transport = field("gvp")
    c = transport.coefficients(torch.tensor(0.8, dtype=torch.float64))
    exact = c.alpha * MEAN + (c.alpha**2 * SPREAD**2 + c.sigma**2).sqrt() * z
    steps, errors = (16, 32, 64), []
    for n in steps:
        network.asked.clear()
        end = fixed(velocity(network, transport), z, [0.8 * t for t in Grid(n + 1).times()], method)
        errors.append(float((end - exact).abs().max()))
        assert len(network.asked) == n * len(METHODS[method].nodes)
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(ORDERS[method], abs=0.25)
    assert METHODS[method].order == ORDERS[method]


def test_order_is_not_the_same_for_all() -> None:
    """The twin: at equal evaluations the higher order wins by far on a smooth field."""
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    model = velocity(*field())
    ends = [fixed(model, z, Grid(n).times(), m) for m, n in (("euler", 121), ("midpoint", 61), ("rk4", 31))]
    errors = [float((end - MEAN - SPREAD * z).abs().max()) for end in ends]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("target", ["velocity", "score", "noise"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri8"])
def test_every_path_and_target_leads_to_the_data(path: str, target: str, method: str) -> None:
    network, transport = field(path, target)
    times = Grid(60).times(transport.interval("ode"))
    # A state of the path at the first time: not everywhere is that pure noise.
    c0, c1 = (transport.coefficients(torch.tensor(t, dtype=torch.float64)) for t in (times[0], times[-1]))
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    start, end = (c.alpha * MEAN + (c.alpha**2 * SPREAD**2 + c.sigma**2).sqrt() * z for c in (c0, c1))
    model = velocity(network, transport)
    if method == "rk4":
        found = fixed(model, start, times, "rk4")
    else:
        found = adaptive(model, start, [times[0], times[-1]], method, atol=1e-8, rtol=1e-8)[-1]
    assert isinstance(found, Tensor)
    # On the vp path everything happens close to t = 1, where its spread falls like the root of the time left.
    assert float((found - end).abs().max()) < (1e-2 if path == "vp" and method == "rk4" else 1e-4)
    assert float((start - end).abs().max()) > 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [Grid(5), Grid(8, shift=4.0), Grid(6, "sigmoid")])
def test_a_constant_field_adds_exactly_one(method: str, grid: Grid) -> None:
    z = torch.randn(2, 4, 3, 3)
    end = fixed(lambda t, x: torch.ones_like(x), z, grid.times(), method)
    torch.testing.assert_close(end, z + 1, atol=1e-6, rtol=0)
    back = fixed(lambda t, x: torch.ones_like(x), end, grid.times()[::-1], method)
    torch.testing.assert_close(back, z, atol=1e-6, rtol=0)


def test_lists_are_solved_like_batches() -> None:
    z = torch.randn(2, 4, 3, 3)
    model = velocity(*field())
    for solve in (
        lambda x: fixed(model, x, Grid(5).times(), "rk4"),
        lambda x: adaptive(model, x, [0.0, 1.0], "dopri5")[-1],
    ):
        whole, rows = solve(z), solve([z[0], z[1]])
        assert isinstance(rows, list)
        torch.testing.assert_close(whole, torch.stack(rows), atol=1e-6, rtol=1e-6)


def test_adaptive_solvers_tell_every_step_and_refuse_nan() -> None:
    seen: list[StepEvent] = []
    z = torch.randn(1, 4, 3, 3)
    adaptive(velocity(*field()), z, [0.0, 1.0], "dopri5", on_step=seen.append)
    assert [event.step for event in seen] == list(range(1, len(seen) + 1))
    assert len(seen) > 2
    assert seen[-1].t == 1
    assert [event.t for event in seen] == sorted(event.t for event in seen)
    assert {event.steps for event in seen} == {None}
    with pytest.raises(ValueError, match=r"slope is not finite after step \d+ \(t = 0\.[5-9]"):
        adaptive(lambda t, x: x * (float("nan") if t > 0.5 else 1), z, [0.0, 1.0], "dopri5")


@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_sde_draws_from_the_data(form: str, method: str) -> None:
    network, transport = Gaussian(), Transport(sample_eps=0.02)
    sde = Sde(method=method, form=form, last_size=0.005)  # that step has no noise, so it narrows what it moves
    x = torch.randn(1, 4, 30, 30, generator=torch.Generator().manual_seed(5))

    def model(t: float, x: Latents) -> Latents:
        return network(x, torch.full((len(x),), t), told(MEAN))

    times = Grid(120).times(sde.interval(transport))
    ends = [stochastic(model, x, times, sde, transport, Noise([seed])) for seed in (0, 1)]
    for end in ends:
        assert isinstance(end, Tensor)
        assert float(end.mean()) == pytest.approx(MEAN, abs=0.04)
        assert float(end.std()) == pytest.approx(SPREAD, abs=0.04)
    # The noise matters: without it the state is pulled to the mean, and two seeds part.
    still = stochastic(model, x, times, sde, transport, lambda x: torch.zeros_like(x))
    assert float(still.std()) < 0.75 * SPREAD
    assert float((ends[0] - ends[1]).abs().mean()) > 0.1


def test_last_steps_of_the_sde() -> None:
    network, transport = Gaussian(), Transport()
    x = torch.randn(1, 4, 8, 8)

    def model(t: float, x: Latents) -> Latents:
        return network(x, torch.full((len(x),), t), told(MEAN))

    ends, counts = {}, {}
    for last in ("none", "mean", "euler", "tweedie"):
        network.asked.clear()
        seen: list[StepEvent] = []
        sde = Sde(last_step=last, form="linear")
        ends[last] = stochastic(
            model, x, Grid(40).times(sde.interval(transport)), sde, transport, Noise([0]), seen.append
        )
        counts[last] = (len(network.asked), len(seen), round(seen[-1].t, 6))
    assert counts == {"none": (39, 39, 1.0), "mean": (40, 40, 1.0), "euler": (40, 40, 1.0), "tweedie": (40, 40, 1.0)}
    assert float((ends["mean"] - ends["euler"]).abs().max()) > 1e-4
    assert float((ends["mean"] - ends["tweedie"]).abs().max()) > 1e-4
    assert math.isclose(Sde().interval(transport)[1], 0.96)
    with pytest.raises(ValueError, match="sbdm is infinite at t = 0"):
        Sde(form="sbdm").interval(transport)
    with pytest.raises(ValueError, match="last_size"):
        Sde(last_size=0.0)
