"""The multimodal model: a backbone, a tower and the projector that joins them."""

import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.models.splice import splice
from accessory.nn.cache import KVCache
from accessory.nn.ragged import Ragged
from accessory.tokens import IMAGE, IMAGE_END, IMAGE_START, SKIP
from accessory.vision.projector import Projector
from accessory.vision.resampler import Resampler
from accessory.vision.tower import Tower


class MLLM(nn.Module):
    """Text with pictures in, hidden states out; the same forward trains, scores, prefills and decodes.

    Slots: ``tower`` and ``projector`` (both or neither), ``resampler`` (LLaMA-Adapter's visual prefix: the picture
    enters through the prefix of the attention layers; without a projector a tile leaves one position, of zeros, that
    says where it belongs), ``aligner`` (an auxiliary head of training, see ``models/align.py``).
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

    def encode(self, tiles: Tensor) -> Tensor:
        """Projected features (N, P, D) of tiles (N, 3, S, S) in [0, 1]."""
        if self.tower is None or self.projector is None:
            raise ValueError("this model has no tower: it reads text only")
        return self.projector(self.tower.tokens(tiles))

    def context(self, ids: Tensor, tiles: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """Visual prefix (B, M, D) of the tiles (N, 3, S, S) in ids (B, T): the mean over a row's tiles, zeros where it
        has none. None for a model that does not see through its prefix.

        ``counts`` (B) says how many tiles each row has where ids hold no placeholders for them: published
        LLaMA-Adapters give a picture no position at all.

        Raises:
            ValueError: when placeholders and tiles differ in number; both are named.
        """
        if self.tower is None or self.resampler is None:
            return None
        if counts is None:
            per_tile = 1 if self.projector is None else self.projector.num_tokens
            counts = (ids == IMAGE).sum(1) // per_tile
        if int(counts.sum()) != tiles.shape[0]:
            raise ValueError(f"the batch has placeholders of {int(counts.sum())} tiles, but there are {len(tiles)}")
        prefix = self.resampler(self.tower(tiles).sequence())
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        total = prefix.new_zeros(len(ids), *prefix.shape[1:]).index_add(0, rows, prefix)
        return total / counts.clamp_min(1)[:, None, None]

    def embed(self, ids: Tensor, tiles: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Input vectors (B, T, D) of ids (B, T): token embeddings, with placeholders overwritten.

        ``features`` (N, P, D) spares encoding ``tiles`` (N, 3, S, S) again.

        Raises:
            ValueError: when placeholders and features differ in number, or stand where no tower is.
        """
        x = self.backbone.embed(ids)
        if self.projector is None:
            if self.resampler is not None:
                return x.masked_fill((ids < 0)[..., None], 0)
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
        layout: Ragged | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D) of ids (B, T) and the tiles (N, 3, S, S) that their placeholders stand for.

        ``mask``, ``positions`` and ``cache`` as in :meth:`accessory.backbone.llama.Llama.forward`; ``context`` (from
        :meth:`context`) goes with every later step of a dialogue whose pictures are in the cache.

        ``layout``: of right-padded ids; they are computed as one row without padding, in which none sees
        another, and the states are (1, N, D).
        """
        x = self.embed(ids if layout is None else layout.flat(ids), tiles, features)
        if context is None and tiles is not None:
            context = self.context(ids, tiles)
        seen = mask if layout is None else layout
        return self.backbone(x, mask=seen, positions=positions, cache=cache, context=context)

    def logits(self, h: Tensor) -> Tensor:
        """Vocabulary scores (..., V) of hidden states (..., D)."""
        return self.backbone.logits(h)
