"""Paths, conversions between targets, losses, and how times are drawn."""

from __future__ import annotations

import pytest
import torch

from accessory.diffusion.batch import Noise, each, means
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.objective import draw_times, loss
from accessory.diffusion.schedule import make_scheduler
from accessory.diffusion.transport import TimeSampling, Transport
from tests.unit.diffusion.gaussian import SPREAD, Gaussian, told

PATHS = ("linear", "gvp", "vp")
TIMES = torch.tensor([0.1, 0.45, 0.9])


@pytest.mark.parametrize("path", [*PATHS, "noisy"])
def test_derivatives_are_those_of_the_coefficients(path: str) -> None:
    t = TIMES.double().requires_grad_()
    c = (Transport(min_noise=0.01) if path == "noisy" else Transport(path)).coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, slope)


@pytest.mark.parametrize("path", PATHS)
def test_every_target_says_the_same(path: str) -> None:
    """Velocity, score, noise and data of the best network agree, whichever it was trained to give."""
    x, means_ = torch.randn(3, 2, 4, 4, dtype=torch.float64), (0.5, -1.0, 2.0)
    t = TIMES.double()
    read = {}
    for target in ("velocity", "score", "noise"):
        transport = Transport(path, target)
        output = Gaussian(transport=transport)(x, t, told(*means_))
        read[target] = [f(output, x, t) for f in (transport.velocity, transport.score, transport.noise, transport.data)]
        # As a list of unequal pictures: the same numbers.
        rows = transport.score([output[0], output[1, :, :2]], [x[0], x[1, :, :2]], t[:2])
        torch.testing.assert_close(rows[1], read[target][1][1, :, :2])
    for target in ("score", "noise"):
        for ours, other in zip(read["velocity"], read[target], strict=True):
            torch.testing.assert_close(ours, other)
    c = Transport(path).coefficients(t[0])
    expected = 0.5 + c.alpha * SPREAD**2 * (x[0] - c.alpha * 0.5) / (c.alpha**2 * SPREAD**2 + c.sigma**2)
    torch.testing.assert_close(read["velocity"][3][0], expected)


def test_a_list_has_the_losses_of_a_batch() -> None:
    network, condition = Gaussian(), told(0.0, 1.0, -1.0)
    data, noise = torch.randn(2, 3, 4, 6, 6)
    whole = loss(network, data, condition, noise=noise, t=TIMES)
    rows = loss(network, list(data), condition, noise=list(noise), t=TIMES)
    torch.testing.assert_close(whole, rows)
    # Unequal sizes, and every picture as if it were alone: none weighs more because it is larger.
    some, other = [data[0], data[1, :, :2], data[2, :, :, :5]], [noise[0], noise[1, :, :2], noise[2, :, :, :5]]
    unequal = loss(network, some, condition, noise=other, t=TIMES)
    for i in range(3):
        alone = loss(network, some[i][None], condition[[i]], noise=other[i][None], t=TIMES[i : i + 1])
        torch.testing.assert_close(unequal[i : i + 1], alone)
    assert (unequal[1:] - whole[1:]).abs().min() > 1e-3
    wrong = loss(network, data, told(5.0, 5.0, 5.0), noise=noise, t=TIMES)
    assert (wrong > whole + 0.1).all()


@pytest.mark.parametrize("target", ["score", "noise"])
def test_weightings_are_factors(target: str) -> None:
    network = Gaussian(transport=Transport("gvp", target))
    data, noise = torch.randn(2, 3, 4, 5, 5)
    condition = told(0.0, 0.0, 0.0)
    c = Transport("gvp").coefficients(TIMES)
    plain, velocity, likelihood = (
        loss(network, data, condition, noise=noise, t=TIMES, process=Transport("gvp", target, weighting))
        for weighting in ("none", "velocity", "likelihood")
    )
    torch.testing.assert_close(velocity, plain * (c.score_factor / c.sigma) ** 2)
    torch.testing.assert_close(likelihood, plain * c.score_factor / c.sigma**2)
    with pytest.raises(ValueError, match=r"min_noise 0\.1 is for the linear path"):
        Transport("gvp", min_noise=0.1)
    with pytest.raises(ValueError, match="weighting 'velocity' is for the targets score and noise"):
        Transport(weighting="velocity")


def test_the_loss_of_noise_and_v() -> None:
    data, noise = torch.randn(2, 2, 4, 5, 5)
    steps = torch.tensor([10, 800])
    scheduler = make_scheduler("DDPMScheduler", {"prediction_type": "v_prediction"})
    kept = scheduler.alphas_cumprod[steps].reshape(2, 1, 1, 1)
    network = Gaussian("v")
    network.tables = scheduler.alphas_cumprod
    ours = loss(network, [data[0], data[1]], told(0.0, 0.0), noise=[noise[0], noise[1]], t=steps, process=scheduler)
    state = kept.sqrt() * data + (1 - kept).sqrt() * noise
    wanted = kept.sqrt() * noise - (1 - kept).sqrt() * data
    torch.testing.assert_close(ours, means((network(state, steps, told(0.0, 0.0)) - wanted) ** 2))
    with pytest.raises(ValueError, match="'v', the network predicts 'epsilon'"):
        loss(Gaussian("epsilon"), data, told(0.0, 0.0), noise=noise, t=steps, process=scheduler)
    with pytest.raises(ValueError, match="predicts 'flow' cannot be trained"):
        loss(Gaussian(), data, told(0.0, 0.0), noise=noise, t=steps, process=scheduler)
    with pytest.raises(ValueError, match="needs the scheduler"):
        loss(network, data, told(0.0, 0.0), noise=noise, t=steps)
    epsilon = Gaussian("epsilon")
    epsilon.tables = Ddpm().alphas_cumprod
    plain = make_scheduler("DDPMScheduler", {"beta_start": 1e-4, "beta_end": 0.02})
    same = [loss(epsilon, data, told(0.0, 0.0), noise=noise, t=steps, process=p) for p in (None, plain)]
    torch.testing.assert_close(same[0], same[1])


# --- Times ------------------------------------------------------------------------------------------------------------


def test_the_two_shifts_go_opposite_ways() -> None:
    u = torch.linspace(0.05, 0.95, 19)
    to_data = TimeSampling.parse("shift_3").times(u)
    to_noise = TimeSampling("shift_noise", k=3.0).times(u)
    assert (to_data > u).all()
    assert (to_noise < u).all()
    torch.testing.assert_close(TimeSampling("shift_data", k=1 / 3).times(u), to_noise)


def test_what_is_drawn() -> None:
    def drawn(name: str, seed: int = 0) -> torch.Tensor:
        return TimeSampling.parse(name).draw(4000, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn("uniform"), drawn("uniform"))
    assert not torch.equal(drawn("uniform"), drawn("uniform", 1))
    low, middle = drawn("uniform_0.2_0.9"), drawn("lognorm")
    assert 0.2 <= low.min() < 0.21
    assert 0.89 < low.max() <= 0.9
    assert abs(float(torch.logit(middle).std()) - 1) < 0.05
    assert float(((middle > 0.25) & (middle < 0.75)).float().mean()) > 0.7  # 0.5 of uniform ones
    narrow = draw_times(Transport(target="noise", train_eps=0.2), 4000, torch.Generator().manual_seed(0))
    assert 0.2 <= narrow.min() < 0.21
    assert 0.79 < narrow.max() <= 0.8
    steps = draw_times(Ddpm(), 4000, torch.Generator().manual_seed(0))
    assert steps.dtype == torch.long
    assert 0 <= int(steps.min()) < 5
    assert 995 < int(steps.max()) <= 999
    for bad in ("log", "uniform_0.9_0.2", "shift", "uniform_x_1", "shift_0"):
        with pytest.raises(ValueError, match=r"time sampling|lower first|above 0"):
            TimeSampling.parse(bad)


def test_noise_belongs_to_a_picture() -> None:
    first = Noise([3, 4])
    x = torch.zeros(2, 4, 3, 5)
    drawn = [first(x), first(x)]
    alone = Noise([4])
    again = [alone(x[:1]), alone([x[0]])]
    for both, single in zip(drawn, again, strict=True):
        assert torch.equal(both[1], single[0])
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="2 pictures and 1 seeds"):
        alone(x)
    assert isinstance(each(lambda t, a: a * t, torch.ones(2), [x[0], x[1]]), list)
