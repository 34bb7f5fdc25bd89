"""The one entry of sampling: right, repeatable, independent of the batch, invertible, and loud."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from accessory import config
from accessory.diffusion.batch import Noise, StepEvent
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Latents
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Ancestral, Ode, SamplerSettings, Scheduled, invert, likelihood, sample
from accessory.diffusion.schedule import make_scheduler
from accessory.diffusion.solvers import Sde
from accessory.diffusion.time_grid import Grid
from accessory.diffusion.transport import Transport
from tests.unit.diffusion.gaussian import SPREAD, Gaussian, told

SHAPE = (4, 3, 5)
MEANS, SEEDS = (0.75, -2.0, 1.5), (7, 8, 9)


def settings(solver: object = None, grid: Grid | None = None, scale: float | None = None) -> SamplerSettings:
    guidance = None if scale is None else Guidance(scale)
    return SamplerSettings(solver, grid or Grid(9), guidance)  # type: ignore[arg-type]


def network_for(how: SamplerSettings) -> Gaussian:
    if isinstance(how.solver, Ancestral):
        network = Gaussian("epsilon")
        network.tables = Ddpm().alphas_cumprod
    elif isinstance(how.solver, Scheduled) and not how.solver.name.startswith("Flow"):
        scheduler = make_scheduler(how.solver.name, how.solver.options)
        network = Gaussian("v" if scheduler.config.prediction_type == "v_prediction" else "epsilon")
        network.tables = scheduler.alphas_cumprod
    else:
        network = Gaussian(transport=how.transport)
    return network


def run(how: SamplerSettings, rows: Sequence[int] = (0, 1, 2), shape: object = SHAPE, **more: object) -> Latents:
    condition = told(*(MEANS[i] for i in rows))
    seeds = [SEEDS[i] for i in rows]
    null = told(0.0) if how.guidance is not None else None
    return sample(network_for(how), condition, null, shape=shape, seeds=seeds, settings=how, **more)  # type: ignore


def exact(rows: Sequence[int] = (0, 1, 2)) -> Tensor:
    z = Noise([SEEDS[i] for i in rows]).draw([SHAPE] * len(rows))
    return torch.stack([MEANS[i] + SPREAD * part for i, part in zip(rows, z, strict=True)])


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "heun3", "rk4", "dopri5", "dopri8"])
def test_the_flow_ends_where_it_must(method: str) -> None:
    found = run(settings(Ode(method=method, rtol=1e-5), Grid(41)))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    error = float((found - exact()).abs().max())
    assert error < {"euler": 0.1, "midpoint": 2e-3, "heun": 2e-3}.get(method, 1e-4)


def test_numbers_of_evaluations() -> None:
    counts = {}
    for method in ("euler", "midpoint", "heun", "rk4"):
        how = settings(Ode(method=method), Grid(10), 4.0)
        network = network_for(how)
        sample(network, told(*MEANS), told(0.0), shape=SHAPE, seeds=SEEDS, settings=how)
        assert set(network.asked) == {6}  # every evaluation is a doubled batch
        counts[method] = len(network.asked)
    assert counts == {"euler": 9, "midpoint": 18, "heun": 18, "rk4": 36}
    for method, most in (("dopri5", 60), ("dopri8", 80)):
        how = settings(Ode(method=method), scale=4.0)
        network = network_for(how)
        sample(network, told(*MEANS), told(0.0), shape=SHAPE, seeds=SEEDS, settings=how)
        assert 10 < len(network.asked) < most
        assert max(network.times) <= 1


@pytest.mark.parametrize(
    "solver", [Ode(method="euler"), Ancestral(), Scheduled(), Scheduled(name="FlowMatchEulerDiscreteScheduler")]
)
def test_the_interval_of_guidance_runs_from_noise_to_data(solver: Ode | Ancestral | Scheduled) -> None:
    how = SamplerSettings(solver, Grid(9), Guidance(3.0, interval=(0.6, 1.0)))
    network = network_for(how)
    sample(network, told(*MEANS), told(0.0), shape=SHAPE, seeds=SEEDS, settings=how)
    assert network.asked == sorted(network.asked)  # the condition alone first, then both
    assert 0.2 < network.asked.count(6) / len(network.asked) < 0.5


SOLVERS = [
    settings(Ode(method="midpoint"), scale=3.0),
    settings(Sde(), scale=3.0),
    settings(Sde(method="heun", form="linear")),
    settings(Ancestral(), scale=3.0),
    settings(Scheduled(name="DDIMScheduler"), scale=3.0),
    settings(Scheduled(name="EulerAncestralDiscreteScheduler")),
    settings(Scheduled(name="DPMSolverMultistepScheduler", options={"prediction_type": "v_prediction"})),
    settings(Scheduled(name="FlowMatchEulerDiscreteScheduler", options={"shift": 3.0}), scale=3.0),
]


@pytest.mark.parametrize("how", SOLVERS, ids=lambda how: f"{how.solver.kind}-{getattr(how.solver, 'name', '')}")
def test_a_picture_does_not_depend_on_its_batch(how: SamplerSettings) -> None:
    whole = run(how)
    for i in (0, 2):
        torch.testing.assert_close(whole[i], run(how, [i])[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(how, [2, 0])[0], whole[2], atol=1e-6, rtol=1e-6)
    # As a list, and as a list of unequal sizes.
    rows = run(how, shape=[SHAPE] * 3)
    assert isinstance(rows, list)
    torch.testing.assert_close(torch.stack(rows), whole, atol=1e-6, rtol=1e-6)
    unequal = run(how, shape=[SHAPE, (4, 6, 2), SHAPE])
    assert unequal[1].shape == (4, 6, 2)
    torch.testing.assert_close(unequal[2], whole[2], atol=1e-6, rtol=1e-6)
    assert torch.equal(run(how), whole)


def test_one_generator_for_a_batch_would_not_do() -> None:
    """The twin: with noise of one shared generator the second picture changes with what stands before it."""
    shared = torch.Generator().manual_seed(SEEDS[0])
    both = torch.randn(2, *SHAPE, generator=shared)
    alone = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(SEEDS[1]))
    how = settings()
    ends = [
        sample(network_for(how), told(*[MEANS[1]] * len(z)), shape=SHAPE, seeds=[0] * len(z), settings=how, initial=z)
        for z in (both, alone)
    ]
    assert (ends[0][1] - ends[1][0]).abs().max() > 0.5
    torch.testing.assert_close(run(how)[1], ends[1][0], atol=1e-6, rtol=1e-6)


def test_reverse_then_forward_returns() -> None:
    how = settings(Ode(method="rk4"), Grid(30), 2.0)
    data = exact()
    args = (told(*MEANS), told(0.0))
    noise = invert(Gaussian(), data, *args, settings=how)
    again = sample(Gaussian(), *args, shape=SHAPE, seeds=SEEDS, settings=how, initial=noise)
    torch.testing.assert_close(again, data, atol=1e-3, rtol=0)
    # It is the noise of the same prompt and guidance: with others the picture is another one.
    other = sample(Gaussian(), told(0.0, 0.0, 0.0), told(0.0), shape=SHAPE, seeds=SEEDS, settings=how, initial=noise)
    assert (other - data).abs().max() > 1
    # Half way, as a list, and with an adaptive solver.
    for solver in (Ode(method="rk4"), Ode(method="dopri5", rtol=1e-6)):
        half = settings(solver, Grid(30, start=0.4))
        seen: list[StepEvent] = []
        state = invert(Gaussian(), list(data), told(*MEANS), settings=half, on_step=seen.append)
        times = [event.t for event in seen]
        assert times == sorted(times, reverse=True)
        assert times[-1] == pytest.approx(0.4)
        z = Noise(SEEDS).draw([SHAPE] * 3)
        spread = math.sqrt(0.16 * SPREAD**2 + 0.36)
        torch.testing.assert_close(state[0], 0.4 * MEANS[0] + spread * z[0], atol=2e-3, rtol=0)
        back = sample(Gaussian(), told(*MEANS), shape=[SHAPE] * 3, seeds=SEEDS, settings=half, initial=state)
        torch.testing.assert_close(torch.stack(list(back)), data, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="only a flow can be inverted"):
        invert(Gaussian(), data, told(*MEANS), settings=settings(Sde()))


FLOW = settings(Scheduled(name="FlowMatchEulerDiscreteScheduler"))


@pytest.mark.parametrize(
    "how", [settings(), settings(Ancestral()), settings(Scheduled()), FLOW], ids=["ode", "ddpm", "ddim", "flow"]
)
def test_image_to_image(how: SamplerSettings) -> None:
    """Strength 0 gives the source back, 1 does not know it, and between the two it is kept less and less."""
    source = torch.full((3, *SHAPE), 3.0)
    network = network_for(how)

    def at(strength: float) -> Tensor:
        part = SamplerSettings(how.solver, Grid(40, strength=strength), None)
        out = sample(network, told(*MEANS), shape=SHAPE, seeds=SEEDS, settings=part, source=source)
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(at(0.0), source)
    away = [float((at(strength) - source).abs().mean()) for strength in (0.2, 0.5, 0.8)]
    assert 0.05 < away[0] < away[1] < away[2]
    whole = sample(
        network, told(*MEANS), shape=SHAPE, seeds=SEEDS, settings=SamplerSettings(how.solver, Grid(40), None)
    )
    torch.testing.assert_close(at(1.0), whole, atol=0.1, rtol=0)


def test_every_step_is_told_and_may_end_it() -> None:
    for how, count in ((SOLVERS[0], 8), (SOLVERS[1], 9), (SOLVERS[3], 9), (SOLVERS[4], 9)):
        seen: list[StepEvent] = []
        end = run(how, on_step=seen.append)
        assert [(event.step, event.steps) for event in seen] == [(i + 1, count) for i in range(count)]
        assert torch.equal(torch.as_tensor(seen[-1].latents), torch.as_tensor(end))

    class StopError(Exception):
        pass

    def stop(event: StepEvent) -> None:
        if event.step == 3:
            raise StopError

    with pytest.raises(StopError):
        run(SOLVERS[0], on_step=stop)


@pytest.mark.parametrize("how", SOLVERS[:5], ids=lambda how: how.solver.kind)
def test_nan_names_the_step(how: SamplerSettings) -> None:
    class Broken(Gaussian):
        def one(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
            return super().one(x, t, mean) * (math.nan if len(self.asked) > 4 else 1)

    network = Broken(network_for(how).prediction)
    network.tables = Ddpm().alphas_cumprod
    with pytest.raises(ValueError, match=r"latents are not finite after step \d of \d \(t = "):
        sample(network, told(*MEANS), told(0.0), shape=SHAPE, seeds=SEEDS, settings=how)


def test_the_state_stays_in_fp32() -> None:
    """A network in bf16 with a constant velocity: the sum of a thousand small steps is one, in bf16 it would stand."""

    class One(torch.nn.Module):
        prediction, latent_channels = "flow", 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
            assert x.dtype == torch.bfloat16
            return torch.ones_like(x) * self.weight

    how = settings(Ode(method="euler"), Grid(1001))
    end = sample(One(), told(*MEANS), shape=SHAPE, seeds=SEEDS, settings=how)
    z = torch.stack(Noise(SEEDS).draw([SHAPE] * 3))
    torch.testing.assert_close(end, z + 1, atol=1e-4, rtol=0)
    lost = z.bfloat16()
    for _ in range(1000):
        lost = lost + torch.tensor(0.001, dtype=torch.bfloat16)
    assert (lost.float() - z - 1).abs().max() > 0.3


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("as_list", [False, True])
def test_likelihood_of_the_gaussian(method: str, as_list: bool) -> None:
    data = exact()
    how = settings(Ode(method=method, rtol=1e-6), Grid(60))
    rows: Latents = [data[0], data[1][:, :2], data[2]] if as_list else data
    found = likelihood(Gaussian(), rows, told(*MEANS), seeds=SEEDS, settings=how)
    normal = [torch.distributions.Normal(mean, SPREAD) for mean in MEANS]
    expected = torch.stack([n.log_prob(row).sum() for n, row in zip(normal, rows, strict=True)])
    # Every element moves by itself, so that one probe gives the divergence exactly.
    torch.testing.assert_close(found.log_p, expected, atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(found.noise[0], Noise(SEEDS).draw([SHAPE] * 3)[0], atol=2e-3, rtol=0)
    wrong = likelihood(Gaussian(), rows, told(*(m + 1 for m in MEANS)), seeds=SEEDS, settings=how)
    assert (wrong.log_p < found.log_p - 20).all()


@pytest.mark.parametrize(
    ("how", "more", "words"),
    [
        (settings(Ancestral()), {"network": Gaussian()}, "'ancestral' is not for a network that predicts 'flow'"),
        (settings(Ode()), {"network": Gaussian("epsilon")}, "'ode' is not for a network that predicts 'epsilon'"),
        (settings(), {"network": Gaussian("v")}, "predicts v needs a solver"),
        (settings(Scheduled(), Grid(9, shift=3.0)), {}, "schedulers have options of their own"),
        (settings(Scheduled()), {"network": Gaussian("v")}, "set for 'epsilon', the network predicts 'v'"),
        (settings(Scheduled(name="DDIM")), {}, "no scheduler 'DDIM'"),
        (settings(Scheduled(name="DDIMScheduler", options={"beta": 1.0})), {}, "does not take beta"),
        (settings(grid=Grid(9, strength=0.5)), {}, "need a source"),
        (settings(), {"seeds": [1]}, "3 conditions, 3 shapes, 1 seeds"),
        (settings(), {"initial": torch.zeros(3, 4, 5, 3)}, r"initial has shapes .*\(4, 5, 3\)"),
        (settings(), {"initial": torch.zeros(3, *SHAPE), "source": torch.zeros(3, *SHAPE)}, "exclude each other"),
        (settings(Scheduled()), {"initial": torch.zeros(3, *SHAPE)}, "starts from noise or from a source"),
    ],
)
def test_what_does_not_fit_is_refused(how: SamplerSettings, more: dict[str, object], words: str) -> None:
    network = more.pop("network", None) or Gaussian("epsilon" if isinstance(how.solver, Scheduled) else "flow")
    args = {"shape": SHAPE, "seeds": SEEDS, "settings": how} | more
    with pytest.raises(ValueError, match=words):
        sample(network, told(*MEANS), **args)  # type: ignore[arg-type]


def test_settings_are_read_from_a_file() -> None:
    tree = config.parse(
        "solver: {kind: scheduled, name: DDIMScheduler, options: {prediction_type: v_prediction}}\n"
        "grid: {points: 20}\nguidance: {scale: 7.5, rescale: 0.7, interval: [0.1, 0.9]}"
    )
    built = config.build(tree, SamplerSettings)
    assert built.solver == Scheduled(options={"prediction_type": "v_prediction"})
    assert built.guidance == Guidance(7.5, rescale=0.7, interval=(0.1, 0.9))
    flow = config.build(config.parse("{solver: {kind: ode, method: rk4}, transport: {path: gvp}}"), SamplerSettings)
    assert flow == SamplerSettings(Ode(method="rk4"), transport=Transport("gvp"))
    with pytest.raises(config.ConfigError, match="shift"):
        config.build(config.parse("{grid: {shift: 0.0}}"), SamplerSettings)
