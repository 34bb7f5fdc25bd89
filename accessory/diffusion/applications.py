"""What a trained Flag-DiT does without more training: larger sizes, one style, composed regions, edited pictures.

Each function prepares a :class:`Steering` or a start for the one sampler. Sizes are those of latents: pixels over the
codec's ``factor``. Gates have a file of their own, ``diffusion.gates``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from accessory.diffusion.batch import Noise, OnStep, Shape, each
from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Denoiser, Latents, Region, Steering
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.diffusion.dit_rotary import PLAIN
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.patches import grid_size
from accessory.diffusion.sampler import SamplerSettings, invert, sample
from accessory.diffusion.transport import Transport

Size = tuple[int, int]
"""Rows and columns of latents."""
RopeMethod = Literal["ntk", "linear", "time_switch", "time_smooth", "frequency"]
Statistics = Literal["keep", "unit", "source"]
Encode = Callable[[list[str]], Condition]
"""What reads texts: one row of features for each."""
DEFAULT, LINEAR = SamplerSettings(), Transport()

# --- Resolution -------------------------------------------------------------------------------------------------------


def token_count(config: FlagDiTConfig, size: Size) -> int:
    """Length of the sequence of a picture, separators and fixed padding included.

    Raises:
        ValueError: for a size that patches do not divide.
    """
    _, rows, columns = grid_size(size, config.patch)
    return config.fixed_length or rows * (columns + config.eol_token) + config.eof_token


def trained_tokens(config: FlagDiTConfig, trained: Size, tallest: float = 4.0) -> int:
    """The length to which proportional attention refers: that of the longest sequence of training.

    With [nextline] it belongs to the tallest picture, which has the most rows. For pictures of 1024 pixels it is 4224,
    as Lumina-T2I takes it; without separators (Lumina-Next) it is the number of patches, 4096.

    Args:
        trained: the size of training, or any of its area.
        tallest: most rows a column among the trained sizes.
    """
    _, rows, columns = grid_size(trained, config.patch)
    area = rows * columns
    return config.fixed_length or area + round(math.sqrt(area * tallest)) * config.eol_token + config.eof_token


def extrapolate(
    config: FlagDiTConfig,
    trained: Size,
    wanted: Size,
    *,
    method: RopeMethod | None = None,
    watershed: float = 0.3,
    proportional: bool | None = None,
    tallest: float = 4.0,
    steering: Steering = PLAIN,
) -> Steering:
    """How to draw larger pictures than were trained; up to the trained area nothing changes.

    A table of one axis is stretched by the ratio of areas, one of rows and columns by its root: the lengths that
    their positions count. A wide picture of the trained area is not stretched, as released.

    Args:
        method: None takes what the family was released with: ``ntk`` for one axis (Flag-DiT), ``time_switch`` for two
            (Next-DiT).
        watershed: of ``time_switch``.
        proportional: attention of the wanted length is scaled by :func:`trained_tokens`. None: for larger pictures
            only; the released demos have it on always.
        tallest: see :func:`trained_tokens`.
        steering: what else is asked for.

    Raises:
        ValueError: for a table of three axes, which would stretch time too, or sizes that patches do not divide.
    """
    if config.rope_axes == 3:
        raise ValueError("extrapolate stretches rows and columns; a rotary table of 3 axes would stretch frames too")
    areas = [math.prod(grid_size(size, config.patch)) for size in (trained, wanted)]
    ratio = max(1.0, areas[1] / areas[0])
    if proportional or (proportional is None and ratio > 1):
        steering = replace(steering, base_tokens=trained_tokens(config, trained, tallest))
    one_axis = config.rope_axes == 1
    released: RopeMethod = "ntk" if one_axis else "time_switch"
    return replace(
        steering,
        rope_scale=ratio if one_axis else math.sqrt(ratio),
        rope_method=released if method is None else method,
        watershed=watershed,
    )


# --- Regions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionPrompt:
    """A text and the box that it rules: (x1, y1, x2, y2) as fractions of width and height."""

    text: str
    box: tuple[float, float, float, float]
    weight: float = 1.0


def tiled(texts: Sequence[str], rows: int, columns: int) -> list[RegionPrompt]:
    """Texts in equal cells, row by row from the upper left.

    Raises:
        ValueError: when there is not one text for each cell.
    """
    if len(texts) != rows * columns:
        raise ValueError(f"{len(texts)} texts for {rows} rows of {columns} cells")
    cells = [divmod(i, columns) for i in range(len(texts))]
    return [
        RegionPrompt(text, (x / columns, y / rows, (x + 1) / columns, (y + 1) / rows))
        for text, (y, x) in zip(texts, cells)
    ]


def scene(parts: Sequence[RegionPrompt]) -> str:
    """The text for the whole of a composed picture, as released: all texts in one."""
    return " ".join(part.text for part in parts)


def compose(parts: Sequence[RegionPrompt], encode: Encode, steering: Steering = PLAIN) -> Steering:
    """Steering by any number of texts and boxes; a text that comes twice is read once.

    Where boxes overlap, what they read adds up; where there is none, the picture's own text rules. The picture's
    condition (:func:`scene`, for instance) also makes the pooled vector that all tokens see.

    Raises:
        ValueError: for no parts, or when ``encode`` does not give a row for each text.
    """
    if not parts:
        raise ValueError("there are no regions to compose")
    texts = list(dict.fromkeys(part.text for part in parts))
    condition = encode(texts)
    if len(condition) != len(texts):
        raise ValueError(f"{len(texts)} texts of regions were encoded to {len(condition)} rows")
    regions = tuple(Region(part.box, texts.index(part.text), part.weight) for part in parts)
    return replace(steering, regions=regions, region_condition=condition)


# --- One style --------------------------------------------------------------------------------------------------------


def style_batch(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition | None = None,
    *,
    shape: Shape | Sequence[Shape],
    seeds: Sequence[int],
    reference: Tensor | None = None,
    settings: SamplerSettings = DEFAULT,
    inverse_guidance: Guidance | None = None,
    steering: Steering = PLAIN,
    on_step: OnStep | None = None,
) -> Latents:
    """Pictures in the style of the first: all also attend to its keys and values, at every step and layer.

    Args:
        condition, null, shape, seeds, settings, on_step: as :func:`accessory.diffusion.sampler.sample` has them.
        reference: latents (C, ...) of a given picture to be the first one; the first row of ``condition`` describes
            it. It is traced back to its noise, so that the first result is what the model makes of it.
        inverse_guidance: on the way back; None for the text alone.
        steering: what else is asked for.

    Raises:
        ValueError: as the sampler, or for a reference whose shape is not the first picture's.
    """
    shared = replace(steering, shared_attention=True)
    initial: Latents | None = None
    if reference is not None:
        single = isinstance(shape[0], int)
        shapes = [cast(Shape, shape)] * len(seeds) if single else list(cast(Sequence[Shape], shape))
        if tuple(reference.shape) != tuple(shapes[0]):
            raise ValueError(f"the reference has shape {tuple(reference.shape)}, the first picture {shapes[0]}")
        traced = invert(
            denoiser,
            reference[None],
            condition[:1],
            None if null is None else null[:1],
            settings=replace(settings, guidance=inverse_guidance),
            steering=steering,
        )
        drawn = [traced[0], *(part.to(traced[0].device) for part in Noise(seeds).draw(shapes)[1:])]
        initial = torch.stack(drawn) if single else drawn
    return sample(
        denoiser, condition, null, shape=shape, seeds=seeds, settings=settings, steering=shared, on_step=on_step,
        initial=initial,
    )  # fmt: skip


# --- Editing ----------------------------------------------------------------------------------------------------------


def repaint(
    denoiser: Denoiser,
    picture: Latents,
    condition: Condition,
    null: Condition | None = None,
    *,
    seeds: Sequence[int],
    strength: float = 0.6,
    settings: SamplerSettings = DEFAULT,
    steering: Steering | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Image to image: pictures get fresh noise for a part of the way, and are sampled from there.

    Args:
        strength: share of the steps that run: 0 gives the pictures back, 1 leaves nothing of them.
    """
    grid = replace(settings.grid, strength=strength, start=0.0)
    return sample(
        denoiser, condition, null, shape=_shape(picture), seeds=seeds, settings=replace(settings, grid=grid),
        steering=steering, on_step=on_step, source=picture,
    )  # fmt: skip


def edit(
    denoiser: Denoiser,
    picture: Latents,
    source: Condition,
    target: Condition,
    null: Condition | None = None,
    *,
    start: float = 0.2,
    statistics: Statistics = "keep",
    settings: SamplerSettings = DEFAULT,
    inverse_guidance: Guidance | None = None,
    steering: Steering | None = None,
    on_step: OnStep | None = None,
) -> Latents:
    """Trace pictures back along the flow under one text, and sample them anew under another; nothing is drawn.

    Args:
        picture: latents of B pictures.
        source, target: what they show, and what they are to show.
        start: the time that is gone back to: 0 is noise, 1 gives the pictures back.
        statistics: see :func:`normalised`.
        settings: for both ways; a flow under an ODE.
        inverse_guidance: on the way back; None for the text alone. With the guidance and the text of the way forth,
            the pictures come back as they were, but for the solver's error.

    Raises:
        ValueError: for a start outside [0, 1], or settings that cannot be run backwards.
    """
    if not 0 <= start <= 1:
        raise ValueError(f"the start of an edit is a time in [0, 1], got {start}")
    if start == 1:
        return picture
    settings = replace(settings, grid=replace(settings.grid, strength=1.0, start=start))
    back = replace(settings, guidance=inverse_guidance)
    state = invert(denoiser, picture, source, null, settings=back, steering=steering)
    state = normalised(state, picture, start, statistics, settings.transport)
    return sample(
        denoiser, target, null, shape=_shape(picture), seeds=[0] * len(picture), settings=settings, steering=steering,
        on_step=on_step, initial=state,
    )  # fmt: skip


def normalised(
    state: Latents, picture: Latents, t: float, statistics: Statistics, transport: Transport = LINEAR
) -> Latents:
    """The state at time ``t`` with, in every channel, the mean and spread that belong there.

    ``unit``: those of a picture whose channels are N(0, 1), which takes overall colour and contrast out of an edit.
    ``source``: those of ``picture``, which brings them back where the way to noise lost them. At t = 0 both are
    N(0, 1); later the path's share of the picture counts. ``keep`` changes nothing.
    """
    if statistics == "keep":
        return state
    c = transport.coefficients(torch.tensor(t, dtype=torch.float32))

    def match(_: Tensor, state: Tensor, picture: Tensor) -> Tensor:
        mean, spread = _moments(state)
        own, own_spread = _moments(picture.to(state))
        if statistics == "unit":
            own, own_spread = torch.zeros_like(own), torch.ones_like(own_spread)
        alpha, sigma = c.alpha.to(state), c.sigma.to(state)
        wanted = ((alpha * own_spread) ** 2 + sigma**2).sqrt()
        return (state - mean) / spread.clamp_min(1e-12) * wanted + alpha * own

    return each(match, torch.zeros(()), state, picture)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of every channel of (B, C, ...), broadcastable against it."""
    axes = tuple(range(2, x.ndim))
    return x.mean(axes, keepdim=True), x.std(axes, keepdim=True, correction=0)


def _shape(picture: Latents) -> Shape | list[Shape]:
    if isinstance(picture, Tensor):
        return tuple(picture.shape[1:])
    return [tuple(part.shape) for part in picture]
