"""Rotary tables of one, two and three axes, and their stretching to sizes that were not trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.diffusion.denoiser import Steering
from accessory.nn.rope import frequencies

PLAIN = Steering()


def spectrum(
    width: int, axes: int, theta: float, time: Tensor, steering: Steering = PLAIN, trained_length: int = 128
) -> Tensor:
    """Angular frequencies (B or 1, A / (2 axes)) of each axis, fp32.

    ``linear`` divides them by s = ``rope_scale``; ``ntk`` multiplies the base by s, not by the power of s that the NTK
    argument asks for, as released; ``time_switch`` takes ``linear`` for times below the watershed and ``ntk`` from
    there on, each picture by its own time; ``frequency`` and ``time_smooth`` are Lumina-Next's (Zhuo et al. 2024, 3.2).

    Args:
        width: head width A.
        axes: positions that are rotated by.
        theta: base.
        time: (B,) times.
        steering: its rotary part is read.
        trained_length: L of ``frequency``.

    Raises:
        ValueError: for a scale that is not positive, or a trained length below 7.
    """
    part, scale, method = width // axes, steering.rope_scale, steering.rope_method
    plain = frequencies(part, theta, None, time.device)[0][None]
    if scale == 1.0:
        return plain
    if scale <= 0:
        raise ValueError(f"rope_scale must be positive, got {scale}")
    if method == "linear":
        return plain / scale
    if method == "frequency":
        if trained_length < 7:
            raise ValueError(
                f"frequency-aware scaling needs a trained length of 7 or more (2 pi), got {trained_length}"
            )
        target = width * math.log(trained_length / (2 * math.pi)) / math.log(theta)
        return frequencies(part, theta * scale ** (width / target), None, time.device)[0][None]
    if method == "time_smooth":
        # In logarithms: at time 0 the base is multiplied by scale ** A, which fp32 does not hold.
        raised = math.log(theta) + width / ((width - 1) * time.double() + 1) * math.log(scale)  # (B,)
        steps = torch.arange(0, part, 2, dtype=torch.float64, device=time.device) / part
        return torch.maximum((-steps * raised[:, None]).exp().float(), plain / scale)
    raised = frequencies(part, theta * scale, None, time.device)[0][None]
    if method == "ntk":
        return raised
    return torch.where((time < steering.watershed)[:, None], plain / scale, raised)


def rotary_table(positions: Tensor, spectrum: Tensor) -> Tensor:
    """Complex factors (B, T, A/2) of ``positions`` (R, T, axes); the axes take turns, pair by pair (h0, w0, h1...)."""
    # (R, T, 1, axes) * (B, 1, A / (2 axes), 1) -> (B, T, A/2)
    angle = (positions.float()[:, :, None] * spectrum[:, None, :, None]).flatten(-2)
    return torch.complex(angle.cos(), angle.sin())
