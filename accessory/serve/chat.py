"""Conversations over one shared model: streamed answers, and a key/value cache that lives as long as the dialogue.

Every turn renders the whole dialogue again, compares it position by position with what the cache holds, forgets what
differs and feeds only the rest. That is right for a further question, for an undone turn and for an edited history
alike; a picture that the cache holds is never encoded again.
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from accessory.backbone.fast import accelerate_for_cpu
from accessory.backbone.generate import Sampling
from accessory.models import build
from accessory.models.build import Model
from accessory.nn.cache import KVCache
from accessory.parallel.groups import choose_device
from accessory.peft.quantize import Quantization
from accessory.schema import Part, Turn
from accessory.serve.answer import Answer, Cost, Prompt, common
from accessory.serve.experts import Experts
from accessory.serve.media import Limits, Source, turns_of, user_turn

Event = TypeVar("Event")
Event_co = TypeVar("Event_co", covariant=True)


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is no part of the answer."""

    text: str


class Reply(Protocol[Event_co]):
    """An answer in the making, as a dialogue drives it: see :class:`accessory.serve.answer.Answer`."""

    @property
    def begun(self) -> bool:
        """Whether it has touched the cache."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was said so far."""
        ...

    def step(self) -> Event_co | None:
        """The next thing to tell, if this step makes one."""
        ...

    def held(self) -> list[int | bytes]:
        """What the cache holds now."""
        ...

    def cost(self) -> Cost:
        """What it took so far."""
        ...

    def close(self) -> None:
        """End what runs between steps."""
        ...


Make = Callable[[Prompt, KVCache, Sampling, int], Reply[Event]]
"""An answer to a prompt over a cache, of which so many leading positions are the prompt's already."""


class Dialogue(Generic[Event]):
    """What all conversations share: the history, the cache and what it holds, turns under a common ``lock``.

    Dialogues that no longer fit ``max_length`` of the model's configuration lose their oldest whole exchanges, and a
    :class:`Notice` says so. ``experts`` tell the model about pictures; the history holds what the user said alone.
    """

    def __init__(
        self,
        model: Model,
        *,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        history: Sequence[Turn] = (),
        lock: threading.RLock | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.model, self.sampling, self.limits = model, sampling or Sampling(), limits or Limits()
        self.experts = experts
        self.last_cost: Cost | None = None
        # Reentrant: a forgotten answer may be collected, and so closed, while this thread holds the lock.
        self._lock = lock or threading.RLock()
        self._history = tuple(history)
        self._first = self._head()  # index of the oldest turn that the model still reads
        self._cache: KVCache | None = None
        self._held: list[int | bytes] = []
        self._open: tuple[Reply[Event], Turn] | None = None

    @property
    def history(self) -> tuple[Turn, ...]:
        """Everything said so far, also what the model no longer reads."""
        return self._history

    def undo(self) -> Turn | None:
        """Forget the last question and its answer; the question, or None when there was none."""
        asked = [i for i, t in enumerate(self._history) if t.role == "user"]
        if not asked:
            return None
        question = self._history[asked[-1]]
        self.rewind(len(asked) - 1)
        return question

    def rewind(self, questions: int) -> None:
        """Forget everything from question number ``questions`` (counted from 0) on."""
        with self._lock:
            self._settle()
            asked = [i for i, t in enumerate(self._history) if t.role == "user"]
            if questions < len(asked):
                self._history = self._history[: asked[questions]]
            # What was forgotten to make room may fit again; the next turn decides anew.
            self._first = self._head()

    def follow(self, asked: Sequence[str]) -> int:
        """Keep only the leading questions that are ``asked`` (what a page still shows); how many these are."""
        with self._lock:
            self._settle()
            own = [t.text.strip() for t in self._history if t.role == "user"]
            same = common(own, [text.strip() for text in asked])
            self.rewind(same)
        return same

    def reset(self) -> None:
        """Forget the dialogue; a system turn stays."""
        self.rewind(0)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        """What asks for an answer to ``turns``."""
        return Prompt.of(self.model, turns if self.experts is None else self.experts.advise(turns))

    def _listen(
        self, turn: Turn, sampling: Sampling | None, make: Make[Event], reserve: int = 0
    ) -> Generator[Event | Notice, None, None]:
        """The answer that ``make`` gives to ``turn``, after room for ``reserve`` positions beside its text was made."""
        if turn.pictures and self.model.net.tower is None:
            raise ValueError("this model takes no pictures in a chat: it has no tower that sees them")
        with self._lock:
            self._settle()
            sampling = self._with_stops(sampling or self.sampling)
            first, prompt = self._fit(turn, sampling.max_new_tokens, reserve)
            limit = self.model.encoder.max_length
            if self._cache is None:
                self._cache = self.model.net.backbone.cache(1, limit)
            room = min(sampling.max_new_tokens, limit - len(prompt.ids))
            sampling = replace(sampling, max_new_tokens=room)
            answer = make(prompt, self._cache, sampling, prompt.reusable(self._held))
            gone = sum(t.role == "user" for t in self._history[self._first : first])
            self._first, self._open = first, (answer, turn)
        notices = [Notice(_forgotten(gone, limit))] if gone else []
        return self._run(answer, notices)

    def _head(self) -> int:
        """Index of the first turn that is not the system's."""
        return int(bool(self._history) and self._history[0].role == "system")

    def _with_stops(self, sampling: Sampling) -> Sampling:
        words, template = self.model.tokenizer, self.model.template
        ids = {*sampling.stop_ids}
        for name in (*template.stop_controls, "eos"):
            try:
                ids.add(words.special(name))
            except ValueError:
                continue  # a template also names ends that this vocabulary does not have
        texts = dict.fromkeys((*sampling.stop, *template.stop_texts))
        return replace(sampling, stop_ids=tuple(sorted(ids)), stop=tuple(texts))

    def _fit(self, turn: Turn, wanted: int, reserve: int) -> tuple[int, Prompt]:
        """The prompt, and the index of the oldest turn in it after whole exchanges were dropped to make room."""
        limit = self.model.encoder.max_length
        room = min(wanted, limit // 4) + reserve
        starts = [i for i, t in enumerate(self._history) if t.role == "user" and i >= self._first]
        for first in (*starts, len(self._history)):
            prompt = self._prompt((*self._history[: self._head()], *self._history[first:], turn))
            if len(prompt.ids) + room <= limit:
                return first, prompt
        if len(prompt.ids) + reserve < limit:
            return len(self._history), prompt
        seen = int((prompt.ids < 0).sum())
        raise ValueError(
            f"this turn alone takes {len(prompt.ids) + reserve} positions ({seen} of them for {len(turn.pictures)} "
            f"pictures), the limit of this model is {limit}; ask less or bring fewer pictures"
        )

    def _run(self, answer: Reply[Event], notices: Sequence[Notice]) -> Generator[Event | Notice, None, None]:
        failed = False
        try:
            yield from notices
            while not answer.finished:
                with self._lock:
                    if self._open is None or self._open[0] is not answer:
                        return  # a newer question has taken over
                    piece = answer.step()
                if piece:
                    yield piece
        except Exception:
            failed = True
            raise
        finally:
            with self._lock:
                if self._open is not None and self._open[0] is answer:
                    self._settle(failed)

    def _settle(self, failed: bool = False) -> None:
        """End the open answer: note what the cache holds, and keep what was said, if anything was."""
        if self._open is None:
            return
        (answer, turn), self._open = self._open, None
        answer.close()
        if not answer.begun:
            return  # nobody listened, and the cache is as it was
        self._held, self.last_cost = answer.held(), answer.cost()
        if not failed and (any(answer.parts) or answer.finished):
            self._history = (*self._history, turn, Turn("assistant", answer.parts))


class Chat(Dialogue[str]):
    """One conversation. Many may share a model: steps of different chats take turns under a common ``lock``.

    ``sampling`` is the default of :meth:`ask`; the template's stops are always added.
    """

    def ask(
        self, text: str, images: Sequence[Source] = (), sampling: Sampling | None = None
    ) -> Generator[str, None, None]:
        """The answer to ``text`` about ``images`` (paths, bytes or PIL) in pieces as they come.

        Closing the iterator stops the answer; what was said until then stays in the history.

        Raises:
            ValueError: at once, before anything changes, for unusable pictures or a turn that cannot fit.
        """
        return _texts(self.events(user_turn(text, images, self.limits), sampling))

    def say(self, text: str, images: Sequence[Source] = (), sampling: Sampling | None = None) -> str:
        """The whole answer."""
        return "".join(self.ask(text, images, sampling))

    def events(self, turn: Turn, sampling: Sampling | None = None) -> Generator[str | Notice, None, None]:
        """As :meth:`ask`, for a turn already made, with notices among the pieces."""
        return self._listen(turn, sampling, self._answer)

    def _answer(self, prompt: Prompt, cache: KVCache, sampling: Sampling, keep: int) -> Answer:
        return Answer(self.model, cache, prompt, sampling, keep)


def _texts(events: Generator[str | Notice, None, None]) -> Generator[str, None, None]:
    try:
        for event in events:
            if isinstance(event, str):
                yield event
    finally:
        events.close()


def _forgotten(gone: int, limit: int) -> str:
    what = "The oldest question" if gone == 1 else f"The {gone} oldest questions"
    return f"{what} and what belongs to {'it' if gone == 1 else 'them'} no longer fit {limit} positions: forgotten."


class ChatModel:
    """A loaded model that starts conversations; safe to share between threads.

    >>> model = accessory.load("weights/nano")           # doctest: +SKIP
    >>> model.chat("What is this?", images=["cat.png"])  # doctest: +SKIP
    'cat'
    """

    def __init__(
        self,
        model: Model,
        *,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.model, self.experts = model, experts
        self.sampling, self.limits = sampling or Sampling(), limits or Limits()
        self._lock = threading.RLock()

    def new_chat(self, history: Sequence[Turn] = ()) -> Chat:
        """A conversation that goes on from ``history``."""
        return Chat(
            self.model,
            sampling=self.sampling,
            limits=self.limits,
            history=history,
            lock=self._lock,
            experts=self.experts,
        )

    def chat(self, messages: str | Sequence[Mapping[str, Any]], images: Sequence[Source] = (), **sampling: Any) -> str:
        """The answer to a question about ``images``, or to a dialogue of messages whose last is the user's.

        ``sampling`` sets fields of :class:`accessory.backbone.generate.Sampling`, e.g. ``temperature=0.7``.
        """
        if isinstance(messages, str):
            turns: tuple[Turn, ...] = (user_turn(messages, images, self.limits),)
        elif images:
            raise ValueError("in a list of messages the pictures are parts of a message; give no images beside it")
        else:
            turns = turns_of(messages, self.limits)
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message must be the user's, otherwise there is nothing to answer")
        events = self.new_chat(turns[:-1]).events(turns[-1], replace(self.sampling, **sampling))
        return "".join(_texts(events))


def find_model(name: str | Path, *, generators: bool = False) -> Path:
    """A model folder from its path or the name of a model that comes with a checkout; ValueError lists these.

    ``generators``: one that draws will do as well.
    """
    path = build.find(name)
    drawing = build.is_generator(path)
    if (path / build.CONFIG_FILE).is_file() and (generators or not drawing):
        return path
    folders = sorted(p.parent for p in build.SHIPPED.glob(f"*/{build.CONFIG_FILE}"))
    kinds = {"models": [p.name for p in folders if not build.is_generator(p)]}
    if generators:
        kinds["generators"] = [p.name for p in folders if build.is_generator(p)]
    there = "; ".join(f"shipped {kind} are: {', '.join(names)}" for kind, names in kinds.items() if names)
    there = there or "this checkout ships no models"
    if drawing:
        raise ValueError(f"{name} is a generator, which makes pictures and does not speak; {there}")
    guesses = [str(path / "final")] if (path / "final" / build.CONFIG_FILE).is_file() else []
    guesses += difflib.get_close_matches(path.name, itertools.chain(*kinds.values()), n=1)
    hint = f"; did you mean {guesses[0]}?" if guesses else ""
    raise ValueError(f"{name} is neither a model folder (with a {build.CONFIG_FILE}) nor a shipped one; {there}{hint}")


def load(
    folder: str | Path,
    *,
    cache: Path | None = None,
    device: str | None = None,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    quantization: Quantization | None = None,
    experts: Experts | None = None,
) -> ChatModel:
    """The model of a folder (or a shipped one by name), ready to chat. ``cache``: where the assets lie.

    ``device`` as in :func:`accessory.parallel.groups.choose_device`, None for the best there is.
    On a CPU the weights of a bf16 backbone are packed for decoding, which costs a second copy of them.
    ``quantization``: fold LoRA into the backbone and quantise it (:func:`accessory.models.build.shrink`). ``experts``
    tell it what they see in the user's pictures.
    """
    where = choose_device(device)  # first: a mistake should not cost the loading of a model
    model = build.load(find_model(folder), cache=cache)
    model.net.to(where)
    if quantization is not None:
        build.shrink(model, quantization)
    accelerate_for_cpu(model.net.backbone)
    return ChatModel(model, sampling=sampling, limits=limits, experts=experts)
