"""The loss of a denoiser, whatever it predicts: one number a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accessory.diffusion import schedule as schedules
from accessory.diffusion.batch import moved
from accessory.diffusion.condition import Condition
from accessory.diffusion.ddpm import Ddpm
from accessory.diffusion.denoiser import Denoiser, Latents, Steering
from accessory.diffusion.guidance import network_dtype
from accessory.diffusion.transport import TimeSampling, Transport

Process = Transport | Ddpm | Any
"""How data becomes noise: a :class:`Transport` for flows; :class:`Ddpm` or a scheduler of diffusers for steps."""


def loss(
    denoiser: Denoiser,
    data: Latents,
    condition: Condition,
    *,
    noise: Latents,
    t: Tensor,
    process: Process | None = None,
    steering: Steering | None = None,
) -> Tensor:
    """(B,) loss of every picture, in fp32. The mean over a batch weighs every picture the same, whatever its size.

    Args:
        data, noise: latents of one layout, in fp32; draw the noise of a picture from its own seed
            (:class:`~accessory.diffusion.batch.Noise`), never from the place in the batch.
        t: (B,) times in [0, 1] for flows, whole steps for epsilon and v.
        process: default: the linear path for flows; Large-DiT's process for epsilon. v needs one.

    Raises:
        ValueError: when the process does not fit what the denoiser predicts.
    """
    process = process if process is not None else _default(denoiser)
    if (denoiser.prediction == "flow") != isinstance(process, Transport):
        raise ValueError(f"a network that predicts {denoiser.prediction!r} cannot be trained on {process!r}")
    dtype = network_dtype(denoiser)
    told = condition.to(dtype=dtype)
    if isinstance(process, Transport):
        state = process.interpolate(data, noise, t)
        output = denoiser(moved(state, dtype=dtype), t, told, steering=steering)
        return process.losses(output, data, noise, t)
    if isinstance(process, Ddpm):
        if denoiser.prediction != "epsilon":
            raise ValueError(f"this process is for epsilon, the network predicts {denoiser.prediction!r}")
        state = process.add_noise(data, noise, t)
        shown = torch.tensor(process.step_map, device=t.device)[t]
        output = denoiser(moved(state, dtype=dtype), shown, told, steering=steering)
        return process.losses(output, data, noise, t).total
    schedules.check_prediction(process, denoiser.prediction)
    state = schedules.add_noise(process, data, noise, t)
    output = denoiser(moved(state, dtype=dtype), t, told, steering=steering)
    return schedules.losses(process, output, data, noise, t, denoiser.prediction)


def _default(denoiser: Denoiser) -> Process:
    if denoiser.prediction == "v":
        raise ValueError("a network that predicts v needs the scheduler that it was made for")
    return Transport() if denoiser.prediction == "flow" else Ddpm()


def draw_times(
    process: Process, count: int, generator: torch.Generator, sampling: TimeSampling | None = None
) -> Tensor:
    """(count,) times to train at, on the generator's device.

    Args:
        process: as for :func:`loss`.
        sampling: for flows; steps are always drawn evenly.

    Raises:
        ValueError: when ``sampling`` is given for a process of steps.
    """
    if isinstance(process, Transport):
        return (sampling or TimeSampling()).draw(count, generator, process.interval("train"))
    if sampling is not None:
        raise ValueError(f"steps are drawn evenly, {sampling!r} is for flows")
    steps = len(process.step_map) if isinstance(process, Ddpm) else process.config.num_train_timesteps
    return torch.randint(steps, (count,), generator=generator, device=generator.device)
