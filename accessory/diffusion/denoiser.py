"""The contract between what denoises and what samples, trains or serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from accessory.diffusion.condition import Condition

Latents = Tensor | list[Tensor]
"""A batch (B, C, ...spatial) of equal size, or a list of (C, ...spatial) of unequal ones. Spatial is (H, W) for
pictures, (F, H, W) for video and views, (T,) for audio."""

Prediction = Literal["flow", "epsilon", "v"]
"""``flow``: time t in [0, 1] runs from noise to data, the output is the velocity ``data - noise``.
``epsilon`` and ``v``: t is a step 0..999 of a DDPM schedule, 0 being almost clean."""


@dataclass(frozen=True)
class Region:
    """A prompt that rules a part of the picture.

    Attributes:
        box: (x1, y1, x2, y2) as fractions of width and height, SPHINX's format.
        row: which row of ``Steering.regions`` conditions it is.
        weight: what its text attention is multiplied with.
    """

    box: tuple[float, float, float, float]
    row: int
    weight: float = 1.0


@dataclass(frozen=True)
class Steering:
    """What may be changed at sampling time without training; the defaults change nothing.

    Attributes:
        rope_scale: side-length ratio to the trained resolution; 1 leaves the rotary table alone.
        rope_method: how the table is stretched (``ntk``, ``linear``, ``time_switch`` as released,
            ``time_smooth`` and ``frequency`` as in Lumina-Next's paper).
        watershed: the time below which ``time_switch`` interpolates positions; above, it raises the base.
        base_tokens: the trained sequence length of proportional attention; None keeps 1 / sqrt(A).
        shared_attention: pictures of the batch also attend to the keys of its first picture (style-consistent batch).
        gate_threshold: text heads with abs(tanh(gate)) below it are left out.
        regions: prompts of regions; ``region_condition`` holds their rows.
        region_condition: one row for every prompt that ``regions`` names.
        halves: parts of equal length that the batch consists of: 2 where guidance stacks [conditional; unconditional].
            Shared attention stays within each of them, and regions rule the first one alone.
    """

    rope_scale: float = 1.0
    rope_method: Literal["ntk", "linear", "time_switch", "time_smooth", "frequency"] = "time_switch"
    watershed: float = 0.3
    base_tokens: int | None = None
    shared_attention: bool = False
    gate_threshold: float = 0.0
    regions: Sequence[Region] = ()
    region_condition: Condition | None = None
    halves: int = 1


class Denoiser(Protocol):
    """A network that is shown noisy latents, the time and a condition, and says where the data lies."""

    prediction: Prediction
    latent_channels: int

    def __call__(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        """Prediction of the layout of ``x``, for times ``t`` (B,).

        Raises:
            ValueError: when the condition lacks a part that this denoiser needs, or ``steering`` asks for something
                that it cannot do; never ignored in silence.
        """
        ...
