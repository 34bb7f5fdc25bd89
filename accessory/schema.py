"""The values that travel between packages: pictures, turns, samples, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Picture:
    """A picture at its place in a dialogue: a file path or an already decoded PIL image."""

    source: str | PILImage.Image


Part = str | Picture


@dataclass(frozen=True)
class Turn:
    """What one side says: text and pictures in reading order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text alone, pictures left out."""
        return "".join(p for p in self.parts if isinstance(p, str))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures alone, in order."""
        return tuple(p for p in self.parts if isinstance(p, Picture))


@dataclass(frozen=True)
class Sample:
    """One dialogue. ``source`` and ``index`` say where it came from (file or set name, row)."""

    turns: tuple[Turn, ...]
    source: str = ""
    index: int = -1
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample: T positions and the N real tiles that its ``<image>`` runs stand for.

    ``ids`` (T) with placeholders, ``labels`` (T) with -100 where nothing is learned, ``tiles`` (N,3,S,S) in [0,1].
    """

    ids: Tensor
    labels: Tensor
    tiles: Tensor
    source: str = ""
    index: int = -1


@dataclass(frozen=True)
class Batch:
    """Right-padded samples. ``ids``, ``labels``, ``mask`` (B,T); ``tiles`` (N,3,S,S) in reading order of the batch.

    ``mask`` is True on real positions. N may be 0.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    tiles: Tensor
    sources: tuple[str, ...] = ()

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.ids.to(device), self.labels.to(device), self.mask.to(device), self.tiles.to(device), self.sources
        )
