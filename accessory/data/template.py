"""Dialogue templates as values: role marks, separators, stops and what is learned, as data.

A template is made of pieces: plain text, or :class:`Control` for a control token by name. They never mix: user text
stays text, and only a template can name a control token. The strings of the published templates are an interface:
released weights were tuned on them (Vicuna/FastChat, Stanford Alpaca, LLaMA-2 chat, ChatML).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accessory.schema import Picture, Turn


@dataclass(frozen=True)
class Control:
    """A control token by name: its string, or ``bos`` / ``eos`` for whatever the vocabulary calls so."""

    name: str


Piece = str | Control


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered dialogue: text, a control token or a picture, and whether it is learned.

    A picture that the assistant shows is learned by models that draw (``data/encode.py``); to others it is context.
    """

    content: str | Control | Picture
    learn: bool = False


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. ``lead`` and ``end`` stand around an answer and are learned with it."""

    name: str
    begin: tuple[Piece, ...] = ()
    system: str | None = None  # the system text when the dialogue brings none
    system_prefix: tuple[Piece, ...] = ()
    system_suffix: tuple[Piece, ...] = ()
    system_inside: bool = False  # the system text stands inside the first user turn (LLaMA-2)
    user_prefix: tuple[Piece, ...] = ()
    user_suffix: tuple[Piece, ...] = ()
    assistant_prefix: tuple[Piece, ...] = ()
    lead: str = ""
    end: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()  # follows a learned answer, not learned
    close: tuple[Piece, ...] = ()  # once at the end of a finished dialogue, not learned
    stop: tuple[Piece, ...] = ()
    strip: bool = True  # blanks around a turn's text are dropped
    pictures_first: bool = False  # the first turn's pictures stand before all text (SPHINX)
    pictures_before_begin: bool = False  # and before ``begin`` too (LLaMA2-Accessory's models with a single CLIP)
    input_system: str | None = None  # the system text when the first user turn has an input (Alpaca)
    input_prefix: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return tuple(p for p in self.stop if isinstance(p, str))

    @property
    def stop_controls(self) -> tuple[str, ...]:
        """Names of control tokens that end an answer (look up with ``Tokenizer.special``)."""
        return tuple(p.name for p in self.stop if isinstance(p, Control))


BOS, EOS = Control("bos"), Control("eos")
_START, _END = Control("<|im_start|>"), Control("<|im_end|>")
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

_LLAVA = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
_SPHINX = Template(
    name="sphinx",
    begin=(BOS,),
    system=_HUMAN,
    system_suffix=("\n\n###",),
    user_prefix=(" Human: ",),
    user_suffix=("\n###",),
    assistant_prefix=(" Assistant:",),
    lead=" ",
    end=("\n###",),
    close=(EOS,),
    stop=("\n###", EOS),
    pictures_first=True,
)
_VICUNA = Template(
    name="vicuna_v1_1",
    begin=(BOS,),
    system=_HUMAN.replace("human", "user"),
    system_suffix=(" ",),
    user_prefix=(" USER: ",),
    user_suffix=(" ",),
    assistant_prefix=(" ASSISTANT:",),
    lead=" ",
    end=(EOS,),
    stop=(EOS,),
)
_STANFORD = Template(
    name="alpaca",
    begin=(BOS,),
    system=_ALPACA,
    user_prefix=("\n\n### Instruction:\n",),
    user_suffix=("\n\n",),
    assistant_prefix=("### Response:",),
    end=(EOS,),
    stop=(EOS,),
    pictures_first=True,
    input_system=_ALPACA_INPUT,
    input_prefix="\n\n### Input:\n",
)
_SHORT = _ALPACA.replace("the request.", "the request using a single word or phrase.")

_CHATML = Template(
    name="chatml",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    system_prefix=(_START, "system\n"),
    system_suffix=(_END, "\n"),
    user_prefix=(_START, "user\n"),
    user_suffix=(_END, "\n"),
    assistant_prefix=(_START, "assistant\n"),
    end=(_END,),
    after=("\n",),
    stop=(_END,),
    strip=False,
)

_PLAIN = Template(name="plain", begin=(BOS,), end=(EOS,), stop=(EOS,), pictures_first=True)

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        _SPHINX,
        replace(_SPHINX, name="multimodal", system=_LLAVA),
        _VICUNA,
        replace(_VICUNA, name="llava_v1", system=_LLAVA),
        replace(_VICUNA, name="bair_v1", system="BEGINNING OF CONVERSATION:", assistant_prefix=(" GPT:",)),
        _STANFORD,
        replace(_STANFORD, name="alpaca_clip", pictures_before_begin=True),
        replace(_STANFORD, name="alpaca_short", system=_SHORT, input_system=None, input_prefix=None),
        Template(
            name="question",
            begin=(BOS,),
            user_prefix=("Generate a question whose answer is:\n",),
            user_suffix=("\n\nQuestion:\n",),
            end=(EOS,),
            stop=(EOS,),
            pictures_first=True,
        ),
        Template(
            name="llama2",
            system_prefix=("<<SYS>>\n",),
            system_suffix=("\n<</SYS>>\n\n",),
            system_inside=True,
            user_prefix=(BOS, "[INST] "),
            user_suffix=(" [/INST]",),
            lead=" ",
            end=(" ", EOS),
            stop=(EOS,),
        ),
        _CHATML,
        replace(_CHATML, name="chatml_plain", system=None),
        _PLAIN,
        replace(_PLAIN, name="plain_clip", pictures_before_begin=True),
    )
}
"""Templates by name; the shapes of ``sphinx`` are those of the published SPHINX weights. ``*_clip`` are for those
LLaMA2-Accessory models that read CLIP alone: their pictures precede the first token."""


def get(name: str) -> Template:
    """The template called ``name``; ValueError lists those that exist."""
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}; there are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(template: Template, turns: Sequence[Turn], *, generate: bool = False) -> list[Segment]:
    """Segments of a dialogue, neighbouring texts joined; ``generate`` ends with the assistant's prompt.

    Only the assistant's words and the mark that ends them are learned. A user turn of two neighbouring texts is an
    instruction and its input (Alpaca); other templates join them. ValueError for misplaced system or last turns.
    """
    system, dialogue = _split_system(template, turns)
    if not dialogue or (generate and dialogue[-1].role != "user"):
        raise ValueError("a dialogue needs at least one turn, and its last must be the user's to be answered")
    out = [Segment(p) for p in template.begin]
    if template.pictures_first:
        pictures = [Segment(p) for p in dialogue[0].pictures]
        out = pictures + out if template.pictures_before_begin else out + pictures
    system_block = [] if system is None else [*template.system_prefix, system, *template.system_suffix]
    inside = template.system_inside and dialogue[0].role == "user"
    if not inside:
        out += [Segment(p) for p in system_block]
    for i, turn in enumerate(dialogue):
        hoisted = template.pictures_first and i == 0
        if turn.role == "user":
            head = system_block if inside and i == 0 else []
            out += [Segment(p) for p in (*template.user_prefix, *head)]
            out += [Segment(p) for p in _user_parts(template, turn, hoisted)]
            out += [Segment(p) for p in template.user_suffix]
        else:
            out += _assistant(template, turn, hoisted)
    out += [Segment(p) for p in (template.assistant_prefix if generate else template.close)]
    return list(_joined(out))


def _split_system(template: Template, turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    dialogue = list(turns)
    system = template.system
    if dialogue and dialogue[0].role == "user" and template.input_system is not None and _has_input(dialogue[0]):
        system = template.input_system
    if dialogue and dialogue[0].role == "system":
        if dialogue[0].pictures:
            raise ValueError("a system turn cannot hold pictures")
        system = dialogue.pop(0).text
    if any(t.role == "system" for t in dialogue):
        raise ValueError("a system turn must be the first of a dialogue and the only one")
    return system, dialogue


def _has_input(turn: Turn) -> bool:
    texts = [isinstance(p, str) for p in turn.parts]
    return any(a and b for a, b in itertools.pairwise(texts))


def _user_parts(template: Template, turn: Turn, hoisted: bool) -> Iterator[str | Picture]:
    parts = [p for p in turn.parts if not (hoisted and isinstance(p, Picture))]
    if template.input_prefix is not None and _has_input(turn):
        instruction, given = [p for p in parts if isinstance(p, str)][:2]
        parts = [instruction.strip(), template.input_prefix, given.strip()]
    yield from _stripped(parts) if template.strip else parts


def _stripped(parts: Sequence[str | Picture]) -> list[str | Picture]:
    """Parts without blanks at both ends of the text, pictures at the ends passed over."""
    out = list(parts)
    for order, cut in ((range(len(out)), str.lstrip), (range(len(out) - 1, -1, -1), str.rstrip)):
        for i in order:
            part = out[i]
            if isinstance(part, str):
                out[i] = cut(part)
                if out[i]:
                    break
    return out


def _assistant(template: Template, turn: Turn, hoisted: bool) -> Iterator[Segment]:
    yield from (Segment(p) for p in template.assistant_prefix)
    if template.lead:
        yield Segment(template.lead, learn=True)
    parts: Sequence[str | Picture] = [p for p in turn.parts if not (hoisted and isinstance(p, Picture))]
    for part in _stripped(parts) if template.strip else parts:
        yield Segment(part, learn=True)
    yield from (Segment(p, learn=True) for p in template.end)
    yield from (Segment(p) for p in template.after)


def _joined(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbouring texts that are both learned or both not are one text, as the tokenizer should see them."""
    text, learn = "", False
    for s in segments:
        if isinstance(s.content, str) and (s.learn == learn or not text):
            text, learn = text + s.content, s.learn
            continue
        if text:
            yield Segment(text, learn)
        text = ""
        if isinstance(s.content, str):
            text, learn = s.content, s.learn
        else:
            yield s
    if text:
        yield Segment(text, learn)
