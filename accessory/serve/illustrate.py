"""The interleaved engine: text, a trigger, a picture that is drawn and then seen, and on with the text.

One answer is a walk through TEXT -> DREAM -> RENDER -> SEE -> TEXT over a single cache. The trigger is a score of the
language model's own; in DREAM the span of queries is read behind the text and its states become the condition, RENDER
draws beside the walk, and SEE reads the drawn picture into the same cache, so that the text that follows knows it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from accessory.backbone.generate import Row, Sampling, StopMatcher
from accessory.diffusion.condition import Condition
from accessory.diffusion.sampler import SamplerSettings
from accessory.models.generator_net import Generator, Size
from accessory.schema import Part, Picture
from accessory.serve.answer import Cost, Prompt, Trimmer, content_keys
from accessory.serve.pictures import PictureRecord, Progress, Rendering, digest_of, picture_seed
from accessory.serve.reader import Memory, Reader

History = Literal["all", "last_k", "text"]


@dataclass(frozen=True)
class TextDelta:
    """More of the text."""

    text: str


@dataclass(frozen=True)
class ImageStart:
    """A picture is being drawn: number ``index`` of the dialogue."""

    index: int
    seed: int
    size: Size


@dataclass(frozen=True)
class ImagePreview:
    """How it looks after ``step`` of ``steps`` (None where the solver does not know)."""

    index: int
    step: int
    steps: int | None
    picture: Image.Image


@dataclass(frozen=True)
class ImageDone:
    """It is drawn, and the text goes on; ``context``: digest of what it was dreamt from."""

    index: int
    picture: Image.Image
    seed: int
    context: str


@dataclass(frozen=True)
class Stats:
    """What an answer came to: ``dream_seconds`` is what the bridge took beside reading and drawing."""

    tokens: int
    pictures: int
    text_seconds: float
    dream_seconds: float
    render_seconds: float


@dataclass(frozen=True)
class Done:
    """The answer is complete."""

    stats: Stats


IllustratedEvent = TextDelta | ImageStart | ImagePreview | ImageDone | Done


@dataclass(frozen=True)
class Controls:
    """What an answer may do with pictures.

    Attributes:
        max_images: of one answer.
        min_text_between: tokens that the model says between two pictures, at least.
        force_image_at: the first picture comes after so many tokens (or at the end of a shorter answer), whatever the
            model wants.
        force: answer with a picture: ``force_image_at`` 0, where nothing else is said.
        forbid_images: text alone.
        sizes: of the pictures of an answer in order, the last one for all that follow; none: the generator's.
        negative: of the pictures in order, as ``sizes``; None for the null condition.
        history: what pictures are dreamt from: the dialogue, its ``last_k`` exchanges, or its text without pictures.
            What is said always follows from all of it.
        seed: of the document; that of a picture is :func:`accessory.serve.pictures.picture_seed` of it.
        settings: of the sampler; None: the generator's.
        previews: show every so many steps of the sampler how far a picture is; 0 shows nothing.

    Raises:
        ValueError: for values out of range or against each other.
    """

    max_images: int = 4
    min_text_between: int = 0
    force_image_at: int | None = None
    force: bool = False
    forbid_images: bool = False
    sizes: tuple[Size, ...] = ()
    negative: tuple[str | None, ...] = ()
    history: History = "all"
    last_k: int = 2
    seed: int = 0
    settings: SamplerSettings | None = None
    previews: int = 0

    def __post_init__(self) -> None:
        for name in ("max_images", "min_text_between", "last_k", "previews"):
            if getattr(self, name) < (1 if name == "last_k" else 0):
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least {int(name == 'last_k')}")
        if self.force_image_at is not None and self.force_image_at < 0:
            raise ValueError(f"force_image_at is {self.force_image_at}, it counts tokens from 0")
        if self.forced is not None and (self.forbid_images or self.max_images == 0):
            raise ValueError("a picture is forced, but forbid_images or max_images 0 allows none")

    @property
    def forced(self) -> int | None:
        """After how many tokens a picture comes in any case."""
        return 0 if self.force and self.force_image_at is None else self.force_image_at

    def size(self, number: int, own: Size) -> Size:
        """Of picture ``number`` of an answer; ``own`` is the generator's."""
        return self.sizes[min(number, len(self.sizes) - 1)] if self.sizes else own


@dataclass(frozen=True)
class Order:
    """What one answer is made with: ``first`` is the number of its first picture, ``said`` the question's text for
    the log and generators that read text alone, ``recent`` the prompt that ``last_k`` exchanges make, ``log`` takes
    records."""

    controls: Controls
    first: int = 0
    said: str = ""
    recent: Callable[[], Prompt] | None = None
    log: dict[int, PictureRecord] = field(default_factory=dict)


class Illustrated:
    """An answer with pictures in the making; driven as :class:`accessory.serve.answer.Answer` is."""

    def __init__(
        self,
        reader: Reader,
        generator: Generator,
        memory: Memory,
        prompt: Prompt,
        sampling: Sampling,
        keep: int,
        order: Order,
    ) -> None:
        self._reader, self._generator, self._memory, self._prompt = reader, generator, memory, prompt
        self._sampling, self._order, self._keep = sampling, order, keep
        self.begun = self.finished = False
        self._state: Callable[[], None] = self._read
        self._last = False  # whether the answer ends after the open picture
        self._events: deque[IllustratedEvent] = deque()
        self._parts: list[Part] = []
        self._text = ""
        self._pending: int | None = None  # the newest token, not yet in the cache
        self._scores: Tensor | None = None
        self._row: Row | None = None
        self._tokens = self._since = self._pictures = 0
        self._decoder, self._matcher = reader.model.tokenizer.stream(), StopMatcher(sampling.stop)
        self._trimmer = Trimmer(reader.model.template.strip)
        self._tiles = prompt.tiles_from(keep)
        self._rendering: Rendering | None = None
        self._record: PictureRecord | None = None
        self._spent = {"text": 0.0, "dream": 0.0, "render": 0.0, "prefill": 0.0}

    @property
    def parts(self) -> tuple[Part, ...]:
        """Text and finished pictures so far."""
        parts = (*self._parts, self._text) if self._text else tuple(self._parts)
        return parts or ("",)

    def step(self) -> IllustratedEvent | None:
        """The next event, if this step makes one; sets ``finished`` with the last."""
        self.begun = True
        if not self._events:
            self._state()
        event = self._events.popleft() if self._events else None
        self.finished = isinstance(event, Done)
        return event

    def held(self) -> list[int | bytes]:
        """What the cache holds now."""
        self._memory.cache.truncate(min(len(self._memory.keys), self._memory.cache.length))
        return list(self._memory.keys)

    def cost(self) -> Cost:
        """What it took so far; drawing is not in it."""
        spent, fed = self._spent, len(self._prompt.ids) - self._keep
        return Cost(self._keep, fed, len(self._tiles), self._tokens, spent["prefill"], spent["text"])

    def close(self) -> None:
        """Stop drawing."""
        if self._rendering is not None:
            self._rendering.close()
            self._rendering = None

    # --- the states ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        began = time.perf_counter()
        prompt, keep = self._prompt, self._keep
        self._memory.truncate(keep)
        self._scores = self._reader.read(self._memory, prompt.ids[keep:], prompt.keys[keep:], self._tiles)
        self._row = Row(self._sampling, len(self._scores), prompt.ids, self._scores.device)
        self._state = self._say
        self._spent["prefill"] += time.perf_counter() - began

    def _say(self) -> None:
        """TEXT: one token."""
        forced = self._order.controls.forced
        if forced is not None and not self._pictures and self._tokens >= forced:
            self._state = self._dream
            return
        began = time.perf_counter()
        self._advance()
        assert self._scores is not None
        assert self._row is not None
        token = self._row.choose(self._allowed(self._scores))
        self._tokens += 1
        if token == self._reader.trigger:
            self._last, self._state = self._row.done, self._dream
            if self._row.seen is not None:
                self._row.seen[token] = False  # drawing once is no reason not to draw again
        else:
            self._since += 1
            self._told(token, self._row.done)
        self._spent["text"] += time.perf_counter() - began

    def _told(self, token: int, last: bool) -> None:
        stopped = token in self._sampling.stop_ids
        piece = ""
        if not stopped:
            self._pending = token
            piece, stopped = self._matcher.push(self._decoder.push(token))
        self._tell(piece)
        owed = self._owed()
        # The newest token still has to be read, and before a picture that is owed the one after it too.
        if stopped or last or self._memory.room < (owed + 2 if owed else 1):
            self._finish()

    def _finish(self) -> None:
        """The text has ended: so does the answer, unless a picture is still owed."""
        self._tell(self._matcher.push(self._decoder.finish())[0] + self._matcher.flush())
        if self._owed():
            self._last, self._state = True, self._dream
        else:
            self._end()

    def _end(self) -> None:
        spent = self._spent
        stats = Stats(self._tokens, self._pictures, spent["text"], spent["dream"], spent["render"])
        self._events.append(Done(stats))

    def _dream(self) -> None:
        """DREAM: the span is read, and its states are the condition."""
        self._advance()
        began = time.perf_counter()
        self._tell(self._matcher.push(self._decoder.finish())[0] + self._matcher.flush() + self._trimmer.release())
        controls, generator = self._order.controls, self._generator
        number, index = self._pictures, self._order.first + self._pictures
        condition, context = self._imagined()
        negative = controls.negative
        self._record = PictureRecord(
            index=index,
            seed=picture_seed(controls.seed, index),
            size=controls.size(number, generator.size),
            negative=negative[min(number, len(negative) - 1)] if negative else None,
            settings=controls.settings or generator.settings,
            context=context,
            condition=condition.to("cpu"),
            prompt=self._order.said,
        )
        self._spent["dream"] += time.perf_counter() - began
        self._events.append(ImageStart(index, self._record.seed, self._record.size))
        self._state = self._render

    def _imagined(self) -> tuple[Condition, str]:
        """The condition, and a digest of what it was made from."""
        controls, reader, memory = self._order.controls, self._reader, self._memory
        if reader.dream is None:
            return self._generator.condition([self._order.said]), digest_of([self._order.said.encode()])
        keys = list(memory.keys)
        said = torch.tensor([k for k in keys[len(self._prompt.ids) :] if isinstance(k, int)], dtype=torch.long)
        made = reader.imagine(memory)
        if controls.history == "all":
            return made, digest_of(keys)
        prompt = self._prompt
        if controls.history == "last_k" and self._order.recent is not None:
            prompt = self._order.recent()
        # Pictures of this answer are left out here: their tiles are not the prompt's.
        ids = torch.cat((prompt.ids, said[said >= 0]))
        if controls.history == "text":
            return reader.condition(ids, prompt.tiles, "text"), digest_of(ids[ids >= 0].tolist())
        return reader.condition(ids, prompt.tiles), digest_of(content_keys(ids, prompt.tiles, prompt.tokens_per_tile))

    def _render(self) -> None:
        """RENDER: wait for a preview or the picture."""
        began = time.perf_counter()
        assert self._record is not None
        if self._rendering is None:
            self._rendering = Rendering(self._generator, self._record, self._order.controls.previews)
        made = self._rendering.next()
        record = self._record
        self._spent["render"] += time.perf_counter() - began
        if isinstance(made, Progress):
            self._events.append(ImagePreview(record.index, made.step, made.steps, made.picture))
            return
        self.close()
        self._state = lambda: self._see(made, record)

    def _see(self, picture: Image.Image, record: PictureRecord) -> None:
        """SEE: the picture is read into the cache as those of the user are."""
        began = time.perf_counter()
        shown = Picture(picture)
        ids, keys, tiles = self._reader.see(shown)
        self._scores = self._reader.read(self._memory, ids, keys, tiles)
        if self._text:
            self._parts.append(self._text)
        self._parts.append(shown)
        self._text, self._since = "", 0
        self._decoder = self._reader.model.tokenizer.stream()
        self._pictures += 1
        self._order.log[record.index] = record
        self._events.append(ImageDone(record.index, picture, record.seed, record.context))
        self._state = self._say
        if self._last or self._memory.room < 1:
            self._end()
        self._spent["dream"] += time.perf_counter() - began

    # --- inside -------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read the newest token."""
        if self._pending is not None:
            token, self._pending = self._pending, None
            self._scores = self._reader.read(self._memory, torch.tensor([token]), [token])

    def _tell(self, piece: str) -> None:
        piece = self._trimmer.push(piece)
        self._text += piece
        if piece:
            self._events.append(TextDelta(piece))

    def _owed(self) -> int:
        """Positions to keep free for a picture that must come."""
        controls = self._order.controls
        due = controls.forced is not None and not self._pictures
        return needed(self._reader, controls, self._generator.size, 0) if due else 0

    def _allowed(self, scores: Tensor) -> Tensor:
        """The scores, the trigger's out of reach where no picture may come now."""
        controls, trigger = self._order.controls, self._reader.trigger
        if trigger is None:
            return scores
        some = self._pictures > 0
        allowed = (
            not controls.forbid_images
            and self._pictures < controls.max_images
            and not (some and self._since < controls.min_text_between)
            and self._memory.room >= needed(self._reader, controls, self._generator.size, self._pictures)
        )
        if allowed:
            return scores
        scores = scores.clone()
        scores[trigger] = float("-inf")
        return scores


def needed(reader: Reader, controls: Controls, own: Size, number: int) -> int:
    """Positions that picture ``number`` of an answer takes on its way."""
    return len(reader.span) + reader.positions(*controls.size(number, own))
