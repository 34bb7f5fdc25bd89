"""What a denoiser is told: the one value that every conditioner makes and every denoiser takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditions of B pictures. A part that a conditioner does not make is None; a denoiser that needs it says so.

    Attributes:
        seq: (B, L, C) text features or dream states. Rows of padding may hold anything.
        mask: (B, L) boolean, True where ``seq`` is real. It travels with ``seq``, always.
        pooled: (B, P) one vector a picture (SDXL's pooled text, for instance). None does not mean zero: a denoiser
            that pools ``seq`` by itself (Flag-DiT) does so then.
        labels: (B,) class ids of label-conditional denoisers.
        sizes: (B, 6) SDXL's original height and width, crop top and left, target height and width, in pixels.

    Raises:
        ValueError: when the parts do not fit each other; both shapes are named.
    """

    seq: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    labels: Tensor | None = None
    sizes: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.seq is None) != (self.mask is None):
            raise ValueError("a condition's seq and mask come together: one of them is missing")
        if self.seq is not None and self.mask is not None:
            if self.mask.dtype != torch.bool:
                raise ValueError(f"a condition's mask is boolean, this one is {self.mask.dtype}")
            if self.seq.ndim != 3 or self.mask.shape != self.seq.shape[:2]:
                raise ValueError(
                    f"seq {tuple(self.seq.shape)} and mask {tuple(self.mask.shape)} are not (B, L, C), (B, L)"
                )
        batches = {name: len(part) for name, part in self.parts().items()}
        if len(set(batches.values())) != 1:
            raise ValueError(f"a condition's parts must be of one batch, at least one of them given: {batches}")

    def parts(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    def __len__(self) -> int:
        return len(next(iter(self.parts().values())))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved; ``dtype`` is for the features alone, masks and labels keep theirs."""
        moved = {
            name: part.to(device=device, dtype=dtype if part.is_floating_point() and name != "sizes" else None)
            for name, part in self.parts().items()
        }
        return replace(self, **moved)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Condition:
        """The conditions of some pictures, in the order asked for (a slice, indices, or a (B,) boolean mask)."""
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(rows, dtype=torch.long)
        return replace(self, **{name: part[index] for name, part in self.parts().items()})

    def padded(self, length: int) -> Condition:
        """``seq`` and ``mask`` filled with zeros on the right to ``length`` positions.

        Raises:
            ValueError: when they are longer already.
        """
        if self.seq is None or self.mask is None or self.seq.shape[1] == length:
            return self
        missing = length - self.seq.shape[1]
        if missing < 0:
            raise ValueError(f"a condition of {self.seq.shape[1]} positions cannot be padded to {length}")
        return replace(self, seq=F.pad(self.seq, (0, 0, 0, missing)), mask=F.pad(self.mask, (0, missing)))

    def trimmed(self) -> Condition:
        """Without the columns on the right that are padding in every row; one column always stays."""
        if self.seq is None or self.mask is None:
            return self
        used = self.mask.any(0).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        return replace(self, seq=self.seq[:, :length], mask=self.mask[:, :length])

    def where(self, drop: Tensor, null: Condition) -> Condition:
        """Rows with ``drop`` (B,) True become ``null`` (one row, or B rows of the same parts): the null policy.

        Raises:
            ValueError: when the two have different parts: a null must have the layout of what it stands for.
        """
        a, b = _aligned([self, null])
        merged = {}
        for name, part in a.parts().items():
            other = getattr(b, name).to(part).expand_as(part)
            merged[name] = torch.where(drop.reshape(-1, *[1] * (part.ndim - 1)), other, part)
        return replace(a, **merged)


def join(conditions: Sequence[Condition]) -> Condition:
    """One batch of several, ``seq`` padded on the right to the longest.

    Raises:
        ValueError: for none, or when they have different parts.
    """
    aligned = _aligned(conditions)
    names = aligned[0].parts()
    return Condition(**{name: torch.cat([getattr(c, name) for c in aligned]) for name in names})


def _aligned(conditions: Sequence[Condition]) -> list[Condition]:
    if not conditions:
        raise ValueError("no conditions to join")
    layouts = {tuple(c.parts()) for c in conditions}
    if len(layouts) != 1:
        raise ValueError(f"conditions of different parts cannot be joined: {sorted(layouts)}")
    length = max((c.seq.shape[1] for c in conditions if c.seq is not None), default=0)
    return [c.padded(length) if length else c for c in conditions]
