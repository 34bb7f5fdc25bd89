"""What evaluation harnesses ask of a model, in their words: messages in, texts or losses out.

``lmms.py`` and ``vlmeval.py`` are thin classes over :class:`Asked`; what they share with our own ``evaluate`` is
:func:`accessory.evaluate.score.answers`, so that equal questions get equal answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accessory.backbone.fast import accelerate_for_cpu
from accessory.backbone.generate import Sampling
from accessory.data.image import open_picture
from accessory.evaluate.score import answers
from accessory.models import build
from accessory.models.build import Model
from accessory.models.likelihood import Likelihood, answered, likelihoods
from accessory.parallel.groups import choose_device
from accessory.schema import Part, Picture, Role, Sample, Turn

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_TEXT_KEYS, _PICTURE_KEYS = ("text", "value"), ("url", "image", "value")
_IGNORED = ("num_beams", "return_dict_in_generate", "use_cache")  # one beam is what we do anyway


def turns_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Turns of messages ``{"role", "content"}``, content a text or parts of type ``text`` and ``image``.

    Raises:
        ValueError: for an unknown role, or a part that is neither (a video, a sound).
    """
    turns = []
    for i, message in enumerate(messages):
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            raise ValueError(f"messages[{i}].role {message.get('role')!r} is not one of {', '.join(_ROLES)}")
        turns.append(Turn(role, parts_of(message["content"], f"messages[{i}].content")))
    return tuple(turns)


def parts_of(content: object, where: str = "message") -> tuple[Part, ...]:
    """Parts of a content: a text, or a list of ``{"type": "text" | "image", ...}`` in reading order."""
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence):
        raise ValueError(f"{where} must be text or a list of parts, got {content!r:.80}")
    parts: list[Part] = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise ValueError(f"{where}[{j}] is of type {kind!r}; this model reads text and images")
        found = [part[k] for k in (_TEXT_KEYS if kind == "text" else _PICTURE_KEYS) if part.get(k) is not None]
        if not found:
            raise ValueError(f"{where}[{j}] holds nothing: {part!r:.80}")
        if kind == "text":
            parts.append(str(found[0]))
        else:
            parts.append(Picture(open_picture(found[0])))
    return tuple(parts)


def sampling_of(wanted: Mapping[str, Any], default: int = 256) -> Sampling:
    """Sampling of a harness's generation arguments; greedy unless it wants to sample at a temperature above 0.

    Raises:
        ValueError: for arguments that would change answers and that are not known here (beams, penalties).
    """
    given = dict(wanted)
    until = given.pop("until", ()) or ()
    stop = (until,) if isinstance(until, str) else tuple(u for u in until if u)
    temperature = float(given.pop("temperature", 0) or 0)
    if given.pop("do_sample", temperature > 0) is False:
        temperature = 0.0
    top_p, top_k = given.pop("top_p", None), given.pop("top_k", None)
    new = int(given.pop("max_new_tokens", None) or given.pop("max_gen_toks", None) or default)
    strange = [k for k, v in given.items() if k not in _IGNORED or (k == "num_beams" and v not in (None, 1))]
    if strange:
        raise ValueError(f"generation argument {strange[0]}={given[strange[0]]!r} is not supported by this model")
    sampled = temperature > 0
    return Sampling(
        max_new_tokens=new,
        temperature=temperature,
        top_p=float(top_p) if sampled and top_p else None,
        top_k=int(top_k) if sampled and top_k else None,
        stop=stop,
        seed=0 if sampled else None,
    )


class Asked:
    """A model folder behind a harness; ``device`` and ``cache`` as of ``accessory.load``."""

    def __init__(self, pretrained: str, *, device: str | None = None, cache: str | None = None) -> None:
        where = choose_device(device)
        folder = Path(pretrained).expanduser()
        self.model: Model = build.load(folder, cache=Path(cache) if cache else None)
        self.model.net.to(where)
        accelerate_for_cpu(self.model.net.backbone)

    def texts(self, dialogues: Sequence[Sequence[Turn]], sampling: Sampling) -> list[str]:
        """Answers to dialogues whose last turn is the user's, asked together."""
        # A sample ends with its own answer, which is never shown.
        samples = [Sample((*turns, Turn("assistant", ("",)))) for turns in dialogues]
        return answers(self.model, samples, sampling=sampling)

    def likelihoods(self, asked: Sequence[tuple[Sequence[Turn], str]], batch_size: int = 16) -> list[Likelihood]:
        """How likely each answer is after its dialogue."""
        rows = [answered(self.model, turns, answer) for turns, answer in asked]
        return likelihoods(self.model, rows, batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.net.parameters()).device
