"""Conversations whose answers may hold pictures: the interleaved engine over the history and cache of any chat."""

from __future__ import annotations

import threading
from collections.abc import Generator as Stream
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from accessory.backbone.fast import accelerate_for_cpu
from accessory.backbone.generate import Sampling
from accessory.models.build import WEIGHTS_FILE, Model
from accessory.models.conditioner import DreamConditioner
from accessory.models.dream import Dream
from accessory.models.encoder_store import file_digest
from accessory.models.generator import Generator, find_generator, for_inference, load_generator
from accessory.nn.cache import KVCache
from accessory.parallel.groups import choose_device
from accessory.schema import Part, Turn
from accessory.serve import chat
from accessory.serve.answer import Prompt
from accessory.serve.chat import ChatModel, Dialogue, Notice
from accessory.serve.illustrate import Controls, Illustrated, IllustratedEvent, Order, needed
from accessory.serve.media import Limits, Source, user_turn
from accessory.serve.pictures import PictureRecord
from accessory.serve.reader import Memory, Reader

Mode = Literal["auto", "always", "never"]
MODES: tuple[Mode, ...] = ("auto", "always", "never")


def of_mode(controls: Controls, mode: str) -> Controls:
    """``controls`` with pictures where the model wants them (auto), in every answer (always) or not at all (never)."""
    if mode not in MODES:
        raise ValueError(f"pictures: {mode!r} is not one of {', '.join(MODES)}")
    at = controls.force_image_at if mode == "always" else None
    return replace(controls, force=mode == "always", force_image_at=at, forbid_images=mode == "never")


class IllustratedChat(Dialogue[IllustratedEvent]):
    """A conversation that shows pictures. Those of the assistant stay in the history and are seen in later rounds.

    ``dream`` None: the generator reads the question's text alone, and pictures come only where they are forced.
    ``controls`` are the default of :meth:`ask`. Pictures are numbered through the dialogue, and with the number the
    seed follows from ``controls.seed``.
    """

    def __init__(
        self,
        model: Model,
        generator: Generator,
        dream: Dream | None = None,
        *,
        controls: Controls | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        history: Sequence[Turn] = (),
        lock: threading.RLock | None = None,
    ) -> None:
        self._reader = Reader(model, dream)
        super().__init__(model, sampling=sampling, limits=limits, history=history, lock=lock)
        self.generator, self.controls = generator, controls or Controls()
        self._memory: Memory | None = None
        self._records: dict[int, PictureRecord] = {}

    @property
    def records(self) -> tuple[PictureRecord, ...]:
        """The log: what the pictures of the history were drawn from, see :func:`accessory.serve.pictures.draw`."""
        return tuple(self._records[i] for i in range(self._drawn()) if i in self._records)

    def ask(
        self,
        text: str,
        images: Sequence[Source] = (),
        controls: Controls | None = None,
        sampling: Sampling | None = None,
    ) -> Stream[IllustratedEvent | Notice, None, None]:
        """The answer to ``text`` about ``images`` as it comes; closing the iterator stops text and drawing alike.

        Raises:
            ValueError: at once, before anything changes, for unusable pictures, sizes or a turn that cannot fit.
        """
        return self.events(user_turn(text, images, self.limits), controls, sampling)

    def say(
        self,
        text: str,
        images: Sequence[Source] = (),
        controls: Controls | None = None,
        sampling: Sampling | None = None,
    ) -> tuple[Part, ...]:
        """The whole answer: text and pictures in order."""
        for _ in self.ask(text, images, controls, sampling):
            pass
        return self.history[-1].parts

    def events(
        self, turn: Turn, controls: Controls | None = None, sampling: Sampling | None = None
    ) -> Stream[IllustratedEvent | Notice, None, None]:
        """As :meth:`ask`, for a turn already made."""
        controls = controls or self.controls
        for size in controls.sizes:
            self.generator.check_size(size)

        def make(prompt: Prompt, cache: KVCache, sampling: Sampling, keep: int) -> Illustrated:
            if self._memory is None or self._memory.cache is not cache:
                self._memory = Memory(cache)

            def recent() -> Prompt:
                starts = [i for i, t in enumerate(self._history) if t.role == "user"][-controls.last_k :]
                kept = self._history[starts[0] :] if starts and controls.last_k > 0 else ()
                return self._prompt((*self._history[: self._head()], *kept, turn))

            order = Order(controls, self._drawn(), turn.text, recent, self._records)
            return Illustrated(self._reader, self.generator, self._memory, prompt, sampling, keep, order)

        reserve = 0 if controls.forced is None else needed(self._reader, controls, self.generator.size, 0)
        return self._listen(turn, sampling, make, reserve)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        return self._reader.prompt(turns)

    def _drawn(self) -> int:
        """Pictures that the assistant has shown so far."""
        return sum(len(t.pictures) for t in self._history if t.role == "assistant")


def join(model: Model, generator: Generator) -> Dream | None:
    """The bridge of a generator, dreaming from the network that speaks, so that one copy of it remains.

    None when there is no bridge, or when it stands on other weights than the model's: then it has no trigger that the
    model could say.
    """
    conditioner = generator.conditioner
    if not isinstance(conditioner, DreamConditioner):
        return None
    own, other = model.net.state_dict(), conditioner.dream.net.state_dict()
    if own.keys() != other.keys():
        return None
    for name, tensor in own.items():
        there = other[name]
        if there.shape != tensor.shape or not torch.equal(there.to(tensor.device, tensor.dtype), tensor):
            return None
    conditioner.dream.net = model.net
    conditioner.model = replace(conditioner.model, net=model.net)
    return conditioner.dream


class IllustratedModel:
    """A loaded model and generator that start conversations; safe to share between threads.

    ``dream`` is None where pictures cannot come by themselves, see :func:`join`.

    Raises:
        ValueError: when the model cannot see the pictures that it would draw.
    """

    def __init__(self, model: ChatModel, generator: Generator, *, controls: Controls | None = None) -> None:
        self.model, self.generator, self.controls = model.model, generator, controls or Controls()
        self.dream = join(model.model, generator)
        Reader(self.model, self.dream)
        self.sampling, self.limits = model.sampling, model.limits
        self._lock = threading.RLock()

    def new_chat(self, history: Sequence[Turn] = ()) -> IllustratedChat:
        """A conversation that goes on from ``history``."""
        return IllustratedChat(
            self.model,
            self.generator,
            self.dream,
            controls=self.controls,
            sampling=self.sampling,
            limits=self.limits,
            history=history,
            lock=self._lock,
        )


def load(
    folder: str | Path,
    generator: str | Path,
    *,
    cache: Path | None = None,
    device: str | None = None,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    controls: Controls | None = None,
) -> IllustratedModel:
    """The model of a folder with the pictures of a generator; arguments as :func:`accessory.serve.chat.load`, and the
    generator too may be a shipped one's name.

    Raises:
        ValueError: for folders that are none, and a model that cannot see pictures.
    """
    where, found = find_generator(generator), chat.find_model(folder)  # first: mistakes should not cost a model
    on = choose_device(device)
    drawing = load_generator(where, cache=cache)
    speaks = speaker(drawing, found)
    if speaks is None:
        model = chat.load(folder, cache=cache, device=device, sampling=sampling, limits=limits)
        return IllustratedModel(model, for_inference(drawing, on), controls=controls)
    drawing = for_inference(drawing, on)
    accelerate_for_cpu(speaks.net.backbone)
    return IllustratedModel(ChatModel(speaks, sampling=sampling, limits=limits), drawing, controls=controls)


def speaker(generator: Generator, folder: Path) -> Model | None:
    """The bridge's own language model, where that is the model of ``folder`` with something tuned on top: it was taught
    to speak of what it draws, so it speaks in that one's place. None for all others."""
    conditioner = generator.conditioner
    if not isinstance(conditioner, DreamConditioner) or not conditioner.model.config.tuning:
        return None
    weights = folder / WEIGHTS_FILE
    same = weights.is_file() and file_digest(weights) == conditioner.model.config.base_sha256
    return conditioner.model if same else None
