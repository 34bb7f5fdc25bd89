"""What stands before and behind the blocks of the Lumina diffusion transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.nn.linear import Linear

TIME_WAVES = 128


class TimeEmbedder(nn.Module):
    """Times as cosines and sines, through two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * TIME_WAVES, dim, bias=True), nn.SiLU(), Linear(dim, dim, bias=True))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Map (B,) to (B, W) of ``dtype``."""
        return self.mlp(time_waves(t).to(dtype))


def time_waves(t: Tensor) -> Tensor:
    """Cosines, then sines, of (B,) times at 128 frequencies from 1 down to almost 1 / 10000; (B, 256) in fp32."""
    waves = torch.arange(TIME_WAVES, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) / TIME_WAVES * waves)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class LabelEmbedder(nn.Module):
    """A table of classes; the last row is the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Map (B,) to (B, W).

        Raises:
            ValueError: for a label outside the table.
        """
        null = self.embedding_table.num_embeddings - 1
        outside = labels[(labels < 0) | (labels > null)].tolist()
        if outside:
            raise ValueError(f"label {outside[0]} is outside 0..{null - 1} ({null} is the null class)")
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Modulated layer norm without parameters, and the projection to the values of a patch."""

    def __init__(self, config: FlagDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch_values * config.out_channels, bias=True)
        width = config.dim * (2 if config.final_shift else 1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_width, width, bias=True))
        self.shifted = config.final_shift
        self.skip = config.skip_sigma and config.learn_sigma
        self.channels = config.out_channels

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, patch * channels), channels last; the variance may be missing with ``skip_sigma``."""
        *shift, scale = self.adaLN_modulation(c)[:, None].chunk(2 if self.shifted else 1, dim=-1)
        x = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale)
        x = x + shift[0] if shift else x
        linear = self.linear
        if not self.skip or linear.bias is None or linear.delta is not None or linear.scale is not None:
            return linear(x)
        # (patch, channels, D): the rows of a variance that nobody looks at are left out.
        weight = linear.weight.unflatten(0, (-1, self.channels))[:, : self.channels // 2].flatten(0, 1)
        bias = linear.bias.unflatten(0, (-1, self.channels))[:, : self.channels // 2].flatten()
        return F.linear(x, weight, bias.to(x.dtype))
