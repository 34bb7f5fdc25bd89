"""What the interleaved engine reads with: a language model, the dream bridge on it if there is one, and a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.data.image import open_picture
from accessory.diffusion.condition import Condition
from accessory.models.build import Model
from accessory.models.dream import Dream, States
from accessory.nn.cache import KVCache
from accessory.schema import Picture, Turn
from accessory.serve.answer import Prompt, content_keys
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IMAGE


@dataclass(frozen=True)
class DreamtPrompt(Prompt):
    """A dialogue whose assistant drew pictures: what is left of a span stands before every one of them."""

    def reusable(self, held: Sequence[int | bytes]) -> int:
        """As of any prompt; spans too are reused whole or not at all."""
        keep = super().reusable(held)
        while self.keys[keep] in (DREAM, DREAM_END):
            keep -= 1
        return keep


class Memory:
    """One cache, what its positions are (as keys of a prompt), and the states that pictures are dreamt from."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.keys = cache, list[int | bytes]()
        self._states: list[States] = []

    @property
    def room(self) -> int:
        """Positions that are free."""
        return self.cache.max_length - self.cache.length

    @property
    def states(self) -> States:
        """Of everything in the cache."""
        if len(self._states) > 1:  # joined when somebody asks: once a picture, not once a token
            every = self._states
            taps = {k: torch.cat([s.taps[k] for s in every], 1) for k in every[0].taps}
            ids, real, final = (torch.cat([getattr(s, n) for s in every], 1) for n in ("ids", "real", "final"))
            self._states = [States(ids, real, final, taps, every[-1].context)]
        return self._states[0]

    def add(self, states: States, keys: Sequence[int | bytes]) -> None:
        """Note what has just been read into the cache."""
        self._states.append(states)
        self.keys.extend(keys)

    def replace(self, states: States, keys: Sequence[int | bytes]) -> None:
        """Note the states of all that the cache holds, of which ``keys`` are new."""
        self._states = [states]
        self.keys.extend(keys)

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on, also those of a step that failed."""
        self.cache.truncate(length)
        self.keys = self.keys[:length]
        self._states = [self.states.first(length)] if length else []


class Reader:
    """Reads ids into a memory and scores what may follow.

    Without a bridge there is no trigger: pictures come only where they are forced. With one, what it dreams from is
    the network that speaks, so ``dream.net`` is ``model.net``.
    """

    def __init__(self, model: Model, dream: Dream | None) -> None:
        if dream is not None and dream.net is not model.net:
            raise ValueError("the bridge dreams from another network than the one that speaks")
        if model.net.projector is None or model.net.resampler is not None:
            raise ValueError("this model cannot see its own pictures: it has no projector that splices pictures in")
        self.model, self.dream = model, dream

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.net.parameters()).device

    @property
    def trigger(self) -> int | None:
        """The column of the scores that calls for a picture."""
        return None if self.dream is None else self.dream.trigger_id

    @property
    def cropped(self) -> bool:
        """Whether only the trigger of a span stays in the cache."""
        return self.dream is not None and self.dream.config.hide_queries_from_future

    @property
    def span(self) -> list[int]:
        """What precedes a drawn picture, for a while."""
        return [] if self.dream is None else self.dream.span.ids()

    @property
    def marks(self) -> list[int]:
        """What stays of it in the cache."""
        return self.span[:1] if self.cropped else self.span

    @torch.no_grad()
    def read(self, memory: Memory, ids: Tensor, keys: Sequence[int | bytes], tiles: Tensor | None = None) -> Tensor:
        """Read ids (T) behind what the memory holds; scores (V), or (V + 1) with a trigger, of what follows."""
        ids = ids.to(self.device)[None]
        tiles = tiles.to(self.device) if tiles is not None and len(tiles) else None
        if self.dream is None:
            final = self.model.net(ids, tiles, cache=memory.cache)
            memory.add(States(ids, torch.ones_like(ids, dtype=torch.bool), final, {}), keys)
            return self.model.net.logits(final[0, -1]).float()
        states = self.dream.read(ids, tiles, cache=memory.cache, cropped=self.cropped)
        memory.add(states, keys)
        return self.dream.logits(states.final[0, -1]).float()

    @torch.no_grad()
    def imagine(self, memory: Memory) -> Condition:
        """The picture that all in the memory calls for; its span is read on the way."""
        assert self.dream is not None
        made, states = self.dream.imagine(memory.states, memory.cache, keep=True)
        memory.replace(states, self.marks)
        return made

    @torch.no_grad()
    def condition(self, ids: Tensor, tiles: Tensor, kind: str = "all") -> Condition:
        """The picture that a context ids (T) alone calls for, read apart from any memory; ``text``: its text alone."""
        assert self.dream is not None
        ids = ids.to(self.device)
        ids = ids[(ids >= 0) if kind == "text" else ids != DREAM_START]
        ids = ids[(ids != DREAM) & (ids != DREAM_END)]
        seen = bool((ids == IMAGE).any())
        return self.dream.condition(ids[None], tiles.to(self.device) if seen else None)

    def see(self, picture: Picture) -> tuple[Tensor, list[int | bytes], Tensor]:
        """Ids (T), keys and tiles of a picture alone."""
        row = self.model.encoder.row((Turn("user", (picture,)),))
        ids = row.ids[row.ids < 0]  # the template's own words left out
        return ids, content_keys(ids, row.tiles, self.model.encoder.tokens_per_tile), row.tiles

    def positions(self, width: int, height: int) -> int:
        """Positions that a picture of that size takes."""
        encoder = self.model.encoder
        tile = encoder.positions_per_tile
        return sum(1 if t.blank else tile for t in encoder.tiling.plan(width, height).tiles)

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """What asks for an answer to ``turns``, spans before the pictures that the assistant drew."""
        plain = Prompt.of(self.model, turns)
        starts, at = list[int](), 0
        pictures = (plain.ids < 0).nonzero().flatten().tolist()
        for turn in turns:
            for picture in turn.pictures:
                if turn.role == "assistant":
                    starts.append(pictures[at])
                at += self.positions(*open_picture(picture.source).size)
        if at != len(pictures):
            raise ValueError(f"the dialogue holds {len(pictures)} positions of pictures, its turns make {at}")
        ids, keys, last = list[int](), list[int | bytes](), 0
        for start in (*starts, len(plain.ids)):
            ids += plain.ids[last:start].tolist()
            keys += plain.keys[last:start]
            if start < len(plain.ids):
                ids += self.marks
                keys += self.marks
            last = start
        return DreamtPrompt(torch.tensor(ids, dtype=torch.long), plain.tiles, keys, plain.tokens_per_tile)
