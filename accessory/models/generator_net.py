"""The class of generators: prompts to conditions, conditions to latents, latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from accessory.diffusion.batch import OnStep
from accessory.diffusion.condition import Condition, join
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.flag_dit import FlagDiT
from accessory.diffusion.latents import Codec
from accessory.diffusion.sampler import SamplerSettings, sample
from accessory.diffusion.unet import DiffusersDenoiser
from accessory.models.conditioner import Conditioner, DreamConditioner, Prompt
from accessory.models.generator_config import GeneratorConfig

Size = tuple[int, int]
"""Width and height in pixels."""


class Generator(nn.Module):
    """A conditioner, a denoiser and a codec.

    Args:
        config: resolved: everything in it is given.
        kept: names of the tensors that are saved though they do not train.

    Raises:
        ValueError: when the denoiser and the codec have other numbers of channels.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        denoiser: FlagDiT | DiffusersDenoiser,
        codec: Codec,
        conditioner: Conditioner,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        if denoiser.latent_channels != codec.channels:
            raise ValueError(
                f"the denoiser takes latents of {denoiser.latent_channels} channels, the codec makes {codec.channels}"
            )
        self.config, self.kept = config, kept
        self.denoiser, self.codec, self.conditioner = denoiser, codec, conditioner

    @property
    def settings(self) -> SamplerSettings:
        """How pictures are made where nothing else is asked for."""
        return self.config.sampler or SamplerSettings()

    @property
    def size(self) -> Size:
        """The default size."""
        assert self.config.size is not None
        return self.config.size, self.config.size

    @property
    def grain(self) -> Size:
        """What width and height must be multiples of: pixels of a latent times latents of a patch."""
        if isinstance(self.denoiser, FlagDiT):
            _, rows, columns = self.denoiser.config.patch
        else:
            rows = columns = int(getattr(self.denoiser.net.config, "patch_size", None) or 1)
        return self.codec.factor * columns, self.codec.factor * rows

    def train(self, mode: bool = True) -> Generator:
        """Parts of which nothing trains stay in evaluation mode."""
        super().train(mode)
        parts: list[nn.Module] = [self.denoiser, self.codec, self.conditioner]
        if isinstance(self.conditioner, DreamConditioner):
            parts.append(self.conditioner.dream.net)
        for part in parts:
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    # --- conditions ---------------------------------------------------------------------------------------------------

    def condition(self, prompts: Sequence[Prompt], noise: Sequence[torch.Generator] | None = None) -> Condition:
        """Conditions of B prompts: texts, or dialogues whose answer is the picture. ``noise``: one generator a picture
        for conditioners that draw (see :class:`DreamConditioner`); others leave them as they are.

        Raises:
            ValueError: for one string, for none, and for what this conditioner cannot read.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("there are no prompts" if not prompts else "prompts is one string; put it into a list")
        if isinstance(self.conditioner, DreamConditioner):
            return self.conditioner.condition(prompts, noise)
        return self.conditioner.condition(prompts)

    def null(self, n: int, negative: Sequence[str] | None = None) -> Condition:
        """What guidance leads away from, n rows: the empty prompt, or ``negative`` prompts (n, or one for all).

        Raises:
            ValueError: for another number of negative prompts.
        """
        if negative is None:
            return self.conditioner.null(n)
        if isinstance(negative, str) or len(negative) not in (1, n):
            raise ValueError(f"negative must be a list of one or of {n} prompts, got {negative!r}")
        # Each by itself: an empty one is exactly the null, and a picture does not depend on its neighbours.
        made = {t: self.conditioner.condition([t]) if t else self.conditioner.null(1) for t in set(negative)}
        rows = list(negative) * (n if len(negative) == 1 else 1)
        return join([made[text] for text in rows])

    def lost(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens of each prompt are cut because it is too long."""
        return self.conditioner.lost(prompts)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        negative: Sequence[str] | None = None,
        sizes: Sequence[Size] | None = None,
        seeds: Sequence[int],
        settings: SamplerSettings | None = None,
        steering: Steering | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Pictures of prompts. Each depends on its prompt, seed, size and settings, not on what is made beside it.

        Args:
            negative: one a picture, or one for all.
            sizes: (width, height) of each in pixels; None makes squares of the default size.
            seeds: one a picture.
            settings: None takes the generator's own.

        Raises:
            ValueError: for sizes that are no multiples of :attr:`grain` (the nearest are named), numbers of seeds or
                sizes that are not the number of prompts, and negative prompts without guidance.
        """
        settings = self.settings if settings is None else settings
        guided = settings.scale != 1
        if negative is not None and not guided:
            raise ValueError("negative prompts act through guidance, and it is off (scale 1)")
        self._check(len(prompts), sizes, seeds)
        with torch.no_grad(), _resting(self):
            condition = self.condition(prompts)
            null = self.null(len(prompts), negative) if guided else None
            return self.render(condition, null, sizes=sizes, seeds=seeds, settings=settings, steering=steering,
                               on_step=on_step)  # fmt: skip

    @torch.no_grad()
    def render(
        self,
        condition: Condition,
        null: Condition | None = None,
        *,
        sizes: Sequence[Size] | None = None,
        seeds: Sequence[int],
        settings: SamplerSettings | None = None,
        steering: Steering | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """As :meth:`generate`, of B conditions that are made already; ``null`` (one row or B) where guidance acts."""
        self._check(len(condition), sizes, seeds)
        sizes = [self.size] * len(condition) if sizes is None else sizes
        f, channels = self.codec.factor, self.codec.channels
        shapes = [(channels, height // f, width // f) for width, height in sizes]
        if isinstance(self.denoiser, DiffusersDenoiser) and self.denoiser.needs.sizes and condition.sizes is None:
            condition = replace(condition, sizes=_six(sizes, condition))
            null = None if null is None else replace(null, sizes=_six(sizes[: len(null)], null))
        with _resting(self):
            latents = sample(
                self.denoiser, condition, null,
                shape=shapes[0] if len(set(shapes)) == 1 else shapes,
                seeds=seeds, settings=self.settings if settings is None else settings,
                steering=steering, on_step=on_step,
            )  # fmt: skip
            return self.pictures(latents)

    @torch.no_grad()
    def pictures(self, latents: Latents) -> list[Image.Image]:
        """Latents as pictures of eight bits."""
        return [to_image(pixels) for pixels in self.codec.decode(latents)]

    def _check(self, count: int, sizes: Sequence[Size] | None, seeds: Sequence[int]) -> None:
        if len(seeds) != count or (sizes is not None and len(sizes) != count):
            given = f", {len(sizes)} sizes" if sizes is not None else ""
            raise ValueError(f"{count} prompts, {len(seeds)} seeds{given}: there must be one each a picture")
        for size in [self.size] if sizes is None else sizes:
            self.check_size(size)

    def check_size(self, size: Size) -> None:
        """Whether pictures can have this size; ValueError names the nearest that they can have."""
        if all(side > 0 and side % g == 0 for side, g in zip(size, self.grain, strict=True)):
            return
        low, high = ([_near(side, g, up) for side, g in zip(size, self.grain, strict=True)] for up in (False, True))
        near = " or ".join(dict.fromkeys(f"{w}x{h}" for w, h in (low, high)))
        raise ValueError(
            f"size {size[0]}x{size[1]}: width must be a multiple of {self.grain[0]} and height of {self.grain[1]} "
            f"pixels (codec factor times patch); the nearest are {near}"
        )


class _resting:  # noqa: N801  (used as a statement)
    """A module in evaluation mode for a while."""

    def __init__(self, module: nn.Module) -> None:
        self.modes = {m: m.training for m in module.modules()}
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


def to_image(pixels: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1] as eight bits."""
    # (3, H, W) -> (H, W, 3)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _near(side: int, grain: int, up: bool) -> int:
    return max(grain, (-(-side // grain) if up else side // grain) * grain)


def _six(sizes: Sequence[Size], condition: Condition) -> Tensor:
    """SDXL's numbers (B, 6) of whole pictures."""
    rows = [(h, w, 0, 0, h, w) for w, h in sizes]
    return torch.tensor(rows, dtype=torch.float32, device=next(iter(condition.parts().values())).device)
