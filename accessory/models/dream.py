"""The dream bridge: a language model's states become the condition of a denoiser (DreamLLM, Dong et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from accessory.backbone.llama import tap_layers
from accessory.diffusion.condition import Condition, join
from accessory.models.connector import Connector, Heads, Mix
from accessory.models.dream_config import DreamConfig as DreamConfig
from accessory.models.dream_config import Residual as Residual
from accessory.models.dream_config import TapConfig as TapConfig
from accessory.models.dream_queries import QueryNoise
from accessory.models.dream_spans import DreamSpan, Drop, hide_packed, hide_spans, is_prompt, prompts, without
from accessory.models.mllm import MLLM
from accessory.models.splice import splice
from accessory.nn.cache import KVCache, Past
from accessory.nn.linear import stated
from accessory.nn.quantized import Quantized
from accessory.nn.ragged import Ragged
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IMAGE

Taps = dict[int | None, Tensor]
"""States (B, T, D) by block; None is the final normed ones."""


@dataclass(frozen=True)
class States:
    """What has been read: ids (B, T) and which are ``real``, final normed states (B, T, D), those of the tapped
    layers, the visual prefix. With a ``layout`` of the B sequences, states are (1, N, D)."""

    ids: Tensor
    real: Tensor
    final: Tensor
    taps: Taps
    context: Tensor | None = None
    layout: Ragged | None = None

    def then(self, later: States) -> States:
        """With the positions that followed."""
        ids, real = torch.cat((self.ids, later.ids), 1), torch.cat((self.real, later.real), 1)
        taps = {k: torch.cat((v, later.taps[k]), 1) for k, v in self.taps.items()}
        return States(ids, real, torch.cat((self.final, later.final), 1), taps, later.context)

    def first(self, n: int) -> States:
        """The first n positions."""
        taps = {k: v[:, :n] for k, v in self.taps.items()}
        return States(self.ids[:, :n], self.real[:, :n], self.final[:, :n], taps, self.context)

    def at(self, rows: Tensor, columns: Tensor) -> Taps:
        """Tapped states (N, L, D) at ``columns`` (N, L) of ``rows`` (N)."""
        if self.layout is not None:
            index = self.layout.at(rows[:, None], columns)
            return {k: v[0, index] for k, v in self.taps.items()}
        return {k: v[rows[:, None], columns] for k, v in self.taps.items()}


@dataclass(frozen=True)
class Dreamt:
    """Final states (B, T, D), or (1, N, D) of packed sequences, and the condition of every picture in reading order
    (None where there is no span)."""

    h: Tensor
    condition: Condition | None


class Dream(nn.Module):
    """A multimodal model ``net`` with what turns its states into conditions.

    The trigger has to be said by the language head, and no text may hold it. A control token of the tokenizer would
    change the vocabulary of every backbone and could collide with a table that is padded beyond its tokens; so it is a
    column of our own: in sequences and labels it is the placeholder ``DREAM_START``, among the scores of
    :meth:`logits` it is the last one, behind all rows of the table, where no tokenizer reaches. Its two vectors
    (``start`` goes in, ``start_output`` scores) begin as the mean of the table's rows and train with the bridge, so
    the table stays frozen. The scores of all text tokens are untouched.
    """

    start: nn.Parameter | None
    start_output: nn.Parameter | None

    def __init__(self, net: MLLM, config: DreamConfig) -> None:
        super().__init__()
        backbone = net.backbone
        dim, n = backbone.config.dim, backbone.config.n_layers
        self.net, self.config, self.span = net, config, DreamSpan(config.num_queries)
        tapped = list(config.tap.layers) + ([config.residual.tap] if config.residual else [])
        tap_layers(tuple(i for i in tapped if i is not None), n)  # raises on a layer that is not there
        self.tapped = tuple(dict.fromkeys(tapped))
        self.noise = QueryNoise(config.query, config.num_queries, dim)
        self.queries = nn.Parameter(torch.randn(self.noise.learned, dim) * 0.02)
        self.end = nn.Parameter(_mean_embedding(net))
        own = config.trigger is None
        self.register_parameter("start", nn.Parameter(_mean_embedding(net)) if own else None)
        table = backbone.tok_embeddings.weight if backbone.output is None else stated(backbone.output)
        mean = (table.dequantized() if isinstance(table, Quantized) else table.detach()).float().mean(0)
        self.register_parameter("start_output", nn.Parameter(mean) if own else None)
        if config.trigger is not None and not 0 <= config.trigger < backbone.config.vocab_size:
            raise ValueError(f"trigger {config.trigger} is no row of a vocabulary of {backbone.config.vocab_size}")
        self.mix = Mix(len(config.tap.layers), dim, config.tap.mix, config.tap.norm)
        self.connector = Connector(self.mix.width, config.connector)
        width = config.heads.width or (dim if config.heads.sequence != "none" else config.connector.width)
        if config.residual is not None and width != dim:
            raise ValueError(f"residual: heads.width {width} is not the backbone's width {dim}")
        self.heads = Heads(config.connector.width, width, config.heads)
        self._null: tuple[object, Condition] | None = None

    @property
    def trigger_id(self) -> int:
        """The column of :meth:`logits` that triggers a picture."""
        return self.net.backbone.config.vocab_size if self.config.trigger is None else self.config.trigger

    def targets(self, labels: Tensor) -> Tensor:
        """Labels as columns of :meth:`logits`: ``DREAM_START`` becomes the trigger's."""
        return labels.masked_fill(labels == DREAM_START, self.trigger_id)

    def logits(self, h: Tensor) -> Tensor:
        """Scores (..., V), or (..., V + 1) with a trigger of our own behind the vocabulary, of states (..., D)."""
        scores = self.net.logits(h)
        if self.start_output is None:
            return scores
        return torch.cat((scores, (h @ self.start_output.to(h.dtype))[..., None]), -1)

    def embed(
        self,
        ids: Tensor,
        tiles: Tensor | None = None,
        features: Tensor | None = None,
        *,
        cropped: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Input vectors (B, T, D) of ids (B, T) as :meth:`MLLM.embed` makes them, spans filled in.

        ``cropped``: triggers alone stand for spans, as in a cache that hides them. ``noise`` (N, Q, D) of the N spans'
        queries, of ``self.noise.draw``; None: always the same. ValueError for a torn span.
        """
        count = int((ids == DREAM_START).sum()) if cropped else len(self.span.find(ids)[0])
        x = self.net.embed(ids, tiles, features)
        start: Tensor | None = self.start
        if start is None:
            start = self.net.backbone.embed(torch.tensor([self.config.trigger], device=ids.device))[0]
        x = splice(x, ids == DREAM_START, start.expand(count, -1), "dream_start")
        count = 0 if cropped else count
        x = splice(x, ids == DREAM_END, self.end.expand(count, -1), "dream_end")
        return splice(x, ids == DREAM, self.noise(self.queries, count, noise).flatten(0, 1), "dream")

    def read(
        self,
        ids: Tensor,
        tiles: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        cropped: bool = False,
        noise: Tensor | None = None,
        layout: Ragged | None = None,
    ) -> States:
        """States of ids (B, T); see :meth:`MLLM.forward`, :meth:`embed`. ``mask`` (B, past + T) marks padding only."""
        backbone = self.net.backbone
        x = self.embed(ids if layout is None else layout.flat(ids), tiles, features, cropped=cropped, noise=noise)
        if context is None and tiles is not None:
            context = self.net.context(ids, tiles)
        positions, t, within = None, ids.shape[1], layout
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, mask.shape[1] - t :]
        if mask is not None and bool(mask.all()):
            mask = None  # as a text encoder does: the plain causal kernel rounds otherwise than a masked one
        if self.config.hide_queries_from_future and not cropped and bool((ids == DREAM_START).any()):
            past = 0 if cache is None else cache.length
            if layout is None:
                mask, positions = hide_spans(ids, mask, past, backbone.config.window)
            else:
                within, positions = hide_packed(ids, layout, backbone.config.window)
        n = backbone.config.n_layers
        layers = tuple(sorted({i % n for i in self.tapped if i is not None} | {n - 1}))
        seen = mask if within is None else within
        outputs = backbone(x, mask=seen, positions=positions, cache=cache, tap=layers, context=context)
        final = backbone.norm(outputs[-1])
        found = dict(zip(layers, outputs, strict=True))
        taps = {i: final if i is None else found[i % n] for i in self.tapped}
        return States(ids, real, final, taps, context, layout)

    def forward(
        self,
        ids: Tensor,
        tiles: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        drop: Sequence[Drop] | None = None,
        noise: Tensor | None = None,
        layout: Ragged | None = None,
    ) -> Dreamt:
        """Sequences ids (B, T) with any number of spans in one run: final states, and the conditions of all N spans.

        ``mask``: (B, T), False on padding. ``sizes``: (N, 6). ``drop``: N draws of ``config.drop``.
        ``noise``: see :meth:`embed`. ``layout``: see :meth:`MLLM.forward`.

        Raises:
            ValueError: for a torn span, or when ``drop`` and spans differ in number.
        """
        if drop is not None and features is None and tiles is not None and self.net.projector is not None:
            features = self.net.encode(tiles)
        states = self.read(ids, tiles, features=features, mask=mask, noise=noise, layout=layout)
        h = self._anchored(states.final)
        rows, columns = self.span.find(ids)
        if not len(rows):
            return Dreamt(h, None)
        index, real = prompts(ids, mask, rows, columns)
        at = columns[:, None] + 1 + torch.arange(self.config.num_queries, device=ids.device)
        condition = self.connect(states.at(rows, at), states.at(rows, index), real)
        if drop is not None:
            if len(drop) != len(rows):
                raise ValueError(f"the batch holds {len(rows)} dream spans, drop names {len(drop)}")
            condition = self._drop(condition, drop, ids, rows, index, real, features, noise)
        return Dreamt(h, condition if sizes is None else replace(condition, sizes=sizes))

    def connect(self, queries: Taps, prompt: Taps, real: Tensor) -> Condition:
        """Conditions of N pictures from tapped states at their queries (N, Q, D) and prompts (N, L, D), of which
        ``real`` (N, L) are no padding.

        Raises:
            ValueError: when a bridge that stands on the prompt gets an empty one.
        """
        config, parts, masks = self.config, [], []
        if config.tap.positions != "prompt":
            parts.append(self._mixed(queries))
            masks.append(real.new_ones(parts[0].shape[:2]))
        if config.tap.positions != "queries":
            parts.append(self._mixed(prompt))
            masks.append(real)
        if (config.residual or config.tap.positions == "prompt") and not bool(real.any(1).all()):
            raise ValueError("a picture has no text and no picture before it, and this bridge reads the prompt")
        features, seen = self.connector(torch.cat(parts, 1), torch.cat(masks, 1))
        seq, pooled = self.heads(features, seen)
        if config.residual is not None:
            base = prompt[config.residual.tap]
            base = self.net.backbone.norm(base) if config.residual.normed else base
            # What the queries know reaches the prompt's positions through the connector; the layout stays the prompt's.
            seq, seen = (base + seq[:, seq.shape[1] - base.shape[1] :]).to(base.dtype), real
        return Condition(seq=seq, mask=seen, pooled=pooled)

    def _mixed(self, taps: Taps) -> Tensor:
        dtype = self.queries.dtype
        return self.mix([taps[i].to(dtype) for i in self.config.tap.layers])

    def condition(
        self,
        ids: Tensor,
        tiles: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Condition:
        """Conditions of B pictures, one for each context ids (B, T); the span is put behind it here. ``noise``
        (B, Q, D): see :meth:`embed`.

        Raises:
            ValueError: when the backbone trains and the bridge is not ``joint``.
        """
        if self.config.joint:
            whole, mask = self._with_span(ids, mask)
            made = self(whole, tiles, features=features, mask=mask, sizes=sizes, noise=noise).condition
            assert isinstance(made, Condition)
            return made
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.net.parameters()):
            raise ValueError("the backbone trains, but the context is read without gradients: set dream.joint")
        cache = self.net.backbone.cache(*ids.shape)
        with torch.no_grad():
            before = self.read(ids, tiles, features=features, mask=mask, cache=cache)
        made, _ = self.imagine(before, cache, noise=noise)
        return made if sizes is None else replace(made, sizes=sizes)

    def imagine(
        self, before: States, cache: KVCache, *, keep: bool = False, noise: Tensor | None = None
    ) -> tuple[Condition, States]:
        """The pictures (B) that cached contexts call for, and the states of all that the cache holds after it.

        ``before``: the states of all that it holds now. The cache stays as it is; with ``keep`` it takes the span, of
        which only the trigger remains where later text is not to see the queries.
        """
        n = self.config.num_queries
        queries: Taps = {k: v[:, :0] for k, v in before.taps.items()}
        held, past = before, cache.length
        if n or keep:
            span = torch.tensor(self.span.ids(), device=before.ids.device).expand(len(before.ids), -1)
            mask = torch.cat((before.real, before.real.new_ones(span.shape)), 1)
            into = cache if keep else Past(cache)
            after = self.read(span, mask=mask, cache=into, context=before.context, noise=noise)
            queries = {k: v[:, 1 : 1 + n] for k, v in after.taps.items()}
            if keep and self.config.hide_queries_from_future:
                cache.truncate(past + 1)
                after = after.first(1)
            held = before.then(after) if keep else before
        return self.connect(queries, before.taps, before.real & is_prompt(before.ids)), held

    def _with_span(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        span = torch.tensor(self.span.ids(), dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        longer = None if mask is None else torch.cat((mask, mask.new_ones(span.shape)), 1)
        return torch.cat((ids, span), 1), longer

    def dropped(
        self, ids: Tensor, kind: Drop, features: Tensor | None = None, noise: Tensor | None = None
    ) -> Condition:
        """The condition of one context ids (T) without a part of it; ``features`` (N, P, D) of its pictures. The null
        condition takes no ``noise`` (1, Q, D): there is only one.

        Training and guidance at inference both come here, one context at a time, so they see the same tensor.
        """
        if kind == "all":
            return self.null()
        rest = without(ids, kind, self.null_ids)
        pictures = features if bool((rest == IMAGE).any()) else None
        return self.condition(rest[None], features=pictures, noise=noise)

    @property
    def null_ids(self) -> tuple[int, ...]:
        """The text of the empty context."""
        if not self.config.null_ids:
            raise ValueError("dream.null_ids is empty: the null condition needs a text, <s> for instance")
        return self.config.null_ids

    def null(self) -> Condition:
        """The condition (one row) of the empty context, in the layout of any other: guidance starts from it.

        Without gradients it is kept until a parameter changes.
        """
        device = self.queries.device
        ids = torch.tensor([self.null_ids], device=device)
        if torch.is_grad_enabled():
            return self.condition(ids)
        key = [(p.data_ptr(), p._version, p.dtype) for p in self.parameters()]
        if self._null is None or self._null[0] != key:
            self._null = (key, self.condition(ids))
        return self._null[1]

    def _drop(
        self,
        condition: Condition,
        drop: Sequence[Drop],
        ids: Tensor,
        rows: Tensor,
        index: Tensor,
        real: Tensor,
        features: Tensor | None,
        noise: Tensor | None,
    ) -> Condition:
        made, null = [], self.null() if "all" in drop else None
        order = (ids == IMAGE).flatten().cumsum(0).view_as(ids) - 1  # which feature a placeholder stands for
        for i, kind in enumerate(drop):
            if kind == "all" and null is not None:
                made.append(null)
            elif kind == "keep":
                made.append(condition[i : i + 1])
            else:
                if self.net.resampler is not None:
                    raise ValueError(f"drop.{kind} cannot take pictures out of a visual prefix; use drop.all")
                before = index[i][real[i]]
                context = ids[rows[i], before]
                flat = None if features is None else features.flatten(0, 1)
                own = None if flat is None else flat[order[rows[i], before][context == IMAGE]][None]
                made.append(self.dropped(context, kind, own, None if noise is None else noise[i : i + 1]))
        return join(made)

    def _anchored(self, h: Tensor) -> Tensor:
        """``h`` with every parameter of the bridge in its graph at weight zero: all ranks run the same collectives."""
        if not (self.training and torch.is_grad_enabled()):
            return h
        own = [p.sum() for name, p in self.named_parameters() if p.requires_grad and not name.startswith("net.")]
        return h + (torch.stack(own).sum() * 0).to(h.dtype) if own else h


def _mean_embedding(net: MLLM) -> Tensor:
    """The mean token embedding (D), in fp32, as it enters the first block."""
    mean = net.backbone.tok_embeddings.weight.detach().float().mean(0)
    scale = net.backbone.config.embed_scale
    return mean if scale is None else mean * scale
