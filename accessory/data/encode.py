"""From a dialogue to ids, labels and tiles."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from accessory.data.image import open_picture
from accessory.data.rows import RowRejected as RowRejected
from accessory.data.targets import Fit, target
from accessory.data.template import BOS, Control, Segment, Template, render
from accessory.data.tiling import TilePlan, TilingConfig, cut
from accessory.data.tokenizer import Tokenizer
from accessory.schema import IDS, Encoded, Picture, Sample, Target, Turn
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IGNORE, IMAGE, IMAGE_END, IMAGE_START, SKIP


@dataclass(frozen=True)
class DreamLayout:
    """How a picture that the assistant draws is written: a span of ``num_queries`` queries, of which the trigger is
    learned, then, with ``seen``, the picture itself as the user's are. ``size``: side in pixels of what is drawn,
    squares unless ``fit`` gives each picture its own size (see :func:`accessory.data.targets.target`)."""

    num_queries: int
    size: int
    seen: bool = True
    fit: Fit | None = None


class Encoder:
    """Writes a sample as ids with placeholders, labels on what the assistant says, and its real tiles.

    With ``dream`` the assistant's pictures are targets.

    A real tile becomes ``tokens_per_tile`` image placeholders (between a start and an end placeholder when
    ``start_end``), or several such runs where that is a sequence of numbers, one for every view that the tower takes of
    a tile; a blank one becomes a single skip placeholder. Rows longer than ``max_length`` positions are rejected whole:
    no run of placeholders is ever cut. ``tokens_per_tile`` None: pictures leave no placeholder at all, not even blank
    tiles do, because they enter elsewhere (LLaMA-Adapter). ``max_tiles``: the most that a dialogue may bring.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        tiling: TilingConfig,
        tokens_per_tile: int | Sequence[int] | None,
        max_length: int,
        start_end: bool = False,
        dream: DreamLayout | None = None,
        max_tiles: int | None = None,
    ) -> None:
        given = (tokens_per_tile,) if isinstance(tokens_per_tile, int) else tokens_per_tile
        self.runs = () if given is None else tuple(given)
        if (given is not None and min(self.runs, default=0) < 1) or max_length < 2:
            raise ValueError(f"tokens_per_tile {tokens_per_tile} must be at least 1 and max_length {max_length} 2")
        self.tokenizer = tokenizer
        self.template = template
        self.tiling = tiling
        self.tokens_per_tile = sum(self.runs)
        self.max_length = max_length
        self.start_end = start_end
        self.dream = dream
        self.max_tiles = max_tiles

    def under(self, template: Template, dream: DreamLayout | None = None, max_length: int | None = None) -> Encoder:
        """The same, writing dialogues by another template; what is None stays too."""
        made = copy.copy(self)
        made.template = template
        made.dream = self.dream if dream is None else dream
        made.max_length = self.max_length if max_length is None else max_length
        return made

    @property
    def positions_per_tile(self) -> int:
        """What a real tile costs."""
        return len(tile_ids(self.runs, self.start_end))

    @property
    def tile_size(self) -> int:
        """S of the tiles (N,3,S,S)."""
        return self.tiling.size

    @property
    def pad_id(self) -> int:
        """What stands in ``ids`` behind the end of a row."""
        return self.tokenizer.pad_id

    def encode(self, sample: Sample, *, generate: bool = False) -> Encoded:
        """The sample's row; with ``generate`` it ends with the assistant's prompt. Raises :class:`RowRejected`."""
        try:
            return self._encode(sample, generate)
        except RowRejected:
            raise
        except ValueError as error:
            raise RowRejected(str(error), sample.source, sample.index) from error

    def _encode(self, sample: Sample, generate: bool) -> Encoded:
        row = self.packed(sample.meta[IDS]) if IDS in sample.meta else self.row(sample.turns, generate=generate)
        if len(row.ids) > self.max_length:
            n, pictures = len(row.ids), int((row.ids < 0).sum())
            reason = f"{n} positions ({pictures} of them pictures), the limit is {self.max_length}"
            raise RowRejected(reason, sample.source, sample.index, "too-long")
        if not generate and not bool((row.labels != IGNORE).any()):
            reason = "nothing to learn: the assistant says nothing"
            raise RowRejected(reason, sample.source, sample.index, "no-label")
        return replace(row, source=sample.source, index=sample.index)

    def packed(self, ids: list[int]) -> Encoded:
        """A row of ids as they are, all of them learned. Raises ValueError for ids that the vocabulary lacks."""
        if max(ids) >= self.tokenizer.vocab_size:
            raise ValueError(f"id {max(ids)} is not in this vocabulary of {self.tokenizer.vocab_size}")
        made = torch.tensor(ids, dtype=torch.long)
        return Encoded(made, made.clone(), torch.zeros(0, 3, self.tiling.size, self.tiling.size))

    def row(self, turns: Sequence[Turn], *, generate: bool = False) -> Encoded:
        """Ids, labels and tiles of turns, whatever their length; ValueError for more tiles than ``max_tiles``."""
        ids: list[int] = []
        labels: list[int] = []
        tiles: list[torch.Tensor] = []
        glued = False  # whether a text now continues an earlier one
        targets: list[Target] = []
        draws = self.dream is not None
        answered = any(t.role == "assistant" and (t.text.strip() or (draws and t.pictures)) for t in turns)
        for segment in render(self.template, turns, generate=generate):
            said = segment.learn and answered
            if self.dream is not None and isinstance(segment.content, Picture) and segment.learn:
                piece = self._drawn(self.dream, segment.content, tiles, targets)
                ids += piece
                labels += [i if said and i == DREAM_START else IGNORE for i in piece]
                continue
            piece = self._ids(segment, glued, tiles)
            ids += piece
            labels += piece if said and not isinstance(segment.content, Picture) else [IGNORE] * len(piece)
            if isinstance(segment.content, str):
                glued = True
            elif segment.content == BOS:
                glued = False
        pixels = torch.cat(tiles) if tiles else torch.zeros(0, 3, self.tiling.size, self.tiling.size)
        if self.max_tiles is not None and len(pixels) > self.max_tiles:
            raise ValueError(
                f"{sum(len(t.pictures) for t in turns)} pictures ({len(pixels)} tiles) in one dialogue, this model "
                f"takes {self.max_tiles} through its visual prefix (model.resampler.max_tiles)"
            )
        return Encoded(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(labels, dtype=torch.long),
            pixels,
            targets=tuple(targets),
        )

    def _drawn(
        self, dream: DreamLayout, picture: Picture, tiles: list[torch.Tensor], targets: list[Target]
    ) -> list[int]:
        targets.append(target(picture, dream.size, fit=dream.fit))
        span = [DREAM_START, *[DREAM] * dream.num_queries, DREAM_END]
        return [*span, *(self._picture(picture, tiles) if dream.seen else ())]

    def _ids(self, segment: Segment, glued: bool, tiles: list[torch.Tensor]) -> list[int]:
        content = segment.content
        if isinstance(content, str):
            return self.tokenizer.encode(content, glued=glued)
        if isinstance(content, Control):
            return [self.tokenizer.special(content.name)]
        return self._picture(content, tiles)

    def _picture(self, picture: Picture, tiles: list[torch.Tensor]) -> list[int]:
        image = open_picture(picture.source)
        plan = self.tiling.plan(*image.size)
        tiles.append(cut(image, plan))
        return self.picture_ids(plan)

    def picture_ids(self, plan: TilePlan) -> list[int]:
        """The placeholders of a picture that is cut by ``plan``."""
        if not self.runs:
            return []
        real = tile_ids(self.runs, self.start_end)
        return [i for tile in plan.tiles for i in ([SKIP] if tile.blank else real)]


def tile_ids(runs: Sequence[int], start_end: bool) -> list[int]:
    """The placeholders of one real tile: of every view its features, between start and end with ``start_end``."""
    out: list[int] = []
    for length in runs:
        features = [IMAGE] * length
        out += [IMAGE_START, *features, IMAGE_END] if start_end else features
    return out
