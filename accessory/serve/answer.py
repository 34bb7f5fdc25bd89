"""One answer in the making: what of the prompt is fed, what comes out, and what the cache holds then."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from accessory.backbone.generate import Sampling, StopMatcher, stream
from accessory.models.build import Model
from accessory.nn.cache import KVCache
from accessory.schema import Encoded, Part, Turn
from accessory.tokens import IMAGE


@dataclass(frozen=True)
class Cost:
    """What one answer took: prompt positions reused from the cache and fed, tiles encoded, tokens, seconds."""

    reused: int
    fed: int
    tiles: int
    generated: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Prompt:
    """A rendered dialogue. ``keys`` are what its positions hold, see :func:`content_keys`; ``tokens_per_tile`` 0 where
    pictures take no position."""

    ids: torch.Tensor
    tiles: torch.Tensor
    keys: list[int | bytes]
    tokens_per_tile: int

    @classmethod
    def of(cls, model: Model, turns: Sequence[Turn]) -> Prompt:
        """The prompt that asks for an answer to ``turns``."""
        return cls.of_row(model, model.encoder.row(turns, generate=True))

    @classmethod
    def of_row(cls, model: Model, row: Encoded) -> Prompt:
        """The prompt that a row of that model is."""
        per_tile, prefixed = model.encoder.tokens_per_tile, model.net.resampler is not None
        return cls(row.ids, row.tiles, content_keys(row.ids, row.tiles, per_tile, prefixed), per_tile)

    def reusable(self, held: Sequence[int | bytes]) -> int:
        """Leading positions that a cache of ``held`` spares: whole tiles only, and never all of the prompt."""
        keep = min(common(held, self.keys), len(self.ids) - 1)
        while self.tokens_per_tile and self._seen(keep) % self.tokens_per_tile:
            keep -= 1
        return keep

    def tiles_from(self, position: int) -> torch.Tensor:
        """Tiles (N,3,S,S) that are not wholly before ``position``; those without a position are before all others."""
        if not self.tokens_per_tile:
            return self.tiles[len(self.tiles) if position else 0 :]
        return self.tiles[self._seen(position) // self.tokens_per_tile :]

    def _seen(self, position: int) -> int:
        return int((self.ids[:position] == IMAGE).sum())


def content_keys(ids: torch.Tensor, tiles: torch.Tensor, per_tile: int, prefixed: bool = False) -> list[int | bytes]:
    """Ids (T) with the content of its tile in place of every image placeholder. ``prefixed``: all tiles also enter
    through the prefix, so that every position depends on them; the first one's key says so."""
    content = [hashlib.blake2b(t.numpy().tobytes(), digest_size=16).digest() for t in tiles]
    seen, keys = 0, list[int | bytes]()
    for i in ids.tolist():
        keys.append(content[seen // per_tile] if i == IMAGE else i)
        seen += i == IMAGE
    if prefixed and content and keys:
        keys[0] = b"".join((repr(keys[0]).encode(), *content))
    return keys


def common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


class Trimmer:
    """Drops blanks at both ends of a stream; for templates whose training did the same."""

    def __init__(self, active: bool) -> None:
        self._active, self._begun, self._held = active, False, ""

    def release(self) -> str:
        """The blanks held back, when something other than text follows them."""
        held, self._held = self._held if self._begun else "", ""
        return held

    def push(self, piece: str) -> str:
        if not self._active:
            return piece
        text = self._held + (piece if self._begun else piece.lstrip())
        shown = text.rstrip()
        self._begun, self._held = self._begun or bool(shown), text[len(shown) :]
        return shown


class Answer:
    """An answer in the making: what is fed, what has come out."""

    def __init__(self, model: Model, cache: KVCache, prompt: Prompt, sampling: Sampling, keep: int) -> None:
        self.prompt, self.ids, self.text = prompt, list[int](), ""
        self.begun = self.finished = False
        self.prefill_seconds = self.decode_seconds = 0.0
        self.reused, self.tiles = keep, prompt.tiles_from(keep)
        self._model, self._cache, self._sampling = model, cache, sampling
        self._decoder, self._matcher = model.tokenizer.stream(), StopMatcher(sampling.stop)
        self._trimmer = Trimmer(model.template.strip)
        self._tokens: Iterator[list[int | None]] | None = None

    def step(self) -> str:
        """Text that the next token completes; sets ``finished`` with the last."""
        began = time.perf_counter()
        first, self.begun = not self.begun, True
        if self._tokens is None:
            self._tokens = self._prefill()
        step = next(self._tokens, None)
        token = None if step is None else step[0]
        if token is not None:
            self.ids.append(token)
        if token is None or token in self._sampling.stop_ids:
            piece, _ = self._matcher.push(self._decoder.finish())
            piece, self.finished = piece + self._matcher.flush(), True
        else:
            piece, self.finished = self._matcher.push(self._decoder.push(token))
        piece = self._trimmer.push(piece)
        self.text += piece
        spent = time.perf_counter() - began
        if first:
            self.prefill_seconds = spent
        else:
            self.decode_seconds += spent
        return piece

    @torch.inference_mode()
    def _prefill(self) -> Iterator[list[int | None]]:
        net = self._model.net
        device = next(net.parameters()).device
        self._cache.truncate(self.reused)
        ids = self.prompt.ids.to(device)[None]
        tiles = self.tiles.to(device) if len(self.tiles) else None
        x = net.embed(ids[:, self.reused :], tiles)
        # What is reused was read with the same pictures in the prefix, and the cache holds it.
        context = net.context(ids, tiles) if tiles is not None and not self.reused else None
        return stream(net.backbone, x, ids=ids, cache=self._cache, sampling=self._sampling, context=context)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was said so far, as a turn holds it."""
        return (self.text,)

    def close(self) -> None:
        """Nothing runs between steps."""

    def held(self) -> list[int | bytes]:
        """What the cache holds now: it never has more than the prompt and the tokens that came out."""
        return [*self.prompt.keys, *self.ids][: self._cache.length]

    def cost(self) -> Cost:
        """What it took so far."""
        fed = len(self.prompt.ids) - self.reused
        return Cost(self.reused, fed, len(self.tiles), len(self.ids), self.prefill_seconds, self.decode_seconds)
