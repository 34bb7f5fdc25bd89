"""Experts at inference: what a captioner, a reader of text or a detector says of a picture stands beside the question
as its input (LLaMA-Adapter V2, Gao et al. 2023, section 3.4). Nothing is trained for it.

>>> captioner = accessory.load("captions")                                              # doctest: +SKIP
>>> look = Expert("captioner", lambda image: captioner.chat("What is it?", [image]))   # doctest: +SKIP
>>> accessory.load("adapter", experts=Experts([look])).chat("Who is that?", ["a.png"])  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from accessory.data.image import open_picture
from accessory.schema import Part, Picture, Turn

WORDINGS = {
    "captioner": "The picture shows: {text}",
    "ocr": "The picture contains the text: {text}",
    "detector": "The picture contains these objects: {text}",
    "search": "Known about the picture: {text}",
}
"""How a model is told what an expert of that name says; the words are ours, no published ones are known."""


@dataclass(frozen=True)
class Expert:
    """``look`` says something of a picture (RGB), nothing where there is nothing to say. ``wording`` puts it into the
    prompt at its ``{text}``; None takes that of the name in :data:`WORDINGS`.

    Raises:
        ValueError: for a name without a wording, or a wording without its place.
    """

    name: str
    look: Callable[[Image.Image], str]
    wording: str | None = None

    def __post_init__(self) -> None:
        if self.wording is None and self.name not in WORDINGS:
            raise ValueError(f"expert {self.name!r} needs a wording; there are some for {', '.join(WORDINGS)}")
        if "{text}" not in self._wording:
            raise ValueError(f"the wording {self.wording!r} of expert {self.name!r} has no {{text}}")

    @property
    def _wording(self) -> str:
        return WORDINGS[self.name] if self.wording is None else self.wording

    def says(self, image: Image.Image) -> str:
        """The line for the prompt, empty where the expert is silent."""
        text = self.look(image).strip()
        return self._wording.replace("{text}", text) if text else ""


class Experts:
    """Several experts, asked in order and once a picture: the last ``remembered`` pictures are not asked about again,
    so that the turns of a dialogue stay as they were read."""

    def __init__(self, experts: Sequence[Expert], remembered: int = 64) -> None:
        if remembered < 1:
            raise ValueError(f"remembered is {remembered} pictures, it must be at least 1")
        self.experts, self._remembered = tuple(experts), remembered
        self._said: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.RLock()

    def about(self, picture: Picture) -> str:
        """All that is said of a picture, a line an expert."""
        image = open_picture(picture.source).convert("RGB")
        key = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        with self._lock:
            if key not in self._said:
                self._said[key] = "\n".join(filter(None, (e.says(image) for e in self.experts)))
            self._said.move_to_end(key)
            while len(self._said) > self._remembered:
                self._said.popitem(last=False)
            return self._said.get(key, "")

    def advise(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The same turns with what is said of the user's pictures behind the text of their turn: a template that tells
        a question from its input (Alpaca) takes it for the input, others put it on lines of its own."""
        return tuple(self._advised(t) if t.role == "user" and t.pictures else t for t in turns)

    def _advised(self, turn: Turn) -> Turn:
        block = "\n".join(filter(None, map(self.about, turn.pictures)))
        if not block:
            return turn
        parts: list[Part] = list(turn.parts)
        texts = [i for i, part in enumerate(parts) if isinstance(part, str)]
        if not texts:
            return replace(turn, parts=(*parts, block))
        last = f"{parts[texts[-1]]}\n"
        if len(texts) == 1:
            parts[texts[-1] : texts[-1] + 1] = [last, block]
        else:  # an input is there already, or pictures stand between the words
            parts[texts[-1]] = last + block
        return replace(turn, parts=tuple(parts))
