"""What turns a prompt into a condition: a text encoder, the dream bridge or a class number, behind one call.

Each has ``condition(prompts)`` of B pictures, ``null(n)`` of the same layout, and ``lost(prompts)``, the tokens that a
prompt has too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from accessory.data.tokenizer import Tokenizer
from accessory.diffusion.condition import Condition
from accessory.models import build, dream_presets, text_encoder, text_profiles
from accessory.models.build import BackboneConfig, Model, ModelConfig
from accessory.models.dream import Dream
from accessory.models.dream_reply import Reply, padded, replies
from accessory.models.generator_config import ConditionerConfig, DreamSource, LabelSource, TextSource
from accessory.models.text_encoder import TextEncoder
from accessory.models.text_profiles import SLOT, TextProfile
from accessory.peft.attach import trainable_state
from accessory.schema import Sample, Turn

Prompt = str | Sequence[Turn]
"""A text, or a dialogue (with pictures) whose answer is the picture."""


class TextConditioner(nn.Module):
    """Prompts as the states of a language model that reads nothing but them."""

    def __init__(self, encoder: TextEncoder, *, pooled: bool = False) -> None:
        super().__init__()
        self.encoder, self.pooled = encoder, pooled

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Conditions of B prompts; a long one loses its end (:meth:`lost` says how much).

        Raises:
            ValueError: for dialogues of several turns, and for pictures.
        """
        return self.encoder.encode([_text(p) for p in prompts], pooled=self.pooled).condition

    def null(self, n: int) -> Condition:
        """The empty prompt, n times."""
        return self.encoder.encode([""], pooled=self.pooled).condition[[0] * n]

    def lost(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens of each prompt do not fit."""
        return [max(0, self.encoder.count(_text(p)) - self.encoder.profile.max_length) for p in prompts]


class DreamConditioner(nn.Module):
    """Prompts and dialogues through the dream bridge; ``model`` is what it stands on, its net included. ``reply``: see
    :class:`accessory.models.generator_config.DreamSource`."""

    def __init__(self, dream: Dream, model: Model, profile: TextProfile, reply: int = 0) -> None:
        super().__init__()
        self.dream, self.model, self.profile, self.reply = dream, model, profile, reply

    def context(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Ids (T) that a picture is dreamt from, and their tiles (N, 3, S, S).

        A text is written as the profile says; a dialogue as the model's template does, up to where it answers.

        Raises:
            ValueError: for a dialogue that is too long, or does not end with the user's turn.
        """
        if isinstance(prompt, str):
            return torch.tensor(profile_ids(self.model.tokenizer, self.profile, prompt)[0]), torch.empty(0)
        row = self.model.encoder.encode(Sample(tuple(prompt)), generate=True)
        return row.ids, row.tiles

    def condition(self, prompts: Sequence[Prompt], noise: Sequence[torch.Generator] | None = None) -> Condition:
        """Conditions of B prompts; a long text loses its end (:meth:`lost` says how much), and a dialogue is gone on
        with by what the model says before it draws, if it may say anything (``reply``). ``noise``: one generator a
        picture for queries that are drawn (``dream.query``); None: always the same."""
        drawn = None if noise is None else self.dream.noise.draw(noise)
        rows, tiles = self._contexts(prompts)
        asked = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)] if self.reply else []
        if asked:
            for i, said in zip(asked, self.replies([prompts[i] for i in asked], self.reply), strict=True):
                rows[i] = torch.cat((rows[i], torch.tensor(said.ids, dtype=rows[i].dtype)))
        ids, mask = padded(rows, self.model.tokenizer.pad_id, self.dream.queries.device)
        return self.dream.condition(ids, tiles, mask=mask, noise=drawn)

    def replies(self, prompts: Sequence[Prompt], limit: int) -> list[Reply]:
        """What the model says first to each of B prompts, in at most ``limit`` tokens, and whether it wants to draw."""
        rows, tiles = self._contexts(prompts)
        words, template = self.model.tokenizer, self.model.template
        stops = {words.special(name) for name in template.stop_controls}
        return replies(self.dream, rows, tiles, limit, stops, words.pad_id)

    def _contexts(self, prompts: Sequence[Prompt]) -> tuple[list[Tensor], Tensor | None]:
        """Ids (T_i) of every prompt, and the tiles (N, 3, S, S) of all."""
        found = [self.context(p) for p in prompts]
        pictures = [tiles for _, tiles in found if len(tiles)]
        tiles = torch.cat(pictures).to(self.dream.queries.device) if pictures else None
        return [ids for ids, _ in found], tiles

    def null(self, n: int) -> Condition:
        """The bridge's null condition, n times."""
        return self.dream.null()[[0] * n]

    def lost(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens of each text do not fit; dialogues are never cut."""
        words = self.model.tokenizer
        return [profile_ids(words, self.profile, p)[1] if isinstance(p, str) else 0 for p in prompts]


class LabelConditioner(nn.Module):
    """Prompts that are the number of a class."""

    null_label: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("null_label", torch.tensor(num_classes), persistent=False)

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Conditions of B class numbers; ValueError for anything else."""
        labels = []
        for prompt in prompts:
            text = _text(prompt).strip()
            if not text.isdecimal() or int(text) >= self.num_classes:
                raise ValueError(f"this generator knows classes 0 to {self.num_classes - 1} by number, not {text!r}")
            labels.append(int(text))
        return Condition(labels=torch.tensor(labels, device=self.null_label.device))

    def null(self, n: int) -> Condition:
        """The null class, n times."""
        return Condition(labels=self.null_label.expand(n))

    def lost(self, prompts: Sequence[Prompt]) -> list[int]:
        """Nothing is ever lost."""
        return [0 for _ in prompts]


Conditioner = TextConditioner | DreamConditioner | LabelConditioner


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) != 1 or prompt[0].pictures:
        raise ValueError("this generator reads texts; a dialogue or a picture needs a dream bridge as conditioner")
    return prompt[0].text


def profile_ids(words: Tokenizer, profile: TextProfile, text: str) -> tuple[list[int], int]:
    """Ids of a text as a text encoder of ``profile`` reads it, and how many tokens of it were cut."""
    ids = words.encode(profile.template.replace(SLOT, text))
    room = profile.max_length - profile.specials
    head = [words.special("bos")] if profile.bos else []
    tail = [words.special("eos")] if profile.eos else []
    return [*head, *ids[:room], *tail], max(0, len(ids) - room)


def build_conditioner(
    config: ConditionerConfig, cache: Path | None
) -> tuple[Conditioner, ConditionerConfig, frozenset[str]]:
    """A conditioner, its configuration with everything resolved (digests of bases, presets as values), and the names
    of its tensors that nothing but a saved generator can bring back."""
    if isinstance(config, LabelSource):
        return LabelConditioner(config.num_classes), config, frozenset()
    profile = text_profiles.get(config.profile) if isinstance(config.profile, str) else config.profile
    if isinstance(config, TextSource):
        source = config.source or profile.source
        if source is None:
            raise ValueError(f"profile {profile.name} has no weights of its own: name conditioner.source")
        model, own = _model(source, profile.dtype, cache)
        encoder = TextConditioner(text_encoder.of_model(model, profile), pooled=config.pooled)
        names = {f"encoder.{name}" for name in own if name.startswith("backbone.")}
        return encoder, replace(config, profile=profile, source=model.config), frozenset(names)
    model, own = _model(config.model, "bf16", cache)
    bridge = dream_presets.preset(config.dream) if isinstance(config.dream, str) else config.dream
    if not bridge.null_ids:
        bridge = replace(bridge, null_ids=tuple(profile_ids(model.tokenizer, profile, "")[0]))
    dream = Dream(model.net, bridge)
    names = {f"dream.net.{name}" for name in own}
    names |= {f"dream.{name}" for name in dream.state_dict() if not name.startswith("net.")}
    resolved: DreamSource = replace(config, model=model.config, dream=bridge, profile=profile)
    return DreamConditioner(dream, model, profile, config.reply), resolved, frozenset(names)


def _model(source: str | ModelConfig, dtype: str, cache: Path | None) -> tuple[Model, set[str]]:
    """A frozen model, and its tensors that a rebuild from its configuration would draw anew."""
    config = source if isinstance(source, ModelConfig) else _named(source, dtype)
    # What the model's own tuning adds is random until it is loaded; without tuning ``train`` would thaw everything.
    model = build.build(config, cache=cache, train=bool(config.tuning))
    own = set(trainable_state(model.net)) if config.tuning else set()
    if config.base is None:
        parts = {
            "backbone.": config.backbone.source is None,
            "tower.": config.tower is not None and config.tower.weights is None,
            "projector.": True,
            "resampler.": True,
        }
        own |= {name for name in model.net.state_dict() if any(on and name.startswith(p) for p, on in parts.items())}
    model.net.requires_grad_(False).eval()
    return model, own


def _named(source: str, dtype: str) -> ModelConfig:
    """The configuration of a model folder, or of a bare language model."""
    if not source.startswith(build.ASSET):
        path = build.find(source)
        path = path if path.is_file() else build.base_folder(source)
        if (path / build.CONFIG_FILE).is_file():
            return ModelConfig(base=source)
    backbone = BackboneConfig(source=source, dtype="fp32" if dtype == "fp32" else "bf16")
    return ModelConfig(backbone=backbone, tower=None, projector=None)
