"""Networks that predict noise, v, or a flow, under the schedulers of diffusers: targets of training, and sampling.

diffusers is imported when a scheduler is made, not before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.diffusion.batch import Noise, OnStep, device_of, each, means, report
from accessory.diffusion.denoiser import Latents, Prediction

StepModel = Callable[[Tensor, Latents], Latents]
"""Gives the output for a scheduler's timestep (one number) and the state."""


def make_scheduler(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A scheduler of diffusers by its class name, ``DDIMScheduler`` for instance.

    Raises:
        ValueError: for a name that diffusers does not have, or options that the class does not take.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {name!r}; names are those of its classes, such as DDIMScheduler")
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ValueError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    return kind(**(options or {}))


def scheduler_from(config: Mapping[str, Any], name: str | None = None) -> Any:
    """A scheduler of the settings that came with a model (its scheduler_config.json), of another class if named.

    Raises:
        ValueError: when neither the settings nor ``name`` say which class.
    """
    which = name or config.get("_class_name")
    if which is None:
        raise ValueError("the scheduler's settings have no _class_name, and none was given")
    made = make_scheduler(which)
    return type(made).from_config(dict(config))


def predicts(scheduler: Any) -> str:
    """What a scheduler takes from the network: ``flow``, ``epsilon``, ``v`` or a name of diffusers' own."""
    config = scheduler.config
    if config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    named = config.get("prediction_type", "epsilon")
    return {"v_prediction": "v", "flow_prediction": "flow"}.get(named, named)


def check_prediction(scheduler: Any, prediction: Prediction) -> None:
    """Refuse a scheduler that would misread the network.

    Raises:
        ValueError: naming both predictions.
    """
    takes = predicts(scheduler)
    if takes != prediction:
        raise ValueError(f"{type(scheduler).__name__} is set for {takes!r}, the network predicts {prediction!r}")


# --- Training ---------------------------------------------------------------------------------------------------------


def add_noise(scheduler: Any, data: Latents, noise: Latents, step: Tensor) -> Latents:
    """The state at the steps (B,), as the scheduler mixes it."""

    def mix(step: Tensor, data: Tensor, noise: Tensor) -> Tensor:
        return scheduler.add_noise(data, noise, step.reshape(-1))

    return each(mix, step, data, noise)


def target(scheduler: Any, data: Latents, noise: Latents, step: Tensor, prediction: Prediction) -> Latents:
    """What the network should give: the noise, or v."""
    if prediction == "epsilon":
        return noise

    def velocity(step: Tensor, data: Tensor, noise: Tensor) -> Tensor:
        return scheduler.get_velocity(data, noise, step.reshape(-1))

    return each(velocity, step, data, noise)


def losses(
    scheduler: Any, output: Latents, data: Latents, noise: Latents, step: Tensor, prediction: Prediction
) -> Tensor:
    """(B,) squared error against :func:`target`, in fp32; channels of a learned variance are left out."""
    wanted = target(scheduler, data, noise, step, prediction)

    def squared(_: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        return (output[:, : wanted.shape[1]].float() - wanted) ** 2

    return means(each(squared, step, output, wanted))


# --- Sampling ---------------------------------------------------------------------------------------------------------


def run(
    scheduler: Any,
    model: StepModel,
    noise: Noise,
    x: Latents,
    *,
    steps: int,
    skipped: int = 0,
    source: Latents | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Sample under any scheduler of diffusers.

    Every picture has a scheduler of its own, with its own generator: a scheduler remembers earlier outputs, and
    unequal latents cannot share that memory.

    Args:
        model: gives guided outputs in the scheduler's own convention (see :func:`flow_model` for flows).
        noise: generators of the pictures, for schedulers that add noise.
        x: normal noise to start from.
        steps: how many the scheduler is set to.
        skipped: how many are left out at the start; then ``source`` is what the noise is added to.

    Raises:
        ValueError: for a state that is not finite, naming the step.
    """
    plan = copy.deepcopy(scheduler)
    plan.set_timesteps(steps, device=device_of(x))
    first = skipped * getattr(plan, "order", 1)
    timesteps = plan.timesteps[first:]
    if source is None:
        rows = [part * getattr(plan, "init_noise_sigma", 1.0) for part in x]
    elif hasattr(plan, "scale_noise"):  # the name that flow schedulers have for it
        rows = [plan.scale_noise(s[None], timesteps[:1], n[None])[0] for s, n in zip(source, x)]
    else:
        rows = [plan.add_noise(s[None], n[None], timesteps[:1])[0] for s, n in zip(source, x)]
    own = [copy.deepcopy(plan) for _ in rows]
    drawing = "generator" in inspect.signature(plan.step).parameters
    learned = str(plan.config.get("variance_type", "")).startswith("learned")
    for number, t in enumerate(timesteps, 1):
        if hasattr(plan, "scale_model_input"):
            shown = [one.scale_model_input(row[None], t)[0] for one, row in zip(own, rows)]
        else:
            shown = rows
        output = model(t, _like(x, shown))
        for i, (one, row) in enumerate(zip(own, rows)):
            out = output[i] if learned else output[i][: row.shape[0]]
            options = {"generator": noise.generators[i]} if drawing else {}
            rows[i] = one.step(out[None], t, row[None], return_dict=False, **options)[0][0]
        report(_like(x, rows), number, len(timesteps), float(t), on_step)
    return _like(x, rows)


def _like(layout: Latents, rows: list[Tensor]) -> Latents:
    return torch.stack(rows) if isinstance(layout, Tensor) else list(rows)


def flow_model(scheduler: Any, velocity: StepModel) -> StepModel:
    """A flow network (t from noise to data, velocity data - noise) as diffusers' flow schedulers want it.

    Their timestep is sigma times the number of training steps, sigma = 1 - t, and their velocity points to the noise.
    """
    count = scheduler.config.num_train_timesteps

    def model(timestep: Tensor, x: Latents) -> Latents:
        output = velocity(1 - timestep / count, x)
        return -output if isinstance(output, Tensor) else [-part for part in output]

    return model
