"""The values that travel between packages: pictures, turns, samples, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

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


CAPTION: Final = "caption"
"""Key of ``Sample.meta``: true where the user's turn describes the picture and is no turn of a dialogue."""

IDS: Final = "ids"
"""Key of ``Sample.meta``: ids of a packed row, all of them learned; it has no turns."""

Prompt = str | tuple[Turn, ...]
"""What a picture is asked for with: a description, or the dialogue before it."""


@dataclass(frozen=True)
class Target:
    """A picture to be drawn.

    ``pixels`` (3,H,W) in [0,1]; ``prompt``, which is empty where the row's ids hold a dream span for the picture;
    ``key``: equal for equal pixels alone, for caches of latents.
    """

    pixels: Tensor
    prompt: Prompt = ""
    key: str = ""


@dataclass(frozen=True)
class Encoded:
    """A tokenised sample: T positions and the N real tiles that its ``<image>`` runs stand for.

    ``ids`` (T) with placeholders, ``labels`` (T) with -100 where nothing is learned, ``tiles`` (N,3,S,S) in [0,1].
    ``targets``: the pictures that it asks for, in reading order; T is 0 for rows that are a prompt and a picture.
    ``draw``: number of the row among all draws of all ranks.
    """

    ids: Tensor
    labels: Tensor
    tiles: Tensor
    source: str = ""
    index: int = -1
    targets: tuple[Target, ...] = ()
    draw: int = -1


@dataclass(frozen=True)
class Targets:
    """The P pictures that a batch asks for, in its reading order.

    ``pixels`` (P,3,H,W) in [0,1], or a list of (3,H,W) of unequal sizes; ``prompts`` and ``keys`` as of
    :class:`Target`; ``places``: (draw, number within its row) of every picture, from which its noise is drawn: they
    are the same whatever rank and batch a row falls to.
    """

    pixels: Tensor | list[Tensor]
    prompts: tuple[Prompt, ...]
    keys: tuple[str, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def to(self, device: Any) -> Targets:
        """The same pictures on another device."""
        pixels = [p.to(device) for p in self.pixels] if isinstance(self.pixels, list) else self.pixels.to(device)
        return replace(self, pixels=pixels)


@dataclass(frozen=True)
class Batch:
    """Right-padded samples. ``ids``, ``labels``, ``mask`` (B,T); ``tiles`` (N,3,S,S) in reading order of the batch.

    ``mask`` is True on real positions. N may be 0, and T for prompts with their pictures, which are ``targets``.
    ``counts`` (B): the tiles of each row, which its ids do not say where pictures take no position; None: only they do.
    ``packed``: the language model reads the samples one behind the other in a single row, without their padding and
    without one seeing another; whatever belongs to a sample (its labels, tiles, source, targets) is where it always is.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    tiles: Tensor
    sources: tuple[str, ...] = ()
    targets: Targets | None = None
    counts: Tensor | None = None
    packed: bool = False

    @property
    def images(self) -> int:
        """Tiles that are seen and pictures that are drawn."""
        return self.tiles.shape[0] + (0 if self.targets is None else len(self.targets))

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.ids.to(device),
            self.labels.to(device),
            self.mask.to(device),
            self.tiles.to(device),
            self.sources,
            None if self.targets is None else self.targets.to(device),
            None if self.counts is None else self.counts.to(device),
            self.packed,
        )
