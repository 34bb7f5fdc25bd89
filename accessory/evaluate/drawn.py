"""Scores of generators: what they draw is looked up among all real drawings in the style that was asked for.

R@k is the share of pictures whose concept is among the k most similar real drawings. Only the exact concept counts,
though some are drawn almost alike (dog and dog face). Beside it stand the same pictures with another query's concept
(``shuffled``), chance, and what no generator can pass by much: the real drawing at the generator's size, through its
codec and back (``real``), and the same concept as the other styles draw it (``others``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from accessory.data import emoji
from accessory.data.targets import target
from accessory.diffusion.sampler import SamplerSettings
from accessory.evaluate.asking import Query, partners, written
from accessory.evaluate.gallery import COSINES, Gallery
from accessory.evaluate.sheet import Row
from accessory.models.conditioner import DreamConditioner
from accessory.models.generator import Generator
from accessory.schema import Picture

Entry = dict[str, Any]
"""One picture's line: what was asked, the noise, and ranks (see :func:`measured`); JSON knows all of it."""


def noise_seed(seed: int, number: int, draw: int = 0) -> int:
    """The seed of a picture: that of one pair is the same whatever words ask for it, in any batch, on any machine."""
    digest = hashlib.blake2b(f"{seed}/{number}/{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # a generator takes 63 bits


def reads_dialogues(model: Generator) -> bool:
    """Whether a generator is asked in dialogues, too: one on a dream bridge is."""
    return isinstance(model.conditioner, DreamConditioner)


@dataclass(frozen=True)
class Scorer:
    """Draws and judges. ``settings`` None takes the generator's own; ``seed`` is the run's."""

    model: Generator
    gallery: Gallery
    settings: SamplerSettings | None = None
    seed: int = 0
    batch_size: int = 64

    def groups(self, asked: Sequence[Query], done: Mapping[int, Entry]) -> Iterator[tuple[list[Entry], bool]]:
        """Entries of all queries of one kind in their order, group by group (pairs and style in common).

        ``done``: entries by number that need not be made again. Each batch comes as it is drawn, with whether its
        group ends there.

        Raises:
            ValueError: for prompts that the generator cannot read, and for sets that cannot be shuffled.
        """
        both = zip(asked, partners(asked), strict=True)
        for _, members in groupby(both, key=lambda pair: (pair[0].held_out, pair[0].style)):
            whole = list(members)
            if there := [done[query.number] for query, _ in whole if query.number in done]:
                yield there, len(there) == len(whole)
            todo = [pair for pair in whole if pair[0].number not in done]
            for start in range(0, len(todo), self.batch_size):
                yield self.entries(todo[start : start + self.batch_size]), start + self.batch_size >= len(todo)

    def entries(self, pairs: Sequence[tuple[Query, Query]]) -> list[Entry]:
        """Draw each query and measure its picture; the second of a pair is who it is shuffled with."""
        asked, gallery = [query for query, _ in pairs], self.gallery
        drawn = gallery.describe(self.draw(asked))
        real = gallery.describe(self.through([gallery.drawing(q.style, q.accepted[0]) for q in asked]))
        return [
            {**self.asked(query), **measured(gallery, query, other, mine, its)}
            for (query, other), mine, its in zip(pairs, drawn, real, strict=True)
        ]

    def draw(self, asked: Sequence[Query], draw: int = 0) -> list[Image.Image]:
        """Pictures of queries; ``draw`` counts further ones of the same."""
        seeds = [noise_seed(self.seed, query.number, draw) for query in asked]
        return self.model.generate([query.prompt for query in asked], seeds=seeds, settings=self.settings)

    @torch.no_grad()
    def through(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Real pictures at the generator's size, through its codec and back."""
        codec, side = self.model.codec, self.model.size[0]
        pixels = torch.stack([target(Picture(picture), side).pixels for picture in pictures])
        return self.model.pictures(codec.encode(pixels.to(codec.scale.device), mode=True))

    def asked(self, query: Query) -> Entry:
        """What an entry says of its query."""
        return {
            "kind": query.kind,
            "number": query.number,
            "prompt": written(query.prompt),
            "style": query.style,
            "concept": self.gallery.known[query.accepted[0]].label,
            "accepted": [self.gallery.known[row].label for row in query.accepted],
            "held_out": query.held_out,
            "fits": query.fits,
            "seed": noise_seed(self.seed, query.number),
        }

    def same(self, query: Query, entry: Entry) -> bool:
        """Whether an entry answers this query of this run."""
        return all(entry.get(name) == value for name, value in self.asked(query).items())


def measured(gallery: Gallery, query: Query, other: Query, drawn: Tensor, real: Tensor) -> Entry:
    """Ranks and likenesses of a picture with features ``drawn`` (C), whose real one has ``real`` (C).

    ``ranks``: for each cosine, of the right concept for this picture (``own``), of another query's (``shuffled``), of
    the right one for the real drawing (``real``) and for its drawings in the other styles (``others``). ``named``: the
    most similar drawing in the style; ``nearest``: in any. ``likeness`` (plain cosine) to the real drawing and to the
    most similar other drawing that training saw; ``real_training``: how similar that is to the real drawing.
    """
    style, accepted = query.style, query.accepted
    ranks = {}
    for cosine in COSINES:
        ranks[cosine] = {
            "own": gallery.rank(drawn, style, accepted, cosine),
            "shuffled": gallery.rank(drawn, style, other.accepted, cosine),
            "real": gallery.rank(real, style, accepted, cosine),
            "others": [
                gallery.rank(gallery.features[s][accepted[0]], style, accepted, cosine, origin=s)
                for s in emoji.STYLES
                if s != style
            ],
        }
    label, found = gallery.nearest(drawn)
    to_target, to_training = gallery.likeness(drawn, style, accepted)
    return {
        "shuffled_with": gallery.known[other.accepted[0]].label,
        "gallery": len(gallery),
        "ranks": ranks,
        "named": gallery.nearest(drawn, (style,))[0],
        "nearest": {"label": label, "style": found},
        "likeness": {
            "target": round(to_target, 6),
            "training": round(to_training, 6),
            "real_training": round(gallery.likeness(real, style, accepted)[1], 6),
        },
    }


def sheet_rows(scorer: Scorer, asked: Sequence[Query], count: int = 24, draws: int = 3) -> list[Row]:
    """Rows of a contact sheet for at most ``count`` queries, spread evenly; the first picture of each is the one that
    is scored, the others have further noise."""
    total = min(count, len(asked))
    chosen = [asked[k * len(asked) // total] for k in range(total)]
    drawn: list[list[Image.Image]] = [[] for _ in chosen]
    for draw in range(draws):
        for start in range(0, total, scorer.batch_size):
            batch = scorer.draw(chosen[start : start + scorer.batch_size], draw)
            for pictures, picture in zip(drawn[start:], batch, strict=False):
                pictures.append(picture)
    return [_row(scorer.gallery, query, tuple(pictures)) for query, pictures in zip(chosen, drawn, strict=True)]


def _row(gallery: Gallery, query: Query, drawn: tuple[Image.Image, ...]) -> Row:
    prompt = query.prompt
    words = prompt if isinstance(prompt, str) else " / ".join(turn.text for turn in prompt)
    marks = {True: ", held out", False: ", in training", None: ""}[query.held_out]
    label = gallery.known[query.accepted[0]].label
    note = f"{query.kind}: {label}, {emoji.STYLE_WORDS[query.style]}{marks}"
    return Row(words, note, drawn, gallery.drawing(query.style, query.accepted[0]), marked=query.held_out is True)
