"""A small convolutional autoencoder of our own, for models of a size that a CPU trains."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from accessory.diffusion.latent_cache import fingerprint, write_atomic
from accessory.diffusion.latents import Codec

FORMAT = "accessory-autoencoder-1"


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes.

    Attributes:
        channels: of the latents.
        factor: pixels a latent, on a side: 2, 4, 8 or 16.
        width: of the first stage; later ones are twice as wide.
        depth: residual blocks in each stage of the encoder, and as many in the decoder.
        latent: ``tanh`` keeps latents in (-1, 1); ``norm`` gives every position mean 0 and variance 1 over its
            channels; ``kl`` is a VAE.
        kl_weight: of the KL term, in nats a latent value.
        edge_weight: of the error of differences between neighbouring pixels, which keeps contours sharp.
    """

    channels: int = 4
    factor: int = 8
    width: int = 48
    depth: int = 2
    latent: Literal["tanh", "norm", "kl"] = "tanh"
    kl_weight: float = 1e-4
    edge_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.factor not in (2, 4, 8, 16):
            raise ValueError(f"autoencoder.factor must be 2, 4, 8 or 16, got {self.factor}")
        if self.width % GROUPS:
            raise ValueError(f"autoencoder.width must be a multiple of {GROUPS}, got {self.width}")
        if self.latent == "norm" and self.channels < 2:
            raise ValueError("autoencoder.latent 'norm' needs at least 2 channels")


GROUPS = 8


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        self.body = nn.Sequential(*_head(width, width), nn.GroupNorm(GROUPS, width), nn.SiLU(), last)
        nn.init.zeros_(last.weight)  # a block begins as nearly the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) -> the same."""
        return x + self.body(x)


class TinyAutoencoder(Codec):
    """Pixels to latents and back, about 1.7 M parameters at the defaults.

    The first halving folds pixels into channels and the last unfolds them, so no convolution runs at full resolution.
    ``scale`` and ``shift`` are set by :meth:`fit` once it is trained, so that latents have mean 0 and variance 1.
    """

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        self.config = c = config or AutoencoderConfig()
        super().__init__(c.channels, c.factor)
        stages = c.factor.bit_length() - 1
        widths = [c.width * (1 if i == 0 else 2) for i in range(stages)]
        out = c.channels * (2 if c.latent == "kl" else 1)
        down: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(c.channels, widths[-1], 3, padding=1)]
        for i, width in enumerate(widths):
            down += [_Residual(width) for _ in range(c.depth)]
            if i + 1 < stages:
                down.append(nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1))
        for i, width in reversed(list(enumerate(widths))):
            up += [_Residual(width) for _ in range(c.depth)]
            if i:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, widths[i - 1], 3, padding=1)]
        self.encoder = nn.Sequential(*down, *_head(widths[-1], out))
        self.decoder = nn.Sequential(*up, *_head(widths[0], 12), nn.PixelShuffle(2))

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (None unless it is a VAE) of pictures in [-1, 1]."""
        z = self.encoder(x)
        if self.config.latent == "tanh":
            return z.tanh(), None
        if self.config.latent == "norm":
            return F.layer_norm(z.movedim(1, -1), (self.channels,)).movedim(-1, 1), None
        mean, logvar = z.chunk(2, 1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def pictures(self, z: Tensor) -> Tensor:
        """Pictures in about [-1, 1]."""
        return self.decoder(z)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the training loss, to be summed, of pictures (B, 3, H, W) in [0, 1].

        ``pixels``: mean absolute error in [-1, 1]. ``edges``: that of differences to the right and lower neighbour.
        ``kl``: for a VAE, mean over latent values.
        """
        x = pixels * 2 - 1
        mean, std = self.raw(x)
        y = self.pictures(mean if std is None else mean + std * torch.randn_like(std))
        gap = y - x
        edges = gap.diff(dim=-1).abs().mean() + gap.diff(dim=-2).abs().mean()
        out = {"pixels": gap.abs().mean(), "edges": self.config.edge_weight * edges}
        if std is not None:
            out["kl"] = self.config.kl_weight * 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return out

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set ``scale`` and ``shift`` from the latents of pictures (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: for no pictures.
        """
        count = 0
        total = torch.zeros(self.channels, dtype=torch.float64, device=self.scale.device)
        square = total.clone()
        for pixels in batches:
            z = self.raw(pixels * 2 - 1)[0].double().movedim(1, 0).flatten(1)  # (C, B * h * w)
            count += z.shape[1]
            total += z.sum(1)
            square += (z**2).sum(1)
        if not count:
            raise ValueError("no pictures to fit the scale of the latents to")
        mean = total / count
        std = (square / count - mean**2).clamp_min(1e-12).sqrt()
        self.shift.copy_(mean)
        self.scale.copy_(1 / std)

    def digest(self) -> str:
        """What names this codec, its options and its weights in a cache."""
        return fingerprint(self, codec=json.dumps(asdict(self.config), sort_keys=True))

    def save(self, path: Path) -> None:
        """Write one safetensors file that :func:`load` reads, all or nothing."""
        state = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        about = {"format": FORMAT, "config": json.dumps(asdict(self.config))}
        write_atomic(Path(path), save(state, metadata=about))


def _head(width: int, out: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]


def load(path: Path) -> TinyAutoencoder:
    """The autoencoder of a file, in evaluation mode and frozen.

    Raises:
        ValueError: when the file is missing, torn or something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is not an autoencoder of ours: its format is {about.get('format')!r}, not {FORMAT!r}")
    model = TinyAutoencoder(AutoencoderConfig(**json.loads(about["config"])))
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
