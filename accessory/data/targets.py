"""Pictures to be drawn, with what asks for them: rows of a denoiser's training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from accessory.data.image import open_picture, resize, to_tensor
from accessory.data.rows import RowRejected
from accessory.schema import CAPTION, Encoded, Picture, Prompt, Sample, Target

Fit = Callable[[int, int], tuple[int, int]]
"""(width, height) of a picture to that of its target, in pixels."""


def target(picture: Picture, size: int, prompt: Prompt = "", fit: Fit | None = None) -> Target:
    """The middle of a picture as a target: a square of ``size`` pixels a side, or what ``fit`` says, whose shape is cut
    out as large as it goes."""
    image = open_picture(picture.source)
    width, height = image.size
    to = (size, size) if fit is None else fit(width, height)
    scale = min(width / to[0], height / to[1])
    across, down = min(width, max(1, round(to[0] * scale))), min(height, max(1, round(to[1] * scale)))
    if (across, down) != (width, height):
        left, top = (width - across) // 2, (height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    pixels = to_tensor(resize(image, *to))
    name = f"{to[0]} " if to[0] == to[1] else f"{to[0]}x{to[1]} "
    key = hashlib.sha256(name.encode() + (pixels * 255).round().byte().numpy().tobytes()).hexdigest()[:32]
    return Target(pixels, prompt, key)


class TargetEncoder:
    """Rows for a denoiser alone: no ids, and each picture of the assistant as a target of all that precedes it.

    ``size``: side of the pictures in pixels, squares unless ``fit`` gives each its own (see :func:`target`).
    """

    tile_size = 1
    pad_id = 0

    def __init__(self, size: int, fit: Fit | None = None) -> None:
        if size < 1:
            raise ValueError(f"pictures of size {size}: it must be at least 1 pixel")
        self.size, self.fit = size, fit

    def encode(self, sample: Sample) -> Encoded:
        """The sample's row. Raises :class:`RowRejected` when it shows no picture or asks for it with nothing."""
        try:
            targets = self._targets(sample)
        except ValueError as error:
            raise RowRejected(str(error), sample.source, sample.index) from error
        none = torch.zeros(0, dtype=torch.long)
        return Encoded(none, none, torch.zeros(0, 3, 1, 1), sample.source, sample.index, targets)

    def _targets(self, sample: Sample) -> tuple[Target, ...]:
        found, turns = [], sample.turns
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            for j, part in enumerate(turn.parts):
                if not isinstance(part, Picture):
                    continue
                if j:
                    raise ValueError("the assistant speaks before its picture; such rows need objective.loss")
                prompt: Prompt = turns[0].text.strip() if sample.meta.get(CAPTION) else turns[:i]
                found.append(target(part, self.size, prompt, self.fit))
        if not found:
            raise ValueError("the assistant shows no picture, so there is nothing to draw")
        if any(not t.prompt for t in found):
            raise ValueError("a picture is asked for with an empty prompt")
        return tuple(found)
