"""Our sampling under diffusers' schedulers against their own plain loop, and our process against theirs."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from accessory.diffusion.batch import Noise
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Latents
from accessory.diffusion.sampler import SamplerSettings, Scheduled, sample
from accessory.diffusion.schedule import check_prediction, make_scheduler, predicts, scheduler_from
from accessory.diffusion.time_grid import Grid
from tests.unit.diffusion.gaussian import SPREAD, Gaussian, told

SHAPE = (4, 3, 5)
MEANS, SEEDS = (0.75, -2.0), (7, 8)
# How far the end may be from m + s z after 60 steps; None where noise is added on the way.
NAMES: dict[str, float | None] = {
    "DDIMScheduler": 0.1,
    "DDPMScheduler": None,
    "PNDMScheduler": 0.3,
    "EulerDiscreteScheduler": 0.15,
    "EulerAncestralDiscreteScheduler": None,
    "HeunDiscreteScheduler": 0.15,
    "DPMSolverMultistepScheduler": 0.15,
    "UniPCMultistepScheduler": 0.15,
}


def options(name: str, prediction: str) -> dict[str, Any]:
    clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    spacing = {} if name == "PNDMScheduler" else {"timestep_spacing": "linspace"}
    return {"prediction_type": prediction, "beta_start": 1e-4, "beta_end": 0.02, **clip, **spacing}


def plain_loop(scheduler: Any, network: Gaussian, steps: int) -> Tensor:
    """What a user of diffusers writes, for the second picture alone."""
    generator = torch.Generator().manual_seed(SEEDS[1])
    scheduler.set_timesteps(steps)
    x = torch.randn(1, *SHAPE, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        out = network(shown, t.reshape(1), told(MEANS[1]))
        try:
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        except TypeError:
            x = scheduler.step(out, t, x).prev_sample
    return x[0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plain_loop_of_diffusers(name: str, prediction: str) -> None:
    chosen = options(name, prediction)
    network = Gaussian("v" if prediction == "v_prediction" else "epsilon")
    network.tables = getattr(diffusers, name)(**chosen).alphas_cumprod
    settings = SamplerSettings(Scheduled(name=name, options=chosen), Grid(60), None)
    found = sample(network, told(*MEANS), shape=SHAPE, seeds=SEEDS, settings=settings)
    torch.testing.assert_close(
        found[1], plain_loop(getattr(diffusers, name)(**chosen), network, 60), atol=1e-5, rtol=1e-5
    )
    z = Noise(SEEDS).draw([SHAPE] * 2)
    exact = MEANS[1] + SPREAD * z[1]
    limit = NAMES[name]
    if limit is None:
        assert (found[1] - exact).abs().max() > 0.3
        assert abs(float(found[1].mean()) - MEANS[1]) < 0.3
    else:
        assert (found[1] - exact).abs().max() < limit


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_under_their_scheduler(shift: float) -> None:
    """Their sigma and sign, our time and sign: the same end, and the same times in the other convention."""
    network = Gaussian()
    solver = Scheduled(name="FlowMatchEulerDiscreteScheduler", options={"shift": shift})
    found = sample(network, told(*MEANS), shape=SHAPE, seeds=SEEDS, settings=SamplerSettings(solver, Grid(200), None))
    z = torch.stack(Noise(SEEDS).draw([SHAPE] * 2))
    exact = torch.tensor(MEANS).reshape(2, 1, 1, 1) + SPREAD * z
    assert (torch.as_tensor(found) - exact).abs().max() < 0.05
    assert network.times == sorted(network.times)
    assert network.times[0] == pytest.approx(0, abs=1e-6)
    middle = network.times[100]
    assert middle == pytest.approx(1 - Grid(201, shift=shift).sigmas()[100], abs=0.01)


def test_our_process_is_theirs() -> None:
    torch.manual_seed(3)
    weight = torch.randn(8, 4) * 0.3

    def network(step: Tensor | int, x: Tensor) -> Tensor:
        out = torch.einsum("oc,bchw->bohw", weight, x) * (1 + float(step) / 1000)
        return torch.cat([out[:, :4], out[:, 4:].tanh()], 1)

    process = Ddpm(respaced=20)
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False)
    theirs.set_timesteps(timesteps=process.step_map[::-1])
    x = torch.randn(1, *SHAPE)

    def model(step: int, x: Latents) -> Latents:
        assert isinstance(x, Tensor)
        return network(step, x)

    ours = process.sample(model, x, Noise([5]))
    generator = torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        x = theirs.step(network(t, x), int(t), x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-3)


def test_what_schedulers_take() -> None:
    assert predicts(make_scheduler("FlowMatchEulerDiscreteScheduler")) == "flow"
    assert predicts(make_scheduler("DPMSolverMultistepScheduler", {"use_flow_sigmas": True})) == "flow"
    stored = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction", "beta_end": 0.012, "steps_offset": 1}
    same = scheduler_from(stored)
    other = scheduler_from(stored, "DDIMScheduler")
    assert (type(same).__name__, type(other).__name__) == ("PNDMScheduler", "DDIMScheduler")
    assert other.config.beta_end == 0.012
    check_prediction(other, "v")
    with pytest.raises(ValueError, match="set for 'v', the network predicts 'epsilon'"):
        check_prediction(other, "epsilon")
    with pytest.raises(ValueError, match="no _class_name"):
        scheduler_from({"beta_end": 0.012})
    with pytest.raises(ValueError, match="has no scheduler 'UNet2DModel'"):
        make_scheduler("UNet2DModel")
