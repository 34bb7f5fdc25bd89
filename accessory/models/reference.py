"""Whole checkpoints of LLaMA2-Accessory, with what they see with, as the one model of this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accessory.backbone import reference
from accessory.backbone.keys import build_meta
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.models.mllm import MLLM
from accessory.models.published import ENCODERS, LlamaType, find_type, trains
from accessory.peft.attach import BiasSpec, PrefixSpec, TrainSpec, TuningSpec, attach
from accessory.peft.prefix import Gate
from accessory.vision.projector import Projector
from accessory.vision.resampler import Bind, Resampler
from accessory.vision.tower import Tower
from accessory.vision.weights import check_keys, load_encoders

_VISUAL = ("clip_proj.", "clip_proj_norm.", "qformer_proj.", "visual_", "start_img", "end_img", "image_bind_")
_CLIP_ONLY = {"clip_proj.": "visual_proj.0.", "clip_proj_norm.": "visual_proj.1."}
SKIP = "skip"  # the published models know no blank tiles


@dataclass(frozen=True)
class Published:
    """A checkpoint in our terms: sizes, what hangs on the language model, and tensors by part.

    ``backbone``, ``projector`` and ``resampler`` have our names, ``encoders`` their own by prefix. A checkpoint
    without an encoder is one that reads only, whatever its type.
    """

    kind: str
    args: dict[str, Any]
    llama: LlamaConfig
    specs: tuple[TuningSpec, ...]
    backbone: dict[str, Tensor]
    projector: dict[str, Tensor]
    resampler: dict[str, Tensor]
    encoders: dict[str, dict[str, Tensor]]

    @property
    def type(self) -> LlamaType:
        """The row of the table."""
        return find_type(self.kind)

    @property
    def sees(self) -> bool:
        """Whether there is a vision part."""
        return bool(self.projector or self.resampler)


def read_published(state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str) -> Published:
    """A merged checkpoint (keys with or without ``llma.``) by its ``config.json`` and its ``llama_type``.

    Raises:
        ValueError: for another type, an argument or a key that is not understood (all of them listed).
    """
    wrapped = bool(state) and all(k.startswith("llma.") for k in state)
    plain = {k.removeprefix("llma.") if wrapped else k: v for k, v in state.items()}
    encoders, visual, text = split_parts(plain)
    row, full = find_type(kind), _with_defaults(args, kind)
    llama, _, backbone = reference.from_reference(text, full, _text_kind(row))
    specs = text_specs(full, kind)
    to_prefix = row.text == "llama_adapter"
    return Published(
        kind,
        full,
        llama,
        specs,
        backbone,
        {} if to_prefix else projector_names(visual),
        resampler_names(visual) if to_prefix else {},
        encoders,
    )


def text_specs(args: Mapping[str, Any], kind: str) -> tuple[TuningSpec, ...]:
    """What hangs on the language model of a type under its arguments."""
    row = find_type(kind)
    specs = reference.read_specs({**dict(row.defaults), **args}, _text_kind(row))
    if row.adapter is not None:
        gate: Gate = "raw" if row.adapter.raw else "tanh"
        return tuple(replace(s, gate=gate, plain=True) if isinstance(s, PrefixSpec) else s for s in specs)
    if row.text != "llama_ens_peft":
        return specs
    fewer = reference.BIASED["llama_adapter"]  # keys and values have no bias there
    return tuple(replace(s, targets=fewer) if isinstance(s, BiasSpec) else s for s in specs)


def split_parts(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Encoders by prefix (names without it), what joins them to the language model, and the language model."""
    encoders: dict[str, dict[str, Tensor]] = {}
    visual: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix, _, rest = key.partition(".")
        if prefix in ENCODERS:
            encoders.setdefault(prefix, {})[rest] = value
        else:
            (visual if key.startswith(_VISUAL) else text)[key] = value
    return encoders, visual, text


def projector_names(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of a :class:`Projector`; ``skip`` is not among them."""
    out: dict[str, Tensor] = {}
    for key, value in visual.items():
        old = next((p for p in _CLIP_ONLY if key.startswith(p)), "")
        out[_CLIP_ONLY.get(old, "") + key.removeprefix(old)] = value.flatten() if key in _MARKS else value
    return out


_MARKS = ("start_img", "end_img")


def resampler_names(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a :class:`Resampler`."""
    return {"visual_query.weight" if k == "visual_query" else k: v for k, v in visual.items()}


def _with_defaults(args: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Arguments with what the type takes for those that are not said."""
    row = find_type(kind)
    args = {**dict(row.defaults), **args}
    size = SIZES.get(row.size)
    if size is None or "dim" in args:
        return args
    return {"dim": size.dim, "n_layers": size.n_layers, "n_heads": size.n_heads, **args}


def _text_kind(row: LlamaType) -> str:
    return "llama_peft" if row.text == "llama_ens_peft" else row.text


def assemble(published: Published, tower: Tower | None, heads: int = 16) -> MLLM:
    """The network of a checkpoint, filled, with what its type trains trainable and all else frozen.

    ``tower`` is what ``type.tower`` builds or one of the same geometry; encoders that the checkpoint holds are filled
    into it, otherwise it stays as it is (the first stage starts from the encoders' own files). ``heads``: of
    LLaMA-Adapter's visual blocks, which the file does not say.

    Raises:
        ValueError: for keys that are missing, unexpected or of another shape, all of them listed.
    """
    backbone = build_meta(published.llama)
    projector = resampler = None
    if published.sees and tower is None:
        raise ValueError(f"a {published.kind} checkpoint with {', '.join(published.encoders)} needs its tower")
    if tower is not None and published.projector:
        projector = fill_projector(published, tower)
    if tower is not None and published.resampler:
        resampler = fill_resampler(published.resampler, published.llama.dim, heads)
    if tower is not None and published.encoders:
        load_encoders(tower, published.encoders)
    net = MLLM(backbone, tower if published.sees else None, projector, resampler)
    if published.specs:
        attach(net, published.specs)
    check_keys(backbone.state_dict(), published.backbone, f"the language model of a {published.kind}")
    backbone.load_state_dict(published.backbone, strict=True, assign=True)
    patterns = trains(published.kind, published.args, published.sees)
    attach(net, (TrainSpec(patterns),)) if patterns else net.requires_grad_(False)
    return net.eval()


def fill_projector(published: Published, tower: Tower) -> Projector:
    """The projector of a checkpoint; the vector for blank tiles, which it does not have, is zero."""
    dtype = next(iter(published.projector.values())).dtype
    projector = Projector(tower.groups, published.llama.dim, "linear_norm", published.type.start_end).to(dtype)
    state = {SKIP: torch.zeros_like(projector.skip.detach()), **published.projector}
    check_keys(projector.state_dict(), state, f"the projector of a {published.kind}")
    projector.load_state_dict(state, strict=True, assign=True)
    return projector


def fill_resampler(state: Mapping[str, Tensor], dim: int, heads: int = 16) -> Resampler:
    """LLaMA-Adapter's visual prefix or ImageBind-LLM's network, their sizes read off the tensors."""
    resampler: Resampler
    if "image_bind_proj.weight" in state:
        width, depth = state["image_bind_f1_1.weight"].shape[0], sum("_f1_" in k and "weight" in k for k in state)
        legacy = "image_bind_norm_1.bias" in state
        resampler = Bind(state["image_bind_proj.weight"].shape[1], dim, width=width, depth=depth, legacy=legacy)
    else:
        width, features = state["clip_proj.weight"].shape
        resampler = Resampler(
            features,
            dim,
            state["visual_query.weight"].shape[0],
            width=width,
            depth=len({k.split(".")[1] for k in state if k.startswith("visual_blocks.")}),
            heads=heads,
            mlp_ratio=state["visual_blocks.0.mlp.fc1.weight"].shape[0] / width,
        )
    check_keys(resampler.state_dict(), state, "the resampler")
    resampler.load_state_dict(dict(state), strict=True, assign=True)
    return resampler
