"""Latents as one sequence of tokens and back: patches, [nextline], [nextframe] and padding (Lumina-T2X, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Patch = tuple[int, int, int]
Size = tuple[int, int, int]
_EOL, _EOF, _PAD = -1, -2, -3


def grid_size(spatial: Sequence[int], patch: Patch) -> Size:
    """Patches along frames, rows and columns of latents (T,), (H, W) or (F, H, W).

    Raises:
        ValueError: for another number of axes, or a side that patches do not divide.
    """
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"latents are (C, T), (C, H, W) or (C, F, H, W); these have {len(spatial)} axes behind C")
    full = (1,) * (3 - len(spatial)) + tuple(spatial)
    if any(side % p or not side for side, p in zip(full, patch)):
        raise ValueError(f"latents of {tuple(spatial)} cannot be cut into patches of {patch} (frames, rows, columns)")
    frames, rows, columns = (side // p for side, p in zip(full, patch))
    return frames, rows, columns


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """(B, C, ...spatial) to (B, n, C * patch), the values of a token in the order (C, pf, ph, pw)."""
    frames, rows, columns = grid_size(x.shape[2:], patch)
    cut = x.reshape(x.shape[0], x.shape[1], frames, patch[0], rows, patch[1], columns, patch[2])
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(x.shape[0], frames * rows * columns, -1)


def unpatchify(y: Tensor, spatial: Sequence[int], patch: Patch) -> Tensor:
    """(B, n, patch * C) to (B, C, ...spatial), the values of a token being in the order (pf, ph, pw, C)."""
    frames, rows, columns = grid_size(spatial, patch)
    cut = y.reshape(y.shape[0], frames, rows, columns, *patch, -1)
    return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(y.shape[0], -1, *spatial)


@dataclass(frozen=True)
class Plan:
    """Where everything of a batch stands in its sequences. R is B, or 1 when all latents have one size.

    Attributes:
        shapes: spatial shapes of the latents, R of them.
        sizes: (R, 3) patches along frames, rows and columns.
        index: (R, T) which vector stands there: patch i, or n (the most patches of a row) for [nextline], n + 1 for
            [nextframe], n + 2 for padding. None when the patches alone, in their order, are the sequence.
        places: for each of R rows the positions of its patches; None as ``index``.
        coords: (R, T, 3) frame, row and column; padding repeats the last token's.
        mask: (B, T) boolean, True at tokens that count; None when all of them do.
        lengths: (R,) tokens that count.
    """

    shapes: tuple[tuple[int, ...], ...]
    sizes: Tensor
    index: Tensor | None
    places: tuple[Tensor, ...] | None
    coords: Tensor
    mask: Tensor | None
    lengths: Tensor

    @property
    def length(self) -> int:
        """T: positions of the padded sequence."""
        return self.coords.shape[1]

    def inside(self, box: tuple[float, float, float, float]) -> Tensor:
        """(R, T) boolean: patches whose centre lies in ``box`` (x1, y1, x2, y2), fractions of width and height.

        The left and upper edges belong to a box and the others do not, so boxes that tile a picture share no patch.
        """
        x = (self.coords[..., 2] + 0.5) / self.sizes[:, 2:]
        y = (self.coords[..., 1] + 0.5) / self.sizes[:, 1:2]
        found = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
        if self.index is None:
            return found
        return found & (self.index < self.sizes.prod(-1).max())


def plan(
    shapes: Sequence[Sequence[int]],
    patch: Patch,
    *,
    eol: bool,
    eof: bool,
    fixed_length: int | None = None,
    device: torch.device | None = None,
) -> Plan:
    """The plan for latents of these spatial ``shapes``: one for a batch of equal ones, or one for each.

    Raises:
        ValueError: for shapes that patches do not divide, or more tokens than ``fixed_length``.
    """
    sizes = [grid_size(shape, patch) for shape in shapes]
    rows = [_row(size, eol, eof) for size in sizes]
    longest = max(len(index) for index, _ in rows)
    length = longest if fixed_length is None else fixed_length
    if longest > length:
        raise ValueError(f"latents of {longest} tokens do not fit into the fixed length of {length}")
    most = max(f * h * w for f, h, w in sizes)
    real = torch.tensor([len(index) for index, _ in rows])
    index = torch.stack([F.pad(index, (0, length - len(index)), value=_PAD) for index, _ in rows])
    coords = torch.stack([torch.cat([c, c[-1:].expand(length - len(c), 3)]) for _, c in rows])
    ragged = fixed_length is None and bool((real < length).any())
    mask = torch.arange(length) < real[:, None] if ragged else None
    # Latents of other shapes may have as many tokens; each still has places of its own.
    bare = len(rows) == 1 and not eol and not eof and bool((real == length).all())
    places = tuple((row >= 0).nonzero()[:, 0].to(device) for row in index)
    # [nextline], [nextframe] and padding stand behind the most patches that a row has.
    index = torch.where(index < 0, most - 1 - index, index)
    return Plan(
        shapes=tuple(tuple(shape) for shape in shapes),
        sizes=torch.tensor(sizes, device=device),
        index=None if bare else index.to(device),
        places=None if bare else places,
        coords=coords.to(device),
        mask=None if mask is None else mask.to(device),
        lengths=(real if fixed_length is None else torch.full_like(real, length)).to(device),
    )


def _row(size: Size, eol: bool, eof: bool) -> tuple[Tensor, Tensor]:
    """Codes (T,) and coordinates (T, 3) of one sequence: patch numbers, or what is negative for separators."""
    frames, rows, columns = size
    patches = torch.arange(frames * rows * columns).view(frames, rows, columns)
    codes = F.pad(patches, (0, int(eol)), value=_EOL)  # (F, H, W + 1)
    axes = (torch.arange(frames), torch.arange(rows), torch.arange(columns + int(eol)))
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    codes, coords = codes.flatten(1), coords.flatten(1, 2)  # (F, H * (W + 1)), (F, H * (W + 1), 3)
    if eof:
        # [nextframe] stands where the next row would begin.
        end = torch.stack(
            [torch.arange(frames), torch.full((frames,), rows), torch.zeros(frames, dtype=torch.long)], -1
        )
        codes = F.pad(codes, (0, 1), value=_EOF)
        coords = torch.cat([coords, end[:, None]], 1)
    return codes.flatten(), coords.flatten(0, 1)
