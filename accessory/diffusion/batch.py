"""Arithmetic on latents, be they one tensor or a list of unequal ones, and noise that belongs to a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.diffusion.denoiser import Latents

Shape = tuple[int, ...]
Model = Callable[[float, Latents], Latents]
"""What a solver asks: the output for the state at one time, which all pictures share."""


@dataclass(frozen=True)
class StepEvent:
    """What a caller is told after every step of a sampler.

    Attributes:
        step: number of the step, from 1.
        steps: how many there will be; None for an adaptive solver, which does not know.
        t: the time that was reached: t in [0, 1] of a flow, a step 0..999 of a schedule.
        latents: the state at that time, not to be written to.
    """

    step: int
    steps: int | None
    t: float
    latents: Latents


OnStep = Callable[[StepEvent], None]


def each(function: Callable[..., Tensor], t: Tensor, *latents: Latents) -> Latents:
    """``function(t, *latents)``: at once for tensors, picture by picture for lists.

    Args:
        function: takes t, of a shape that broadcasts against a batch, and batches (b, C, ...); gives such a batch.
        t: (B,), or one number for all.
        latents: one or more of the same layout.
    """
    if isinstance(latents[0], Tensor):
        first = latents[0]
        return function(t.reshape(-1, *[1] * (first.ndim - 1)) if t.ndim else t, *latents)
    rows = []
    for i, parts in enumerate(zip(*latents, strict=True)):
        row = t[i : i + 1].reshape(1, *[1] * parts[0].ndim) if t.ndim else t
        rows.append(function(row, *(part[None] for part in parts))[0])
    return rows


def add(x: Latents, *terms: tuple[float, Latents]) -> Latents:
    """``x`` plus the terms (factor, latents); ``x`` itself is left alone."""
    if isinstance(x, Tensor):
        for factor, term in terms:
            assert isinstance(term, Tensor)
            x = torch.add(x, term, alpha=factor)
        return x
    return [_only(add(part, *((factor, term[i]) for factor, term in terms))) for i, part in enumerate(x)]


def _only(x: Latents) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def moved(x: Latents, to: torch.device | None = None, dtype: torch.dtype | None = None) -> Latents:
    """``x`` on another device or in another dtype."""
    if isinstance(x, Tensor):
        return x.to(device=to, dtype=dtype)
    return [part.to(device=to, dtype=dtype) for part in x]


def twice(x: Latents) -> Latents:
    """The batch followed by itself."""
    return torch.cat([x, x]) if isinstance(x, Tensor) else [*x, *x]


def halves(x: Latents) -> tuple[Latents, Latents]:
    """A batch that :func:`twice` made, cut again."""
    return x[: len(x) // 2], x[len(x) // 2 :]


def means(x: Latents) -> Tensor:
    """(B,) mean over everything of a picture: every picture weighs the same, whatever its size."""
    if isinstance(x, Tensor):
        return x.flatten(1).mean(1)
    return torch.stack([part.mean() for part in x])


def device_of(x: Latents) -> torch.device:
    """Where the latents lie."""
    return x.device if isinstance(x, Tensor) else x[0].device


def report(x: Latents, step: int, steps: int | None, t: float, on_step: OnStep | None) -> None:
    """After a step: the state must be finite, and who asked is told.

    Raises:
        ValueError: for NaN or infinity in the latents, naming the step.
    """
    for part in [x] if isinstance(x, Tensor) else x:
        if not bool(torch.isfinite(part).all()):
            of = f" of {steps}" if steps is not None else ""
            raise ValueError(f"the latents are not finite after step {step}{of} (t = {t:.4g})")
    if on_step is not None:
        on_step(StepEvent(step, steps, t, x))


class Noise:
    """Normal noise from one generator a picture, so that a picture does not depend on what is drawn beside it.

    Drawn on the CPU in fp32: a seed means the same picture on every device.

    Args:
        seeds: one a picture.

    Raises:
        ValueError: when it is asked for noise of another number of pictures.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self, shapes: Sequence[Shape]) -> list[Tensor]:
        """Fresh noise (C, ...) for every picture."""
        if len(shapes) != len(self.generators):
            raise ValueError(f"{len(shapes)} pictures and {len(self.generators)} seeds: a picture has one seed")
        return [torch.randn(shape, generator=g) for shape, g in zip(shapes, self.generators)]

    def __call__(self, x: Latents) -> Latents:
        """Fresh noise of the layout and on the device of ``x``."""
        drawn = self.draw([tuple(part.shape) for part in x])
        if isinstance(x, Tensor):
            return torch.stack(drawn).to(x.device)
        return [part.to(like.device) for part, like in zip(drawn, x)]
