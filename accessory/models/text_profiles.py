"""What makes a text embedding, as a value: two embeddings may be mixed only where their profiles have one digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from accessory import config as configuration
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES, find_size

SLOT = "{}"


@dataclass(frozen=True)
class Padding:
    """How rows of unequal length become one tensor.

    Attributes:
        side: where the padding stands.
        multiple: the length of a batch is rounded up to a multiple of this.
        id: which token stands there; None takes the vocabulary's own. Real positions never see it.
    """

    side: Literal["right", "left"] = "right"
    multiple: int = 1
    id: int | None = None

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"padding.multiple must be at least 1, got {self.multiple}")


@dataclass(frozen=True)
class TextProfile:
    """All that decides which numbers a text becomes, given the weights.

    Attributes:
        name: what users call it.
        size: the row of ``backbone.sizes.SIZES`` whose shapes the model must have; None takes any.
        source: where the weights come from by default: ``asset:NAME``, or None when the user names a folder.
        revision: which release of the weights, where that must be told apart.
        taps: blocks whose outputs are read (negative from the end); several are concatenated along the width.
        normed: whether the model's last norm is applied to what is read.
        template: the text goes where ``{}`` stands. It is plain text: control tokens cannot be written in it.
        bos: begin with the vocabulary's BOS. eos: end with its EOS.
        max_length: most tokens of a text, BOS and EOS included.
        padding: see :class:`Padding`.
        dtype: what the model computes in.

    Raises:
        ValueError: for a profile that would make rows without a token, or has no place for the text.
    """

    name: str
    size: str | None = None
    source: str | None = None
    revision: str | None = None
    taps: tuple[int, ...] = (-1,)
    normed: bool = True
    template: str = SLOT
    bos: bool = True
    eos: bool = False
    max_length: int = 256
    padding: Padding = field(default_factory=Padding)
    dtype: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        if not self.taps:
            raise ValueError(f"profile {self.name}: taps is empty, so there is nothing to read")
        if self.template.count(SLOT) != 1:
            raise ValueError(
                f"profile {self.name}: the template {self.template!r} must hold {SLOT} once, where the text goes"
            )
        if not (self.bos or self.eos):
            raise ValueError(f"profile {self.name}: with neither BOS nor EOS an empty text would have no token")
        if self.max_length <= self.specials:
            raise ValueError(
                f"profile {self.name}: max_length {self.max_length} has no room beside {self.specials} special tokens"
            )
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"profile {self.name}: size {self.size!r} is unknown; known are {', '.join(SIZES)}")

    @property
    def specials(self) -> int:
        """Tokens of every text that do not come from it."""
        return int(self.bos) + int(self.eos)

    def canonical(self) -> str:
        """The profile as JSON that is the same for equal profiles."""
        return json.dumps(configuration.plain(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this profile on disk and over the wire."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def check(self, config: LlamaConfig) -> None:
        """Whether a backbone can serve this profile.

        Raises:
            ValueError: for other shapes than ``size``, a context shorter than ``max_length``, or blocks it lacks.
        """
        if self.size is not None and find_size(config, {self.size: SIZES[self.size]}) is None:
            found = find_size(config) or f"width {config.dim}, {config.n_layers} blocks, {config.vocab_size} tokens"
            raise ValueError(f"profile {self.name} is of {self.size}, this backbone is {found}")
        if self.max_length > config.max_length:
            raise ValueError(
                f"profile {self.name}: max_length {self.max_length} exceeds the context of {config.max_length} tokens"
            )
        for tap in self.taps:
            if not -config.n_layers <= tap < config.n_layers:
                raise ValueError(f"profile {self.name}: tap {tap} is outside a model of {config.n_layers} blocks")


PROFILES: dict[str, TextProfile] = {
    profile.name: profile
    for profile in (
        # The default: small enough for a laptop. Last states are read normed, because the raw ones of this family
        # carry a few values a thousand times larger than the rest.
        TextProfile("smollm2", size="smollm2-135m", source="asset:smollm2", padding=Padding(multiple=8)),
        # Lumina-T2I (Flag-DiT 5B): the decoder's output after its last norm, BOS and EOS, padded with id 0.
        TextProfile("lumina-t2i", size="llama2-7b", eos=True, max_length=128, padding=Padding(id=0)),
        # Lumina-Next: the last but one entry of hidden_states, which no norm has touched; the tokenizer adds no EOS.
        TextProfile("lumina-next", size="gemma-2b", taps=(-2,), normed=False, padding=Padding(multiple=8)),
        # SPHINX-13B's language model as a long-context encoder, width 5120. Which states its users read was never
        # published; the last normed ones over the whole context are our choice.
        TextProfile("sphinx-13b", size="llama2-13b", max_length=4096),
    )
}
DEFAULT = "smollm2"


def get(name: str = DEFAULT, **changes: Any) -> TextProfile:
    """A named profile, with fields replaced where the user wants them otherwise (which changes its digest).

    Raises:
        ValueError: for an unknown name or value.
    """
    if name not in PROFILES:
        raise ValueError(f"no text profile {name!r}; known are {', '.join(PROFILES)}")
    return replace(PROFILES[name], **changes)
