"""Classifier-free guidance: one prediction of what the condition says and what its absence says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accessory.diffusion.batch import each, halves, moved, twice
from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Denoiser, Latents, Steering


@dataclass(frozen=True)
class Guidance:
    """``null + scale (conditional - null)``.

    Attributes:
        scale: 1 is the condition alone.
        channels: how many latent channels are guided, the first ones; the others are the conditional prediction.
            None guides all. 3 is what Lumina, Large-DiT and DiT were measured with (a leftover of pixels).
        interval: progress between which guidance acts, 0 being noise and 1 data (Kynkaanniemi et al. 2024); outside
            the condition alone is asked, which costs half.
        rescale: how far the guided prediction is brought back to the spread of the conditional one, 0 to 1 (Lin et
            al. 2024, equation 15).
        batched: ask for both in one call of a doubled batch; otherwise in two, which needs less memory.

    Raises:
        ValueError: for numbers out of range.
    """

    scale: float = 4.0
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    batched: bool = True

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance of {self.channels} channels: at least 1, or none given for all")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}, it must be in [0, 1]")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval {self.interval} must rise within [0, 1]")

    def acts(self, progress: float) -> bool:
        """Whether the null condition is needed at this point, 0 being noise and 1 data."""
        return self.scale != 1 and self.interval[0] <= progress <= self.interval[1]

    def combine(self, conditional: Latents, null: Latents, latent_channels: int) -> Latents:
        """The guided prediction. Channels above ``latent_channels`` (a learned variance) are never guided."""
        guided = min(self.channels or latent_channels, latent_channels)

        def mix(_: Tensor, conditional: Tensor, null: Tensor) -> Tensor:
            own, other = conditional[:, :guided], null[:, :guided]
            mixed = other + self.scale * (own - other)
            if self.rescale:
                spread = [part.flatten(1).std(1).clamp_min(1e-12) for part in (own, mixed)]
                factor = (spread[0] / spread[1]).reshape(-1, *[1] * (own.ndim - 1))
                mixed = mixed * (self.rescale * factor + 1 - self.rescale)
            return torch.cat([mixed, conditional[:, guided:]], 1)

        return each(mix, torch.zeros(()), conditional, null)


def network_dtype(denoiser: Denoiser) -> torch.dtype:
    """The dtype that a network computes in: that of its first floating parameter; fp32 for what has none."""
    if isinstance(denoiser, nn.Module):
        for parameter in denoiser.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


class Guided:
    """A denoiser with its conditions, ready to be asked: the states are fp32, the network works in its own dtype.

    Args:
        condition: of B pictures.
        null: the same parts for B pictures, or one row for all; needed where ``guidance`` acts.
        guidance: None asks for the condition alone.

    Raises:
        ValueError: when guidance acts and there is no null condition, or one of another layout.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        null: Condition | None,
        guidance: Guidance | None,
        steering: Steering | None = None,
    ) -> None:
        self.denoiser, self.guidance, self.steering = denoiser, guidance, steering
        self.dtype = network_dtype(denoiser)
        self.condition = condition.to(dtype=self.dtype)
        self.null: Condition | None = None
        self._texts: dict[int, Any] = {}
        if guidance is None or guidance.scale == 1:
            return
        if null is None:
            raise ValueError(f"guidance of scale {guidance.scale} needs a null condition")
        if len(null) not in (1, len(condition)):
            raise ValueError(f"{len(null)} null conditions for {len(condition)} pictures: one, or one each")
        null = null if len(null) == len(condition) else null[[0] * len(condition)]
        self.null = null.to(dtype=self.dtype)
        self.both = join([self.condition, self.null])  # says so when the parts differ
        # These tie the pictures of a batch together, so that it has to be known which rows are whose.
        tied = steering is not None and (steering.shared_attention or bool(steering.regions))
        self.doubled = replace(steering, halves=2) if steering is not None and tied else steering
        self.plain = replace(steering, regions=(), region_condition=None) if steering is not None else None

    def __call__(self, x: Latents, t: Tensor, progress: float) -> Latents:
        """The guided output for times ``t`` (B,), in fp32; ``progress`` is 0 at noise and 1 at data."""
        state = moved(x, dtype=self.dtype)
        if self.null is None or self.guidance is None or not self.guidance.acts(progress):
            return self._ask(state, t, self.condition, self.steering)
        if self.guidance.batched:
            conditional, null = halves(self._ask(twice(state), torch.cat([t, t]), self.both, self.doubled))
        else:
            conditional = self._ask(state, t, self.condition, self.steering)
            null = self._ask(state, t, self.null, self.plain)
        return self.guidance.combine(conditional, null, self.denoiser.latent_channels)

    def _ask(self, x: Latents, t: Tensor, condition: Condition, steering: Steering | None) -> Latents:
        options = {"text": text} if (text := self._read(condition, steering)) is not None else {}
        return moved(self.denoiser(x, t, condition, steering=steering, **options), dtype=torch.float32)

    def _read(self, condition: Condition, steering: Steering | None) -> Any:
        """What the network makes of the text once for all steps, where it can (``FlagDiT.read``)."""
        read = getattr(self.denoiser, "read", None)
        if read is None or condition.seq is None:
            return None
        if id(condition) not in self._texts:
            with torch.no_grad():
                self._texts[id(condition)] = read(condition, steering)
        return self._texts[id(condition)]
