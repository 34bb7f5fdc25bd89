"""What a denoiser is trained on, latents and conditions: computed when needed, or once and then read from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents
from accessory.diffusion.latent_cache import CacheReader, CacheWriter, condition_of, fingerprint, rows_of, text_key
from accessory.diffusion.latents import LatentCodec, Moments
from accessory.models.dream_queries import QueryNoise
from accessory.schema import Prompt, Targets

if TYPE_CHECKING:
    from accessory.models.generator import Generator

_PENDING = 256  # rows that a run keeps in memory before it writes them

Row = Mapping[str, Tensor]


def trains(module: nn.Module) -> bool:
    """Whether anything of a module is trained."""
    return any(p.requires_grad for p in module.parameters())


class Features:
    """Latents of pictures and conditions of prompts of a generator, always computed anew."""

    def latents(self, generator: Generator, targets: Targets, noise: Sequence[torch.Generator]) -> Latents:
        """Latents of the pictures, drawn from the codec's distribution with one generator each."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(generator.codec)):
            return generator.codec.encode(targets.pixels, list(noise))

    def condition(
        self, generator: Generator, prompts: Sequence[Prompt], noise: Sequence[torch.Generator] | None = None
    ) -> Condition:
        """The condition of every prompt; ``noise`` as of :meth:`Generator.condition`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(generator.conditioner)):
            return generator.condition(prompts, noise)

    def null(self, generator: Generator) -> Condition:
        """One row: what guidance at inference starts from."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(generator.conditioner)):
            return generator.null(1, None)


class CachedFeatures(Features):
    """Each picture and each prompt goes through the encoders once, whatever run comes first.

    Args:
        generator: its codec and conditioner are frozen.
        folder: where caches lie; each codec and each conditioner has its own by digest.
        about: what else decides the conditions (the profile, for instance).

    Several runs, and the ranks of one, may share a folder; each sees what the others have written.

    Raises:
        ValueError: when the codec or the conditioner trains: its features would be those of its first step for ever;
            and for a bridge whose queries are drawn for every picture.
    """

    def __init__(self, generator: Generator, folder: Path, about: str) -> None:
        for name in ("codec", "conditioner"):
            if trains(getattr(generator, name)):
                raise ValueError(f"cache_features: the {name} trains, so that its features change with every step")
        for module in generator.conditioner.modules():
            if isinstance(module, QueryNoise) and module.config.kind != "learned":
                raise ValueError(f"cache_features: dream.query.kind {module.config.kind!r} is drawn for every picture")
        words = fingerprint(generator.conditioner, about=about)
        self._latents = _Rows(folder, "latents", generator.codec.digest())
        self._texts = _Rows(folder, "texts", words)
        self._null: Condition | None = None

    def latents(self, generator: Generator, targets: Targets, noise: Sequence[torch.Generator]) -> Latents:
        """See :class:`Features`; kept are mean and deviation, so that every draw is another one as without a cache."""
        missing = [i for i, key in enumerate(targets.keys) if key not in self._latents]
        for i in missing:
            if targets.keys[i] not in self._latents:  # a picture may come twice in a batch
                self._latents.add(targets.keys[i], _moments(generator.codec, targets.pixels[i][None]))
        device = targets.pixels[0].device
        rows = [{k: v.to(device) for k, v in self._latents[key].items()} for key in targets.keys]
        drawn = [Moments(r["mean"], r.get("std")).sample([g])[0] for r, g in zip(rows, noise, strict=True)]
        return torch.stack(drawn) if len({d.shape for d in drawn}) == 1 else drawn

    def condition(
        self, generator: Generator, prompts: Sequence[Prompt], noise: Sequence[torch.Generator] | None = None
    ) -> Condition:
        """See :class:`Features`; nothing is drawn.

        Raises:
            ValueError: for prompts with pictures.
        """
        keys = [_prompt_key(p) for p in prompts]
        missing = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self._texts}
        if missing:
            made = super().condition(generator, list(missing.values()))
            for key, row in zip(missing, rows_of(made), strict=True):
                self._texts.add(key, row)
        device = next(generator.denoiser.parameters()).device
        return condition_of([self._texts[k] for k in keys]).to(device)

    def null(self, generator: Generator) -> Condition:
        """See :class:`Features`; nothing of it trains, so it is computed once."""
        if self._null is None:
            self._null = super().null(generator)
        return self._null

    def close(self) -> None:
        """Write what is pending."""
        self._latents.close()
        self._texts.close()


class _Rows:
    """A cache that is read and filled at once."""

    def __init__(self, folder: Path, what: str, digest: str) -> None:
        self._folder, self._made_by = folder / f"{what}-{digest}", {what: digest}
        self._writer = CacheWriter(self._folder, self._made_by)
        self._pending: dict[str, Row] = {}
        self._reader = CacheReader(self._folder, self._made_by)

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._reader

    def __getitem__(self, key: str) -> Row:
        return self._pending[key] if key in self._pending else self._reader[key]

    def add(self, key: str, row: Row) -> None:
        if len(self._pending) >= _PENDING:
            self._flush()
        if key not in self._writer:
            self._writer.add(key, row)
        self._pending[key] = {name: t.detach().cpu() for name, t in row.items()}

    def _flush(self) -> None:
        self._writer.flush()
        self._reader = CacheReader(self._folder, self._made_by)
        self._pending = {}

    def close(self) -> None:
        self._writer.close()


def _moments(codec: LatentCodec, pixels: Tensor) -> Row:
    with torch.no_grad():
        found = codec.moments(pixels)
    return {"mean": found.mean} if found.std is None else {"mean": found.mean, "std": found.std}


def _prompt_key(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return text_key(prompt)
    if any(turn.pictures for turn in prompt):
        raise ValueError("cache_features: a prompt holds pictures; conditions are cached for prompts of text alone")
    return hashlib.sha256(repr([(t.role, t.text) for t in prompt]).encode()).hexdigest()[:32]
