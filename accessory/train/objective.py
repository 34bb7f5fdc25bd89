"""What is minimised: the language loss on what the assistant says, and an optional alignment of pictures to names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.data.emoji import concepts
from accessory.data.template import TEMPLATES
from accessory.data.tokenizer import Tokenizer
from accessory.models.align import Aligner
from accessory.models.mllm import MLLM
from accessory.nn.moe import MoEConfig, router_loss, routings
from accessory.schema import Batch
from accessory.tokens import IGNORE, IMAGE
from accessory.train.disjoint import RowGroup
from accessory.train.language import layout, next_token_losses


class Objective(Protocol):
    """What the loop minimises: ``(net, batch) -> (loss sum, count, metrics)``.

    Loss and metrics are sums over the ``count`` learned tokens of the batch, so that windows and ranks add up exactly;
    every call returns the same metrics.
    """

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor | float]]: ...


@dataclass(frozen=True)
class AlignConfig:
    """Classify a row's first picture among all emoji names, for rows of ``source`` (``NAME/SPLIT`` or the label of a
    file; None: of any). A drawn word, or one thing among several in a scene, may have such an answer too, and the whole
    picture must not be drawn to it.

    ``free_head`` adds the loss of a linear head over the tower's tokens, which teaches a tower fast from the start; it
    is fresh in every run, so a run that goes on from a trained tower leaves it out.

    ``swap`` is the share of these rows that are shown the projected tokens of another such row beside their own visual
    word (``model.projector.words``): the language model learns to take a name from the word, which carries over to
    drawings of another style, and not from details that do not.
    """

    source: str | None
    weight: float = 1.0
    smoothing: float = 0.0
    free_head: bool = True
    swap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.swap <= 1:
            raise ValueError(f"objective.align.swap is {self.swap}, it is a share between 0 and 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the parts. ``language`` 0 leaves the backbone out altogether (it warms up tower and projector).

    ``disjoint``: groups of rows that each train parameters of their own; none: every row trains everything.
    ``balance``: the weight of the loss that balances experts, in place of the one that the backbone's sizes state.
    """

    language: float = 1.0
    align: AlignConfig | None = None
    disjoint: tuple[RowGroup, ...] = ()
    balance: float | None = None

    def __post_init__(self) -> None:
        if self.language < 0 or (self.language == 0 and self.align is None):
            raise ValueError(f"objective: language weight {self.language} without align leaves nothing to learn")
        if self.balance is not None and self.balance < 0:
            raise ValueError(f"objective.balance {self.balance} must not be negative")


@dataclass(frozen=True)
class _Named:
    """Pictures (indices among the tiles) that are to be named, and their class indices."""

    picture: Tensor
    target: Tensor


class DialogueObjective:
    """Next-token loss on what the assistant says, beside the alignment of pictures where one is configured.

    Without the language part the count is that of aligned rows instead of tokens. ``chunk``: at most so many positions
    have their scores in memory at a time (``train.loss_chunk``).
    """

    def __init__(
        self, config: ObjectiveConfig, tokenizer: Tokenizer, cache: Path | None = None, chunk: int | None = None
    ) -> None:
        self.config = config
        self.chunk = chunk
        self.tokenizer = tokenizer
        self.cache = cache
        self.ends = _ends(tokenizer)
        self.experts: MoEConfig | None = None  # that of the model, with another balance

    def prepare(self, net: MLLM) -> None:
        """Give ``net`` the auxiliary head that the alignment needs; ValueError for an option that it has no use for."""
        if self.config.balance is not None:
            if net.backbone.config.moe is None:
                raise ValueError(f"objective.balance {self.config.balance} is for a mixture of experts")
            self.experts = replace(net.backbone.config.moe, balance=self.config.balance)
        if self.config.align is None:
            return
        names = [self.tokenizer.encode(c.label, glued=True) for c in concepts(self.cache)]
        table = net.backbone.tok_embeddings.weight
        if net.tower is None:
            raise ValueError("objective.align needs a model with a tower")
        width, free = net.tower.groups[0].width, self.config.align.free_head
        words = None if net.projector is None else net.projector.words
        if self.config.align.swap and words is None:
            raise ValueError("objective.align.swap needs visual words to learn from: set model.projector.words")
        aligner = Aligner(len(names), table.shape[1], width, free_head=free and words is None).to(table.device)
        aligner.set_answers(names, table.detach())
        if words is not None:
            aligner.fill_words(words, names, table.detach())
        net.aligner = aligner

    def __call__(self, model: MLLM, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor | float]]:
        """Loss sum and count (scalars), and metrics as sums over the count."""
        tokens = features = None
        if model.tower is not None and model.projector is not None:
            tokens = model.tower.tokens(batch.tiles)
            features = model.projector(tokens)
        total = count = torch.zeros((), device=batch.ids.device)
        metrics: dict[str, Tensor | float] = {}
        align, named = self.config.align, None
        if align is not None and features is not None:
            named = self._named(model, batch, features)
        if self.config.language:
            shown = features if named is None else self._swapped(model, features, named.picture)
            loss, count, router = self._language(model, batch, shown)
            metrics["language"] = loss.detach()
            total = loss * self.config.language
            if router is not None:
                metrics["router"] = router.detach() * count
                total = total + router * count
        if align is not None and named is not None and tokens is not None and features is not None:
            mean, rows, right = self._align(model, named, features, tokens[0])
            count = count if self.config.language else count + rows
            # Rows, not tokens: their quotient is the accuracy, and a batch may have none.
            metrics |= {"align": mean.detach() * count, "aligned_rows": rows, "aligned_right": right}
            total = total + align.weight * mean * count
        return total, count, metrics

    def _language(self, net: MLLM, batch: Batch, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss sum, count, and in training what the routers of a mixture of experts add to the mean."""
        # Rows are padded on the right, so causal attention never sees padding and needs no mask.
        experts, rows = self.experts or net.backbone.config.moe, layout(batch)
        with routings(net) if experts is not None and net.training else contextlib.nullcontext(()) as log:
            h = net(batch.ids, batch.tiles, features=features, counts=batch.counts, layout=rows)
        losses = next_token_losses(net.logits, h, batch.labels, rows, self.chunk)
        real = batch.mask.flatten() if rows is None else batch.mask.new_ones(h.shape[1])
        router = router_loss(experts, log, real) if experts is not None and log else None
        count = torch.tensor(len(losses), device=losses.device)
        return losses.sum(), count, router

    def _named(self, net: MLLM, batch: Batch, features: Tensor) -> _Named:
        assert isinstance(net.aligner, Aligner)
        assert self.config.align is not None
        tiles = (batch.ids == IMAGE).sum(1) // features.shape[1]
        first = tiles.cumsum(0) - tiles
        answers = [first_answer(row, self.ends) for row in batch.labels.tolist()]
        target = net.aligner.targets(answers).masked_fill(tiles == 0, IGNORE)
        if self.config.align.source is not None:
            ours = torch.tensor([name == self.config.align.source for name in batch.sources], device=target.device)
            target = target.masked_fill(~ours, IGNORE)
        use = target != IGNORE
        return _Named(first[use], target[use])

    def _swapped(self, net: MLLM, features: Tensor | None, picture: Tensor) -> Tensor | None:
        """Features in which a share of the named pictures have exchanged what is projected, and kept their words."""
        assert self.config.align is not None
        chosen = picture[torch.rand(len(picture), device=picture.device) < self.config.align.swap]
        if features is None or net.projector is None or not net.training or len(chosen) < 2:
            return features
        shown, n = features.clone(), net.projector.num_projected
        shown[chosen, :n] = features[chosen.roll(1), :n]
        return shown

    def _align(self, net: MLLM, named: _Named, features: Tensor, tokens: Tensor) -> tuple[Tensor, int, int]:
        """Mean loss over aligned rows, their number, and how many are right."""
        assert isinstance(net.aligner, Aligner)
        assert self.config.align is not None
        assert net.projector is not None
        if not len(named.target):
            return features.float().sum() * 0, 0, 0
        shown = features[named.picture, : net.projector.num_projected]
        heads = net.aligner(shown, tokens[named.picture], net.projector.words)
        scores, smoothing = heads[0], self.config.align.smoothing
        parts = [F.cross_entropy(s, named.target, label_smoothing=smoothing) for s in heads]
        return torch.stack(parts).mean(), len(named.target), int((scores.argmax(-1) == named.target).sum())


def _ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Control tokens that end a turn in any template, as far as this vocabulary has them."""
    found: set[int] = set()
    for name in {name for t in TEMPLATES.values() for name in t.stop_controls}:
        with contextlib.suppress(ValueError):
            found.add(tokenizer.special(name))
    return frozenset(found)


def first_answer(labels: list[int], ends: Collection[int]) -> list[int]:
    """Tokens of the first learned run, up to one that ends a turn."""
    answer: list[int] = []
    for label in labels:
        if label == IGNORE:
            if answer:
                break
        elif label in ends:
            break
        else:
            answer.append(label)
    return answer
