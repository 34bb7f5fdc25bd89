"""From pixels to the latents that denoisers see, and back: one contract over VAEs, pixel space and our own codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.diffusion.denoiser import Latents
from accessory.diffusion.latent_cache import fingerprint

Pixels = Tensor | list[Tensor]
"""Pictures in [0, 1]: (B, 3, H, W), or a list of (3, H, W) of unequal sizes."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for the batch, or one for each picture (so that a picture's noise does not depend on its batch)."""


@dataclass(frozen=True)
class Constants:
    """Published numbers of a family of VAEs: latents are ``(z - shift) * scale``."""

    channels: int
    scale: float
    shift: float = 0.0
    factor: int = 8


FAMILIES: dict[str, Constants] = {
    "sd": Constants(4, 0.18215),
    "sdxl": Constants(4, 0.13025),
    "sd3": Constants(16, 1.5305, 0.0609),
    "flux": Constants(16, 0.3611, 0.1159),
}
"""``sd``: SD 1.x and 2.x and sd-vae-ft-ema/mse. ``sdxl``: also Lumina-T2I's released weights. ``flux``: also
Lumina-Image 2."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the latents of a picture, scaled; ``std`` None where there is one latent only."""

    mean: Tensor
    std: Tensor | None = None

    def sample(self, generator: Generators = None) -> Tensor:
        """A draw, or the mean where nothing is random."""
        return self.mean if self.std is None else self.mean + self.std * noise_like(self.mean, generator)


class LatentCodec(Protocol):
    """What turns pictures into latents of ``channels`` channels at 1 / ``factor`` of their side, and back."""

    channels: int
    factor: int

    def moments(self, pixels: Tensor) -> Moments:
        """The distribution of the latents (B, C, H / factor, W / factor) of pictures (B, 3, H, W) in [0, 1]."""
        ...

    def encode(self, pixels: Pixels, generator: Generators = None, *, mode: bool = False) -> Latents:
        """Latents of pictures: a draw, as training wants, or with ``mode`` the most likely ones."""
        ...

    def decode(self, latents: Latents) -> Pixels:
        """Pictures in [0, 1], computed in fp32."""
        ...

    def digest(self) -> str:
        """What names this codec and its weights in a cache."""
        ...


class Codec(nn.Module):
    """What all codecs share: scale, shift, draws, lists, fp32. Those below say :meth:`raw` and :meth:`pictures` alone.

    Args:
        channels: C of the latents.
        factor: pixels a latent, on a side.
        scale, shift: latents are ``(z - shift) * scale``; numbers, or one for each channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, channels: int, factor: int, scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0
    ) -> None:
        super().__init__()
        self.channels = channels
        self.factor = factor
        for name, value in (("scale", scale), ("shift", shift)):
            given = torch.tensor(value, dtype=torch.float32).reshape(-1)
            if len(given) not in (1, channels):
                raise ValueError(f"{name} of {len(given)} numbers for {channels} channels")
            self.register_buffer(name, given.expand(channels).clone())

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation before scaling, of pictures (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def pictures(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in about [-1, 1] of unscaled latents."""
        raise NotImplementedError

    def moments(self, pixels: Tensor) -> Moments:
        """See :class:`LatentCodec`.

        Raises:
            ValueError: when the pictures are not (B, 3, H, W) with sides that are multiples of ``factor``.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side % self.factor for side in pixels.shape[-2:]):
            raise ValueError(
                f"pictures must be (B, 3, H, W), sides multiples of {self.factor}, got {tuple(pixels.shape)}"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            mean, std = self.raw(pixels.float() * 2 - 1)
        scale, shift = self.scale[:, None, None], self.shift[:, None, None]
        return Moments((mean - shift) * scale, None if std is None else std * scale)

    def encode(self, pixels: Pixels, generator: Generators = None, *, mode: bool = False) -> Latents:
        """See :class:`LatentCodec`; a list is encoded picture by picture."""
        if isinstance(pixels, Tensor):
            found = self.moments(pixels)
            return found.mean if mode else found.sample(generator)
        own = [generator] * len(pixels) if generator is None or isinstance(generator, torch.Generator) else generator
        out = []
        for picture, g in zip(pixels, own, strict=True):
            found = self.moments(picture[None])
            out.append((found.mean if mode else found.sample(g))[0])
        return out

    def decode(self, latents: Latents) -> Pixels:
        """See :class:`LatentCodec`; a list is decoded one by one.

        Raises:
            ValueError: for latents of another number of channels.
        """
        if not isinstance(latents, Tensor):
            out = []
            for latent in latents:
                picture = self.decode(latent[None])
                assert isinstance(picture, Tensor)
                out.append(picture[0])
            return out
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (B, {self.channels}, h, w), got {tuple(latents.shape)}")
        with torch.autocast(latents.device.type, enabled=False):
            x = self.pictures(latents.float() / self.scale[:, None, None] + self.shift[:, None, None])
        return ((x + 1) / 2).clamp(0, 1)

    def digest(self) -> str:
        """See :class:`LatentCodec`."""
        return fingerprint(self, codec=type(self).__name__, sizes=f"{self.channels} {self.factor}")


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise (B, ...) from one generator, or row by row from B of them.

    Raises:
        ValueError: when there are not as many generators as rows.
    """

    def draw(shape: torch.Size, g: torch.Generator | None) -> Tensor:
        # Drawn where the generator lives: a seed means one picture on every device.
        device = x.device if g is None else g.device
        return torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(x)

    if generator is None or isinstance(generator, torch.Generator):
        return draw(x.shape, generator)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} pictures")
    return torch.stack([draw(x.shape[1:], g) for g in generator])


class PixelCodec(Codec):
    """No codec at all: the latents are the pixels in [-1, 1], a patch folded into channels (3 * patch ** 2)."""

    def __init__(self, patch: int = 1) -> None:
        if patch < 1:
            raise ValueError(f"patch must be at least 1, got {patch}")
        super().__init__(3 * patch**2, patch)

    def raw(self, x: Tensor) -> tuple[Tensor, None]:
        """Fold."""
        return F.pixel_unshuffle(x, self.factor), None

    def pictures(self, z: Tensor) -> Tensor:
        """Unfold."""
        return F.pixel_shuffle(z, self.factor)


class DiffusersCodec(Codec):
    """diffusers' AutoencoderKL, in fp32 always: the VAE of SDXL overflows in fp16.

    Args:
        vae: an ``AutoencoderKL``; it is frozen.
        family: check it against the published numbers of :data:`FAMILIES`.

    Raises:
        ValueError: when it is not of that family.
    """

    vae: Any

    def __init__(self, vae: Any, family: str | None = None) -> None:
        c = vae.config
        factor = 2 ** (len(c.block_out_channels) - 1)
        if family is not None:
            if family not in FAMILIES:
                raise ValueError(f"no VAE family {family!r}; known are {', '.join(FAMILIES)}")
            found = Constants(c.latent_channels, c.scaling_factor, c.shift_factor or 0.0, factor)
            if found != FAMILIES[family]:
                raise ValueError(f"this VAE is not of family {family}: it says {found}, not {FAMILIES[family]}")
        scale: float | list[float] = c.scaling_factor
        shift: float | list[float] = c.shift_factor or 0.0
        if c.latents_mean is not None and c.latents_std is not None:
            # diffusers' decoders undo z / scaling_factor * std + mean
            scale, shift = [c.scaling_factor / std for std in c.latents_std], list(c.latents_mean)
        super().__init__(c.latent_channels, factor, scale, shift)
        self.vae = vae.float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DiffusersCodec:
        """It stays in evaluation mode."""
        return super().train(False)

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior."""
        found = self.vae.encode(x).latent_dist
        return found.mean, found.std

    def pictures(self, z: Tensor) -> Tensor:
        """The decoder."""
        return self.vae.decode(z, return_dict=False)[0]


def load_vae(folder: Path, family: str | None = None) -> DiffusersCodec:
    """The VAE of a local folder that diffusers wrote: a pipeline with ``vae/``, or the VAE alone; safetensors only.

    Raises:
        ValueError: when it cannot be read, or is not of ``family``.
    """
    from diffusers import AutoencoderKL

    folder = Path(folder)
    place = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (place / "config.json").is_file():
        raise ValueError(f"{folder} holds no VAE (vae/config.json is missing)")
    try:
        vae = AutoencoderKL.from_pretrained(
            place, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error}") from None
    return DiffusersCodec(vae, family)
