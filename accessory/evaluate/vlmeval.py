"""Our models in VLMEvalKit, after the interface of its models (``vlmeval.vlm.base.BaseModel``, as of 2026-08).

The kit asks for methods, not for a base class, and has no entry points; a run registers the class in its own script:

    from functools import partial
    from accessory.evaluate.vlmeval import AccessoryVLM
    from vlmeval.config import supported_VLM
    supported_VLM["nano-sphinx"] = partial(AccessoryVLM, model_path="weights/nano-sphinx")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accessory.data.image import FORMATS
from accessory.evaluate.harness import Asked, parts_of, sampling_of, turns_of
from accessory.schema import Turn

Message = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""What the kit hands over: a text, a part ``{"type": "text" | "image", "value"}``, or a list of texts or parts."""

_SUFFIXES = tuple("." + name.lower() for name in (*FORMATS, "jpg", "tif"))


class AccessoryVLM:
    """``generate`` and ``chat`` as the kit's runs call them, over ``generate_inner`` and ``chat_inner``.

    ``generation``: arguments as of lmms-eval (``max_new_tokens``, ``temperature``, ...), greedy by default.
    """

    is_api = False
    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self, model_path: str, *, device: str | None = None, cache: str | None = None, **generation: Any
    ) -> None:
        self.asked = Asked(model_path, device=device, cache=cache)
        self.sampling = sampling_of(generation)
        self.dump_image: Callable[..., Any] | None = None

    def set_dump_image(self, dump_image: Callable[..., Any]) -> None:
        """Takes the data set's writer of pictures, which own prompts would need; we ask the kit's."""
        self.dump_image = dump_image

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """False: the kit's own prompts are asked as they are."""
        return False

    def generate(self, message: Message, dataset: str | None = None) -> str:
        """The answer to a message in any of the kit's forms; a text that names a picture file is that picture."""
        return self.generate_inner(_parts(message), dataset)

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a dialogue whose contents are in any of the kit's forms."""
        return self.chat_inner([{**m, "content": _parts(m["content"])} for m in messages], dataset)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to parts ``{"type": "text" | "image", "value": text or path}`` in reading order."""
        parts = parts_of(message, "message")
        if not parts:
            raise ValueError("an empty message: there is nothing to answer")
        return self._answer((Turn("user", parts),))

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a dialogue: ``{"role", "content"}`` with such parts, the last one the user's."""
        turns = turns_of(message)
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message must be the user's, otherwise there is nothing to answer")
        return self._answer(turns)

    def _answer(self, turns: tuple[Turn, ...]) -> str:
        return self.asked.texts([turns], self.sampling)[0]


def _parts(message: Message) -> list[Mapping[str, Any]]:
    if isinstance(message, str):
        return [{"type": "text", "value": message}]
    if isinstance(message, Mapping):
        return [message]
    return [_named(part) if isinstance(part, str) else part for part in message]


def _named(text: str) -> dict[str, str]:
    return {"type": "image" if text.lower().endswith(_SUFFIXES) else "text", "value": text}
