"""The only entry of tuning: fill slots, choose what trains, and save exactly that.

``attach`` -> train -> ``trainable_state`` -> (another process) ``attach`` with the same specs -> ``load_trainable`` ->
optionally ``merge``.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from accessory.nn.attention import Attention
from accessory.nn.block import Block
from accessory.nn.linear import Linear, stated
from accessory.peft import lora
from accessory.peft.prefix import Gate, ZeroInitPrefix
from accessory.peft.tuning import add_bias, add_scale, added_dtype, beside, train_matching, train_norms

# Attribute that tells a bias added here, which detach removes, from a bias of the architecture.
ADDED = "bias_added"
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank deltas on the linears named ``targets``, of the top ``layers`` blocks (None: of all). ``alpha`` None: no
    factor; else alpha / rank."""

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = LINEARS
    dropout: float = 0.0
    layers: int | None = None
    kind: Literal["lora"] = "lora"


@dataclass(frozen=True)
class PrefixSpec:
    """Zero-init prefixes of ``length`` tokens in the top ``layers`` blocks (None: in all).

    What a picture brings is added to the tokens of all of them (LLaMA-Adapter V1 and the released V2), or with
    ``early`` to those of one more prefix, of so many tokens in the first block, while the others see no picture (the
    early fusion of the V2 paper: 20 beside the top 31 of 32 blocks).
    """

    length: int = 10
    layers: int | None = None
    gate: Gate = "tanh"
    new_gate: bool = False
    plain: bool = False  # keys and values come of the weights of wk and wv alone, not of what hangs on those
    init_std: float = 1.0
    early: int | None = None
    kind: Literal["prefix"] = "prefix"


@dataclass(frozen=True)
class BiasSpec:
    """Trainable biases on the linears named ``targets``, zero where there was none."""

    targets: tuple[str, ...] = LINEARS
    kind: Literal["bias"] = "bias"


@dataclass(frozen=True)
class ScaleSpec:
    """Trainable output scales, starting at one, on the linears named ``targets``."""

    targets: tuple[str, ...] = LINEARS
    kind: Literal["scale"] = "scale"


@dataclass(frozen=True)
class NormSpec:
    """All norms of the backbone train."""

    kind: Literal["norm"] = "norm"


@dataclass(frozen=True)
class TrainSpec:
    """Parameters of the whole model whose names match a shell-style pattern train, e.g. ``projector.*``."""

    patterns: tuple[str, ...]
    kind: Literal["train"] = "train"


TuningSpec = LoraSpec | PrefixSpec | BiasSpec | ScaleSpec | NormSpec | TrainSpec


def find_backbone(model: nn.Module) -> nn.Module:
    """The module inside ``model`` (or itself) whose ``layers`` are LLaMA blocks; where there is none, ``model`` itself
    if it has ``layers`` with linears that can be tuned (a denoiser).

    Raises:
        ValueError: when there is none, or more than one.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(blocks := getattr(module, "layers", None), nn.ModuleList)
        and len(blocks)
        and isinstance(blocks[0], Block)
    }
    if not found and isinstance(getattr(model, "layers", None), nn.ModuleList) and any(slotted(model)):
        return model
    if len(found) != 1:
        names = ", ".join(repr(name) for name in found) or "none"
        raise ValueError(f"tuning needs exactly one LLaMA backbone inside {type(model).__name__}, found {names}")
    return cast(nn.Module, next(iter(found.values())))


def slotted(backbone: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Name and module of every linear with slots: ours, or another class (tensor parallel) that carries them."""
    for name, module in backbone.named_modules():
        if "delta" in module._modules and "scale" in module._parameters:
            yield name, cast(Linear, module)  # a parallel linear has the same interface


def attach(model: nn.Module, specs: Sequence[TuningSpec], dtype: torch.dtype | None = None) -> None:
    """Freeze ``model``, add what ``specs`` name to its backbone, and make exactly what they name trainable.

    Adding changes no output. New parameters get ``dtype``, by default that of the layer they hang on. What an earlier
    call attached stays in its slot but is frozen; ``TrainSpec`` thaws it by name.

    Raises:
        ValueError: for a kind that is attached already or named twice, an unknown target, a pattern that matches
            nothing, or a size out of range. Nothing is changed then.
    """
    backbone = find_backbone(model)
    _check(backbone, specs)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    done = attached(model)
    model.requires_grad_(False)
    try:
        for spec in specs:
            _apply(model, backbone, spec, dtype)
            _remember(backbone, (*attached(model), spec))
    except ValueError:
        detach(model, attached(model)[len(done) :])
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
        raise


def attached(model: nn.Module) -> tuple[TuningSpec, ...]:
    """The specs attached so far, oldest first."""
    return tuple(getattr(find_backbone(model), "attached", ()))


def _remember(backbone: Any, specs: tuple[TuningSpec, ...]) -> None:
    backbone.attached = specs  # plain Python: in no state dict, but copied with the model


def _check(backbone: nn.Module, specs: Sequence[TuningSpec]) -> None:
    kinds = [spec.kind for spec in getattr(backbone, "attached", ()) if not isinstance(spec, TrainSpec | NormSpec)]
    for spec in specs:
        if spec.kind in kinds:
            raise ValueError(f"{spec.kind!r} is already attached; detach it first")
        kinds.append(spec.kind)
        if isinstance(spec, LoraSpec | BiasSpec | ScaleSpec):
            known = sorted({name.rsplit(".")[-1] for name, _ in slotted(backbone)})
            unknown = [t for t in spec.targets if t not in known]
            if unknown or not spec.targets:
                raise ValueError(f"unknown {spec.kind} targets {unknown}; the linears are named {', '.join(known)}")
        if isinstance(spec, LoraSpec):
            lora.LowRank(1, 1, spec.rank, spec.alpha, spec.dropout)  # raises on a bad rank or dropout
            if spec.layers is not None and not 1 <= spec.layers <= len(cast(Any, backbone).layers):
                raise ValueError(f"lora layers must be in [1, {len(cast(Any, backbone).layers)}], got {spec.layers}")
        if isinstance(spec, PrefixSpec):
            ZeroInitPrefix(1, 1, 1, spec.length, spec.gate)
            n = len(_attentions(backbone))
            if spec.layers is not None and not 1 <= spec.layers <= n:
                raise ValueError(f"prefix layers must be in [1, {n}], got {spec.layers}")
            if spec.early is not None and (spec.early < 1 or spec.layers in (None, n)):
                raise ValueError(
                    f"prefix early {spec.early} takes at least 1 token and the first block for itself: layers must be "
                    f"below {n}, got {spec.layers}"
                )


def _attentions(backbone: nn.Module) -> list[Attention]:
    return [m for m in backbone.modules() if isinstance(m, Attention)]


def _apply(model: nn.Module, backbone: nn.Module, spec: TuningSpec, dtype: torch.dtype | None) -> None:
    if isinstance(spec, NormSpec):
        train_norms(backbone)
    elif isinstance(spec, TrainSpec):
        train_matching(model, spec.patterns)
    elif isinstance(spec, PrefixSpec):
        _add_prefixes(backbone, spec, dtype)
    else:
        top = spec.layers if isinstance(spec, LoraSpec) else None
        for _, linear in _targets(backbone, spec.targets, top):
            if isinstance(spec, LoraSpec):
                out_features, in_features = stated(linear).shape  # this rank's share under tensor parallelism
                delta = lora.LowRank(in_features, out_features, spec.rank, spec.alpha, spec.dropout)
                linear.delta = delta.to(beside(linear), added_dtype(linear, dtype)).train(linear.training)
            elif isinstance(spec, ScaleSpec):
                add_scale(linear, dtype)
            elif add_bias(linear, dtype):
                setattr(linear, ADDED, True)


def _targets(backbone: nn.Module, targets: Sequence[str], top: int | None) -> list[tuple[str, Linear]]:
    """Linears by their last name; with ``top`` those of so many blocks, counted from the last one, alone."""
    named = [(name, linear) for name, linear in slotted(backbone) if name.rsplit(".")[-1] in targets]
    if top is None:
        return named
    inside = {id(module) for block in list(cast(Any, backbone).layers)[-top:] for module in block.modules()}
    return [(name, linear) for name, linear in named if id(linear) in inside]


def _add_prefixes(backbone: nn.Module, spec: PrefixSpec, dtype: torch.dtype | None) -> None:
    attentions = _attentions(backbone)
    late = attentions[len(attentions) - (spec.layers or len(attentions)) :]
    first = [] if spec.early is None else [(attentions[0], spec.early, True)]
    for attention, length, sees in (*first, *((a, spec.length, spec.early is None) for a in late)):
        width, dim = stated(attention.wq).shape
        prefix = ZeroInitPrefix(
            width // attention.head_dim, attention.head_dim, dim, length, spec.gate, spec.new_gate, spec.init_std, sees
        )
        prefix.plain = spec.plain
        attention.prefix = prefix.to(beside(attention.wq), added_dtype(attention.wq, dtype))


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that requires a gradient, detached, by its full name; nothing else."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy ``state`` (from :func:`trainable_state`) into a model to which the same specs are attached.

    Raises:
        ValueError: listing every missing, unexpected and mis-shaped name; nothing is copied then.
    """
    own = trainable_state(model)
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model needs {tuple(p.shape)}"
        for name, p in own.items()
        if name in state and state[name].shape != p.shape
    ]
    if problems:
        raise ValueError(f"trainable state does not fit ({len(problems)} problems): " + "; ".join(problems))
    for name, p in own.items():
        p.copy_(state[name])


def detach(model: nn.Module, specs: Sequence[TuningSpec] | None = None) -> None:
    """Remove what was attached (all of it, or the given ``specs``) and leave the model frozen.

    What trained in place (norms, biases that the architecture has, patterns) keeps its values.
    """
    backbone = find_backbone(model)
    remove = attached(model) if specs is None else tuple(specs)
    kinds = {spec.kind for spec in remove}
    for _, linear in slotted(backbone):
        if "lora" in kinds:
            linear.delta = None
        if "scale" in kinds:
            linear.scale = None
        if "bias" in kinds and getattr(linear, ADDED, False):
            linear.register_parameter("bias", None)
            delattr(linear, ADDED)
    if "prefix" in kinds:
        for attention in _attentions(backbone):
            attention.prefix = None
    _remember(backbone, tuple(spec for spec in attached(model) if spec not in remove))
    model.requires_grad_(False)


def _kept(spec: TuningSpec, stay: Collection[str]) -> TuningSpec | None:
    """What is left of a spec when all its linears but those named ``stay`` are folded."""
    if not isinstance(spec, LoraSpec | ScaleSpec):
        return spec
    targets = tuple(t for t in spec.targets if t in stay)
    return replace(spec, targets=targets) if targets else None


def _taken_plain(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the linears of which any block's prefix takes the weights alone; a spec names them in all blocks."""
    plain = any(a.prefix is not None and a.prefix.plain for a in _attentions(backbone))
    return ("wk", "wv") if plain else ()


def foldable(backbone: nn.Module) -> list[tuple[str, Linear]]:
    """Name and module of the linears with LoRA or a scale that :func:`merge` folds."""
    stay = _taken_plain(backbone)
    hung = [(name, linear) for name, linear in slotted(backbone) if not (linear.delta is None and linear.scale is None)]
    return [(name, linear) for name, linear in hung if name.rsplit(".")[-1] not in stay]


def merge(model: nn.Module) -> float:
    """Fold LoRA and scales into the weights of the backbone; returns the largest relative difference of any layer.

    Each layer is compared on a fixed random input before and after. Added biases stay (they are ordinary biases then),
    and so do prefixes: their tokens go through the folded wk and wv, which compute what they did. Where a prefix takes
    those plain, what hangs on the wk and wv of any block stays beside them, attached.

    Raises:
        ValueError: when a layer would compute something else, or is quantised. Nothing is changed then.
    """
    backbone = find_backbone(model)
    full, stay = foldable(backbone), _taken_plain(backbone)
    for name, linear in full:
        lora.refuse_quantized(linear, name)
        error, limit = lora.folding_error(linear), lora.TOLERANCE[linear.weight.dtype]
        if not error <= limit:  # NaN too
            raise ValueError(f"folding {name} would change its outputs by {error:.2g}, the limit is {limit:g}")
    errors = [lora.merge(linear) for _, linear in full]
    specs = [_kept(spec, stay) for spec in attached(model)]
    _remember(backbone, tuple(spec for spec in specs if spec is not None))
    return max(errors, default=0.0)
