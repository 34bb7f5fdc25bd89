"""The multimodal model: a backbone, a tower and the projector that joins them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.data.encode import tile_ids
from accessory.models.splice import splice
from accessory.nn.cache import KVCache
from accessory.nn.ragged import Ragged
from accessory.schema import Encoded
from accessory.tokens import IMAGE, IMAGE_END, IMAGE_START, SKIP
from accessory.vision.projector import Projector
from accessory.vision.resampler import Resampler
from accessory.vision.tower import Tower


class MLLM(nn.Module):
    """Text with pictures in, hidden states out; the same forward trains, scores, prefills and decodes.

    Slots: ``tower`` and ``projector`` (both or neither), ``resampler`` (LLaMA-Adapter's visual prefix: the picture
    enters through the prefix of the attention layers; without a projector it takes no position), ``aligner`` (an
    auxiliary head of training, see ``models/align.py``).
    """

    tower: Tower | None
    projector: Projector | None
    resampler: Resampler | None
    aligner: nn.Module | None

    def __init__(
        self,
        backbone: Llama,
        tower: Tower | None = None,
        projector: Projector | None = None,
        resampler: Resampler | None = None,
        aligner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (tower is None) != (projector is None and resampler is None):
            raise ValueError("a tower needs a projector or a resampler, and either of them needs a tower")
        if resampler is not None and tower is not None and len(tower.runs) > 1:
            raise ValueError(f"a resampler takes one view of a picture, this tower has {len(tower.runs)}")
        self.backbone = backbone
        self.register_module("tower", tower)
        self.register_module("projector", projector)
        self.register_module("resampler", resampler)
        self.register_module("aligner", aligner)

    @property
    def runs(self) -> tuple[int, ...] | None:
        """Positions of the views of a tile; None where it takes none, because it enters through the prefix alone."""
        if self.tower is not None and self.projector is not None:
            return self.projector.runs(self.tower.runs)
        return (1,) if self.resampler is None else None

    @property
    def positions_per_tile(self) -> int:
        """Places in the sequence that a tile takes, marks included."""
        if self.projector is None:
            return 0
        return len(tile_ids(self.runs or (), self.projector.start_end))

    def encode(self, tiles: Tensor) -> Tensor:
        """Projected features (N, P, D) of tiles (N, 3, S, S) in [0, 1]."""
        if self.tower is None or self.projector is None:
            raise ValueError("this model has no tower: it reads text only")
        return self.projector(self.tower.tokens(tiles))

    def prefixes(self, tiles: Tensor) -> Tensor:
        """What each of the tiles (N, 3, S, S) brings to the prefixes: (N, M, D)."""
        if self.tower is None or self.resampler is None:
            raise ValueError("this model has no resampler: no picture enters through its prefixes")
        return self.resampler(self.tower(tiles).sequence())

    def context(
        self, ids: Tensor, tiles: Tensor, counts: Tensor | None = None, prefixes: Tensor | None = None
    ) -> Tensor | None:
        """Visual prefix (B, M, D) of the tiles (N, 3, S, S) of ids (B, T): the mean over a row's tiles, zeros where it
        has none. None for a model that does not see through its prefix.

        ``counts`` (B): the tiles of each row. None: as its placeholders say, which needs a projector; without one all
        tiles are those of the only row. ``prefixes`` (N, M, D) spares encoding the tiles again.

        Raises:
            ValueError: when rows and tiles differ in number, both are named, or nothing says whose the tiles are.
        """
        if self.resampler is None:
            return None
        if counts is None and self.projector is not None:
            counts = (ids == IMAGE).sum(1) // self.projector.num_tokens
        elif counts is None and len(ids) > 1:
            raise ValueError(f"{len(tiles)} tiles for {len(ids)} rows: which are whose? counts must say it")
        elif counts is None:
            counts = torch.tensor([len(tiles)], device=ids.device)
        if int(counts.sum()) != tiles.shape[0]:
            raise ValueError(f"the batch has placeholders of {int(counts.sum())} tiles, but there are {len(tiles)}")
        if prefixes is None:
            prefixes = self.prefixes(tiles)
        return _means(prefixes, counts)

    def prompts(self, rows: Sequence[Encoded]) -> tuple[list[Tensor], Tensor | None]:
        """Input vectors (T, D) of every row, and the visual prefixes (B, M, D) of all of them, None where no row has a
        picture that enters so. The tiles of all rows are encoded together; all moves to the model's device."""
        device = next(self.parameters()).device
        tiles = torch.cat([r.tiles for r in rows]).to(device)
        features = self.encode(tiles) if self.projector is not None and len(tiles) else None
        x, at = list[Tensor](), 0
        for row in rows:
            n = len(row.tiles)
            mine = None if features is None or n == 0 else features[at : at + n]
            x.append(self.embed(row.ids[None].to(device), features=mine)[0])
            at += n
        if self.resampler is None or not len(tiles):
            return x, None
        return x, _means(self.prefixes(tiles), torch.tensor([len(r.tiles) for r in rows], device=device))

    def embed(self, ids: Tensor, tiles: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Input vectors (B, T, D) of ids (B, T): token embeddings, with placeholders overwritten.

        ``features`` (N, P, D) spares encoding ``tiles`` (N, 3, S, S) again.

        Raises:
            ValueError: when placeholders and features differ in number, or stand where no tower is.
        """
        x = self.backbone.embed(ids)
        if self.projector is None:
            if bool((ids == IMAGE).any()):
                raise ValueError("the input holds <image> placeholders, but this model splices no pictures")
            return x
        if features is None and tiles is not None:
            features = self.encode(tiles)
        if features is not None:
            x = splice(x, ids == IMAGE, features.flatten(0, 1), "image")
        elif bool((ids == IMAGE).any()):
            raise ValueError("the input holds <image> placeholders, but no tiles came with it")
        return self._learned_vectors(x, ids)

    def _learned_vectors(self, x: Tensor, ids: Tensor) -> Tensor:
        projector = self.projector
        assert projector is not None
        vectors = {
            SKIP: projector.skip,
            IMAGE_START: getattr(projector, "start_img", None),
            IMAGE_END: getattr(projector, "end_img", None),
        }
        for placeholder, vector in vectors.items():
            if vector is not None:
                where = ids == placeholder
                x = splice(x, where, vector.reshape(1, -1).expand(int(where.sum()), -1))
        return x

    def forward(
        self,
        ids: Tensor,
        tiles: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        counts: Tensor | None = None,
        layout: Ragged | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D) of ids (B, T) and the tiles (N, 3, S, S) that their placeholders stand for.

        ``mask``, ``positions`` and ``cache`` as in :meth:`accessory.backbone.llama.Llama.forward`; ``context`` spares
        making it, see :meth:`context` for ``counts``. Later steps over a cache go on with the context of its first.

        ``layout``: of right-padded ids; they are computed as one row without padding, in which none sees
        another, and the states are (1, N, D).
        """
        x = self.embed(ids if layout is None else layout.flat(ids), tiles, features)
        if context is None and tiles is not None:
            context = self.context(ids, tiles, counts)
        seen = mask if layout is None else layout
        return self.backbone(x, mask=seen, positions=positions, cache=cache, context=context)

    def logits(self, h: Tensor) -> Tensor:
        """Vocabulary scores (..., V) of hidden states (..., D)."""
        return self.backbone.logits(h)


def _means(prefixes: Tensor, counts: Tensor) -> Tensor:
    """The mean (B, M, D) of each row's part of (N, M, D), zeros where a row has none; ``counts`` (B) add up to N."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    total = prefixes.new_zeros(len(counts), *prefixes.shape[1:]).index_add(0, rows, prefixes)
    return total / counts.clamp_min(1)[:, None, None]
