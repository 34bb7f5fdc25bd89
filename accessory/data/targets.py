"""Pictures to be drawn, with what asks for them: rows of a denoiser's training."""

from __future__ import annotations

import hashlib

import torch

from accessory.data.image import open_picture, resize, to_tensor
from accessory.data.rows import RowRejected
from accessory.schema import CAPTION, Encoded, Picture, Prompt, Sample, Target


def target(picture: Picture, size: int, prompt: Prompt = "") -> Target:
    """The middle square of a picture at ``size`` pixels a side, as a target."""
    image = open_picture(picture.source)
    width, height = image.size
    side = min(width, height)
    if width != height:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    pixels = to_tensor(resize(image, size, size))
    key = hashlib.sha256(f"{size} ".encode() + (pixels * 255).round().byte().numpy().tobytes()).hexdigest()[:32]
    return Target(pixels, prompt, key)


class TargetEncoder:
    """Rows for a denoiser alone: no ids, and each picture of the assistant as a target of all that precedes it.

    ``size``: side of the pictures in pixels.
    """

    tile_size = 1
    pad_id = 0

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"pictures of size {size}: it must be at least 1 pixel")
        self.size = size

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
                found.append(target(part, self.size, prompt))
        if not found:
            raise ValueError("the assistant shows no picture, so there is nothing to draw")
        if any(not t.prompt for t in found):
            raise ValueError("a picture is asked for with an empty prompt")
        return tuple(found)
