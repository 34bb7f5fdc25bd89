"""The process of Large-DiT: where it leads, what its bound trains, how its steps are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.diffusion.batch import Noise
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Latents
from tests.unit.diffusion.gaussian import SPREAD, Gaussian, told


def test_the_steps_and_betas() -> None:
    whole, some = Ddpm(), Ddpm(respaced=250)
    assert whole.step_map == list(range(1000))
    assert float(whole.betas[0]) == pytest.approx(1e-4)
    assert float(whole.betas[-1]) == pytest.approx(0.02)
    assert (some.step_map[0], some.step_map[1], some.step_map[-1], len(some.step_map)) == (0, 4, 999, 250)
    torch.testing.assert_close(some.alphas_cumprod, whole.alphas_cumprod[some.step_map])
    for bad in (1, 1001):
        with pytest.raises(ValueError, match=f"respaced is {bad}"):
            Ddpm(respaced=bad)


def test_ancestral_sampling_draws_from_the_data() -> None:
    network = Gaussian("epsilon")
    network.tables = Ddpm().alphas_cumprod

    def model(step: int, x: Latents) -> Latents:
        return network(x, torch.full((len(x),), step), told(0.75))

    x = torch.randn(1, 4, 30, 30, generator=torch.Generator().manual_seed(5))
    ends = [Ddpm(respaced=250).sample(model, x, Noise([seed])) for seed in (0, 1)]
    for end in ends:
        assert isinstance(end, Tensor)
        assert float(end.mean()) == pytest.approx(0.75, abs=0.03)
        assert float(end.std()) == pytest.approx(SPREAD, abs=0.03)
    assert (ends[0] - ends[1]).abs().mean() > 0.1
    assert network.times[0] == 999
    assert network.times[-1] == 0


def test_the_learned_variance_lies_between_its_bounds() -> None:
    process = Ddpm(respaced=100)
    x, step = torch.randn(2, 4, 3, 3), torch.tensor(40)
    noise = torch.randn(2, 4, 3, 3)
    low, middle, high = (
        process.posterior(torch.cat([noise, torch.full_like(noise, v)], 1), x, step).log_variance
        for v in (-1.0, 0.0, 1.0)
    )
    torch.testing.assert_close(low, process.posterior_variance[40].log().float().expand_as(low))
    torch.testing.assert_close(high, process.betas[40].log().float().expand_as(high))
    torch.testing.assert_close(middle, (low + high) / 2)
    assert (high > low + 1e-3).all()
    torch.testing.assert_close(process.posterior(noise, x, step).log_variance, low)
    with pytest.raises(ValueError, match="12 channels for 4 latent ones"):
        process.posterior(torch.cat([noise] * 3, 1), x, step)


def test_the_bound_trains_the_variance_alone() -> None:
    process = Ddpm()
    data, noise = torch.randn(2, 3, 2, 4, 4).clamp(-1, 1)
    steps = torch.tensor([0, 300, 999])
    output = torch.randn(3, 4, 4, 4, requires_grad=True)
    losses = process.losses(output, data, noise, steps)
    assert losses.bound is not None
    (grad,) = torch.autograd.grad(losses.bound.sum(), output, retain_graph=True)
    assert not grad[:, :2].any()
    assert grad[:, 2:].abs().amax((1, 2, 3)).min() > 0
    (grad,) = torch.autograd.grad(losses.mse.sum(), output)
    assert not grad[:, 2:].any()
    torch.testing.assert_close(losses.total, losses.mse + losses.bound)
    rows = process.losses(list(output), list(data), list(noise), steps)
    torch.testing.assert_close(rows.total, losses.total)
    plain = process.losses(output[:, :2], data, noise, steps)
    assert plain.bound is None
    torch.testing.assert_close(plain.total, losses.mse)
