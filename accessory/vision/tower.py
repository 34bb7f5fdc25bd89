"""The contract of an encoder: pixels of square tiles in, tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionTokens:
    """What a tower saw: ``cls`` (N,C) or None, ``patches`` (N,P,C) row-major over ``grid`` (rows, cols)."""

    cls: Tensor | None
    patches: Tensor
    grid: tuple[int, int]

    def sequence(self) -> Tensor:
        """(N,P,C), or (N,1+P,C) with the class token in front where there is one."""
        return self.patches if self.cls is None else torch.cat([self.cls[:, None], self.patches], dim=1)


@dataclass(frozen=True)
class TokenGroup:
    """A run of tokens of one width; groups of one name share a projection. ``num_tokens`` is per tile."""

    name: str
    width: int
    num_tokens: int


class Tower(nn.Module, ABC):
    """An encoder of square tiles; it owns its mean and std, its input size and its grid.

    ``size`` is the side S of a tile in pixels, ``width`` the channels C of a token, ``grid`` the rows and columns
    of patches, ``has_cls`` whether a class token leads. Subclasses implement :meth:`encode`. ``bgr``: the encoder is
    shown blue as red and red as blue, normalised as if they were not, as some published models were trained.
    """

    bgr = False

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        grid: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        has_cls: bool = False,
        group: str = "visual",
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values each, std above 0, got {tuple(mean)} and {tuple(std)}")
        self.size, self.width, self.grid, self.has_cls, self.group = size, width, grid, has_cls, group
        self._constants = (tuple(mean), tuple(std))
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(3, 1, 1), persistent=False)

    @abstractmethod
    def encode(self, pixels: Tensor) -> VisionTokens:
        """Normalised pixels (N,3,S,S), N > 0, in the encoder's dtype, to tokens."""

    @property
    def groups(self) -> tuple[TokenGroup, ...]:
        """The token groups of a tile, in the order of :meth:`tokens`."""
        return (TokenGroup(self.group, self.width, self.grid[0] * self.grid[1] + int(self.has_cls)),)

    @property
    def runs(self) -> tuple[int, ...]:
        """Tokens of every view of a tile; their sum is that of :attr:`groups`."""
        return (sum(g.num_tokens for g in self.groups),)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the encoder's weights (float32 for an encoder without any)."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def check(self, pixels: Tensor) -> None:
        """ValueError unless pixels are (N,3,S,S) floats."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, self.size, self.size):
            want = f"(N, 3, {self.size}, {self.size})"
            raise ValueError(f"tiles have shape {tuple(pixels.shape)}, this tower takes {want}")
        if not pixels.is_floating_point():
            raise ValueError(f"tiles are {pixels.dtype}, this tower takes floats in [0, 1]")

    def normalise(self, pixels: Tensor) -> Tensor:
        """(x - mean) / std in float32, then the encoder's dtype."""
        pixels = pixels.flip(1) if self.bgr else pixels
        return ((pixels.float() - self.mean) / self.std).to(self.dtype)

    def forward(self, pixels: Tensor) -> VisionTokens:
        """Pixels (N,3,S,S) in [0, 1], un-normalised, to tokens; N = 0 gives empty tensors of the right shape."""
        self.check(pixels)
        if pixels.shape[0] == 0:  # some kernels reject an empty batch
            patches = pixels.new_zeros(0, self.grid[0] * self.grid[1], self.width, dtype=self.dtype)
            return VisionTokens(patches.new_zeros(0, self.width) if self.has_cls else None, patches, self.grid)
        return self.encode(self.normalise(pixels))

    def tokens(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """One (N, tokens, width) tensor a group: what the projector consumes."""
        return (self(pixels).sequence(),)

    def train(self, mode: bool = True) -> Self:
        """Like nn.Module.train, but a frozen encoder stays in eval (the Q-Former has dropout), and so does batch norm:
        its statistics never move, its affine part may learn."""
        super().train(mode and any(p.requires_grad for p in self.parameters()))
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep mean and std exact: they stay float32 under ``.to(bfloat16)`` and are real again after ``to_empty``."""
        super()._apply(fn, recurse)
        for name, values in zip(("mean", "std"), self._constants, strict=True):
            device = getattr(self, name).device
            setattr(self, name, torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1))
        return self


def repeat_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N,C,h,w) to (N,C,rows,cols): the same, each cell repeated, or ValueError where the sizes do not divide."""
    h, w = x.shape[-2:]
    if grid[0] % h or grid[1] % w:
        raise ValueError(f"a {h}x{w} map cannot be repeated to {grid[0]}x{grid[1]}")
    if (h, w) == grid:
        return x
    return x.repeat_interleave(grid[0] // h, dim=2).repeat_interleave(grid[1] // w, dim=3)


def bring_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (N,C,h,w) on a common grid: a coarser one is repeated, a finer one folded into f*f times the channels.

    The fold is torch's ``pixel_unshuffle``: channel ``c*f*f + dy*f + dx``. Nothing is averaged away.
    """
    h, w = x.shape[-2:]
    if h <= grid[0]:
        return repeat_to(x, grid)
    factor = h // grid[0]
    if (h, w) != (grid[0] * factor, grid[1] * factor):
        raise ValueError(f"a {h}x{w} map cannot be folded to {grid[0]}x{grid[1]}")
    return nn.functional.pixel_unshuffle(x, factor)


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, rows*cols, C) row-major to (N,C,rows,cols)."""
    n, _, c = patches.shape
    return patches.transpose(1, 2).reshape(n, c, *grid)


def to_patches(x: Tensor) -> Tensor:
    """(N,C,rows,cols) to (N, rows*cols, C) row-major."""
    return x.flatten(2).transpose(1, 2)
