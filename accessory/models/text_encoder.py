"""The backbone as a text encoder: texts in, a :class:`Condition` out, by a named profile.

Masks travel with the features, what is cut is counted and said, and a batch gives what its texts give alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import log
from accessory.backbone.llama import Llama
from accessory.data.tokenizer import Tokenizer
from accessory.diffusion.condition import Condition
from accessory.diffusion.latent_cache import fingerprint
from accessory.diffusion.unet import leading
from accessory.models import build, text_profiles
from accessory.models.text_profiles import SLOT, TextProfile

OnLong = Literal["error", "truncate", "chunk"]
PROBE = "A small red cat, 12 blue stars & the Möwe – 小猫."
"""A text whose ids tell vocabularies apart."""

_log = log.get(__name__)


@dataclass(frozen=True)
class Encoded:
    """Texts as a denoiser takes them.

    Attributes:
        condition: ``seq`` (B, L, C) and ``mask`` (B, L) in the order of the texts, ``pooled`` (B, C) where asked for.
        token_counts: tokens of each text that were encoded, specials included.
        truncated: tokens of each text that were cut; all zero when nothing was lost.
        profile: digest of the profile that made it.
    """

    condition: Condition
    token_counts: tuple[int, ...]
    truncated: tuple[int, ...]
    profile: str

    def __len__(self) -> int:
        return len(self.token_counts)


@dataclass(frozen=True)
class _Piece:
    """A run of ids that goes through the model at once: a text, or one chunk of it."""

    text: int
    ids: list[int]


class TextEncoder(nn.Module):
    """A backbone with its tokenizer, read as a profile says.

    Args:
        backbone: in ``profile.dtype``. It is shared, not copied.
        tokenizer: of the same model.
        profile: see :mod:`accessory.models.text_profiles`.
        frozen: no gradient reaches the backbone.

    Raises:
        ValueError: when the backbone is not the profile's.
    """

    def __init__(self, backbone: Llama, tokenizer: Tokenizer, profile: TextProfile, *, frozen: bool = True) -> None:
        super().__init__()
        profile.check(backbone.config)
        found, wanted = backbone.like.dtype, build.DTYPES[profile.dtype]
        if found != wanted:
            raise ValueError(f"profile {profile.name} computes in {wanted}, this backbone in {found}")
        for name, asked in (("bos", profile.bos), ("eos", profile.eos)):
            if asked:
                tokenizer.special(name)  # an error names what the vocabulary lacks, before any text is read
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.profile = profile
        self.frozen = frozen

    @property
    def width(self) -> int:
        """C: width of the features."""
        return self.backbone.config.dim * len(self.profile.taps)

    def fingerprint(self) -> str:
        """Profile, weights and vocabulary in one digest: what a cache of embeddings must agree with."""
        words = str(self.tokenizer.encode(PROBE))
        return fingerprint(self.backbone, profile=self.profile.canonical(), tokenizer=words)

    def encode(
        self, texts: Sequence[str], *, pooled: bool = False, on_long: OnLong = "truncate", token_budget: int = 8192
    ) -> Encoded:
        """Features of texts, in their order. An empty text is BOS (and EOS), never a row of padding.

        Args:
            texts: flat list; they cannot produce control tokens or placeholders.
            pooled: also the mean over the real positions.
            on_long: what happens to a text of more than ``profile.max_length`` tokens: it is refused, its end is cut
                (counted in the result and logged), or it is encoded in chunks of that length, whose features follow
                each other.
            token_budget: texts run sorted by length in batches of at most so many tokens, padding included.

        Raises:
            ValueError: for no texts, and for a long one where that is an error.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string; put it into a list")
        if not texts:
            raise ValueError("there are no texts to encode")
        pieces, truncated = self._pieces(texts, on_long)
        if lost := [n for n in truncated if n]:
            _log.warning(
                "%d of %d texts are longer than the %d tokens of profile %s and were cut by %d tokens (at most %d)",
                len(lost), len(texts), self.profile.max_length, self.profile.name, sum(lost), max(lost),
            )  # fmt: skip
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            rows = self._rows(pieces, len(texts), token_budget)
            condition = self._join(rows)
            if pooled:
                condition = replace(condition, pooled=masked_mean(condition))
        return Encoded(condition, tuple(len(r) for r in rows), tuple(truncated), self.profile.digest)

    def count(self, text: str) -> int:
        """Tokens that a text wants, specials included: more than ``profile.max_length`` will not fit."""
        return len(self._ids(text)) + self.profile.specials

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.profile.template.replace(SLOT, text))

    def _pieces(self, texts: Sequence[str], on_long: OnLong) -> tuple[list[_Piece], list[int]]:
        """Ids of every text, with specials, and how many tokens each has lost."""
        p = self.profile
        room = p.max_length - p.specials
        head = [self.tokenizer.special("bos")] if p.bos else []
        tail = [self.tokenizer.special("eos")] if p.eos else []
        pieces: list[_Piece] = []
        truncated = []
        for i, text in enumerate(texts):
            ids = self._ids(text)
            over = max(0, len(ids) - room)
            if over and on_long == "error":
                raise ValueError(
                    f"text {i} has {len(ids) + p.specials} tokens, profile {p.name} takes {p.max_length}: {text[:80]!r}"
                )
            if over and on_long == "truncate":
                ids = ids[:room]
            truncated.append(over if on_long == "truncate" else 0)
            chunks = [ids[at : at + room] for at in range(0, len(ids), room)] or [[]]
            pieces += [_Piece(i, head + chunk + tail) for chunk in chunks]
        return pieces, truncated

    def _rows(self, pieces: list[_Piece], texts: int, token_budget: int) -> list[Tensor]:
        """Features (n, C) of every text, without padding."""
        found: list[Tensor | None] = [None] * len(pieces)
        for batch in batches([len(p.ids) for p in pieces], token_budget):
            for i, features in zip(batch, self._run([pieces[i].ids for i in batch]), strict=True):
                found[i] = features
        parts: list[list[Tensor]] = [[] for _ in range(texts)]
        for piece, row in zip(pieces, found, strict=True):
            assert row is not None
            parts[piece.text].append(row)
        return [torch.cat(part) if len(part) > 1 else part[0] for part in parts]

    def _run(self, rows: list[list[int]]) -> Iterator[Tensor]:
        """Features (n, C) of rows of ids that go through the backbone as one batch."""
        p, longest = self.profile, max(map(len, rows))
        pad = self.tokenizer.pad_id if p.padding.id is None else p.padding.id
        ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            at = _place(len(row), longest, p.padding.side)
            ids[i, at], mask[i, at] = torch.tensor(row), True
        device = self.backbone.like.device
        ids, mask = ids.to(device), mask.to(device)
        h = self._states(self.backbone.embed(ids), None if bool(mask.all()) else mask)
        for i, row in enumerate(rows):
            yield h[i, _place(len(row), longest, p.padding.side)]

    def _states(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the profile reads (B, T, C) of embedded tokens (B, T, D)."""
        n, p = self.backbone.config.n_layers, self.profile
        if p.normed and tuple(t % n for t in p.taps) == (n - 1,):
            return self.backbone(x, mask=mask)
        read = self.backbone(x, mask=mask, tap=p.taps)
        return torch.cat([self.backbone.norm(h) if p.normed else h for h in read], -1)

    def _join(self, rows: list[Tensor]) -> Condition:
        """One condition of rows (n, C), padded with zeros by the profile's rule."""
        rule = self.profile.padding
        length = -(-max(map(len, rows)) // rule.multiple) * rule.multiple
        mask = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
        padded = []
        for i, row in enumerate(rows):
            free = length - len(row)
            padded.append(F.pad(row, (0, 0, free, 0) if rule.side == "left" else (0, 0, 0, free)))
            mask[i, _place(len(row), length, rule.side)] = True
        return Condition(seq=torch.stack(padded), mask=mask)


def _place(n: int, length: int, side: str) -> slice:
    """Where the ``n`` real positions of a row of ``length`` are."""
    return slice(0, n) if side == "right" else slice(length - n, length)


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each at most ``token_budget`` tokens with its padding.

    A row that is longer than the budget goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at = 0
    while at < len(order):
        many = max(1, token_budget // max(1, lengths[order[at]]))
        yield order[at : at + many]
        at += many


def masked_mean(condition: Condition) -> Tensor:
    """Mean (B, C) of a condition's ``seq`` over its real positions, summed in fp32; zeros for a row without any."""
    assert condition.seq is not None
    assert condition.mask is not None
    weight = condition.mask[..., None].float()
    # Padding may hold anything, NaN too, so it is replaced and not multiplied away.
    total = condition.seq.float().masked_fill(weight == 0, 0.0).sum(1)
    return (total / weight.sum(1).clamp_min(1.0)).to(condition.seq.dtype)


def load(
    profile: TextProfile | str = text_profiles.DEFAULT,
    source: str | None = None,
    *,
    tokenizer: str | None = None,
    cache: Path | None = None,
) -> TextEncoder:
    """A frozen encoder with its weights.

    Args:
        profile: the name of one, or one.
        source: a folder in any layout that the backbone reads, a ``.gguf`` file or ``asset:NAME``; None takes the
            profile's own.
        tokenizer: where the vocabulary lies, when not beside the weights.
        cache: folder of the assets.

    Raises:
        ValueError: when nobody says where the weights are, and for weights that are not the profile's.
    """
    profile = text_profiles.get(profile) if isinstance(profile, str) else profile
    source = source or profile.source
    if source is None:
        raise ValueError(f"profile {profile.name} has no weights of its own: name a folder of {profile.size}")
    config = build.BackboneConfig(source=source, tokenizer=tokenizer, dtype=profile.dtype)
    made = build.build(build.ModelConfig(backbone=config, tower=None, projector=None), cache=cache)
    return of_model(made, profile)


def of_model(model: build.Model, profile: TextProfile) -> TextEncoder:
    """An encoder on the backbone of a chat model, which stays one and the same: nothing is loaded twice."""
    return TextEncoder(model.net.backbone, model.tokenizer, profile)


# --- diffusers' pipelines ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """How a pipeline calls its prompt's parts; None where it takes no such part."""

    mask: str | None = None
    pooled: str | None = None


_POOLED = _Names(pooled="pooled_prompt_embeds")
_MASKED = _Names(mask="prompt_attention_mask")
PIPELINES: dict[str, _Names] = {
    "LuminaPipeline": _MASKED,
    "Lumina2Pipeline": _MASKED,
    "StableDiffusionPipeline": _Names(),
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
}


def prompt_embeds(
    pipeline: str, encoded: Encoded | Condition, negative: Encoded | Condition | None = None
) -> dict[str, Tensor]:
    """Arguments under which a diffusers pipeline takes embeddings in place of a prompt.

    Args:
        pipeline: its class name; SD 1.5 and 2.1 are both ``StableDiffusionPipeline``.
        encoded: B prompts, one for each picture: not every pipeline repeats given embeddings by itself.
        negative: B negative prompts or one for all; needed unless guidance is off.

    Raises:
        ValueError: for an unknown pipeline, a missing pooled part, or padding that a pipeline without a mask would
            take for text.
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"no argument names for the pipeline {pipeline!r}; known are {', '.join(PIPELINES)}")
    conditions = {"": _condition(encoded)}
    if negative is not None:
        other = _condition(negative)
        count = len(conditions[""])
        conditions["negative_"] = other[[0] * count] if len(other) == 1 else other
        if len(conditions["negative_"]) != count:
            raise ValueError(f"{len(other)} negative prompts for {count} prompts")
    names = PIPELINES[pipeline]
    length = max(c.seq.shape[1] for c in conditions.values() if c.seq is not None)
    out: dict[str, Tensor] = {}
    for prefix, short in conditions.items():
        said = prefix.replace("_", " ")
        c = leading(short.padded(length))  # the pipelines insist on one length, some on padding on the right
        assert c.seq is not None
        assert c.mask is not None
        out[f"{prefix}prompt_embeds"] = c.seq
        if names.mask is not None:
            out[f"{prefix}{names.mask}"] = c.mask.long()
        elif not bool(c.mask.all()):
            raise ValueError(
                f"{pipeline} takes no mask, but {int((~c.mask).sum())} of {c.mask.numel()} positions of the "
                f"{said}prompts are padding, which it would read as text; encode prompts of one length"
            )
        if names.pooled is not None:
            if c.pooled is None:
                raise ValueError(f"{pipeline} needs a pooled vector for each {said}prompt")
            out[f"{prefix}{names.pooled}"] = c.pooled
    return out


def _condition(value: Encoded | Condition) -> Condition:
    found = value.condition if isinstance(value, Encoded) else value
    if found.seq is None:
        raise ValueError("a pipeline needs a sequence of features; this condition has none")
    return found
