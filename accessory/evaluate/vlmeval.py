"""Our models in VLMEvalKit, after its interface (``vlmeval.vlm.base.BaseModel``).

It has no entry points; a run registers the class in its own script:

    from functools import partial
    from vlmeval.config import supported_VLM
    supported_VLM["nano-sphinx"] = partial(AccessoryVLM, model_path="weights/nano-sphinx")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accessory.evaluate.harness import Asked, parts_of, sampling_of, turns_of
from accessory.schema import Picture, Turn

try:
    from vlmeval.vlm.base import BaseModel as _Base
except ImportError:  # the class is whole without it: its own checks of messages are all that is missing
    _Base = object


class AccessoryVLM(_Base):
    """``generate_inner(message, dataset)`` and ``chat_inner(message, dataset)`` over a model folder.

    ``generation``: arguments as of lmms-eval (``max_new_tokens``, ``temperature``, ...), greedy by default.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self, model_path: str, *, device: str | None = None, cache: str | None = None, **generation: Any
    ) -> None:
        if _Base is not object:
            super().__init__()
        self.asked = Asked(model_path, device=device, cache=cache)
        self.sampling = sampling_of(generation)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """False: the kit's own prompts are asked as they are."""
        return False

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message: parts ``{"type": "text" | "image", "value": text or path}`` in reading order."""
        return self._answer((Turn("user", self._parts(message, "message")),))

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a dialogue: ``{"role", "content"}`` with such parts, the last one the user's."""
        turns = turns_of(message)
        if not turns or turns[-1].role != "user":
            raise ValueError("the last message must be the user's, otherwise there is nothing to answer")
        return self._answer(turns)

    def _parts(self, message: Sequence[Mapping[str, Any]], where: str) -> tuple[str | Picture, ...]:
        parts = parts_of(message, where)
        if not parts:
            raise ValueError("an empty message: there is nothing to answer")
        return parts

    def _answer(self, turns: tuple[Turn, ...]) -> str:
        return self.asked.texts([turns], self.sampling)[0]
