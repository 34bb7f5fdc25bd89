"""Weights of LLaMA2-Accessory's text models in this project's terms: LLaMA, its adapters, and Mixtral in both layouts
(InternLM and Falcon are in :mod:`accessory.backbone.reference_families`)."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.backbone import reference_families as families
from accessory.backbone.llama import LlamaConfig
from accessory.nn.moe import MoEConfig
from accessory.nn.rope import RopeScaling
from accessory.peft.attach import LINEARS, BiasSpec, LoraSpec, NormSpec, PrefixSpec, TuningSpec

# Linears that have a bias under bias_tuning, by model type: the adapter leaves keys and values without.
BIASED = {"llama_adapter": ("wq", "wo", "w1", "w2", "w3"), "llama_peft": LINEARS, "mixtral_peft": LINEARS}
MIXTRAL = ("mixtral", "mixtral_peft", "mixtral_sparse")
TYPES = ("llama", *BIASED, "mixtral", "mixtral_sparse", *families.TYPES)

_BLOCK = re.compile(
    r"layers\.\d+\.(attention\.w[qkvo]|feed_forward(\.experts\.\d+)?\.w[123])"
    r"\.(weight|bias|(?P<low>lora_[ab])\.weight)"
    r"|layers\.\d+\.(attention_norm|ffn_norm|feed_forward\.gate)\.weight"
)
_STACKED = re.compile(r"(?P<layer>.*layers\.\d+\.feed_forward)\.(?P<name>w[123])")
_EXPERT = re.compile(r"(?P<layer>.*layers\.\d+\.feed_forward)\.experts\.(?P<number>\d+)\.(?P<name>w[123])\.weight")
_TOP = ("tok_embeddings.weight", "norm.weight", "output.weight")
_PREFIX = {"prefix": "tokens", "prefix_gate": "gate", "prefix_new_gate": "new_gate"}

# Constructor arguments that say nothing about a text model's function.
_NEUTRAL = {"max_batch_size", "load_pretrained_visual_encoder", "trainable_mode"}
_SIZES = {
    "dim": "dim",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_length",
}
_MIXTRAL_SIZES = {t: o for t, o in _SIZES.items() if t not in ("multiple_of", "ffn_dim_multiplier")}
# head_dim is a field of the reference that nothing reads.
_MIXTRAL_OWN = {"hidden_dim", "head_dim", "moe", "load_balancing_weight"}
_TUNING = {
    "llama": set[str](),
    "mixtral": set[str](),
    "mixtral_sparse": set[str](),
    "mixtral_peft": {"lora_rank", "bias_tuning", "norm_tuning"},
    "llama_peft": {"lora_rank", "bias_tuning", "norm_tuning"},
    "llama_adapter": {
        "lora_rank",
        "bias_tuning",
        "norm_tuning",
        "prefix_len",
        "prefix_layers",
        "use_prefix_new_gate",
    },
}


def from_reference(
    state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str
) -> tuple[LlamaConfig, tuple[TuningSpec, ...], dict[str, Tensor]]:
    """Config, tuning specs and renamed weights of a reference checkpoint.

    Build ``Llama(config)``, ``attach`` the specs, then load the weights strictly. Keys may carry the wrapper's
    ``llma.``, all of them or none. ``args`` is the checkpoint's ``config.json``, ``kind`` its ``llama_type``.

    Raises:
        ValueError: for another kind, an argument or a key that is not understood (all of them listed).
    """
    if kind not in TYPES:
        raise ValueError(f"llama_type {kind!r} is not one of {', '.join(TYPES)}")
    if kind in families.TYPES:
        return families.read(state, args, kind)
    config = read_config(state, args, kind)
    if kind == "mixtral_sparse":
        state = sparse_to_dense(state)
    return config, read_specs(args, kind), rename(state, config.n_layers)


def read_config(state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str) -> LlamaConfig:
    """The reference's constructor arguments as a :class:`LlamaConfig`; the vocabulary may be left to the weights."""
    sizes, own = (_MIXTRAL_SIZES, _MIXTRAL_OWN) if kind in MIXTRAL else (_SIZES, set[str]())
    unknown = sorted(set(args) - set(sizes) - own - _TUNING[kind] - _NEUTRAL - {"rope_scaling"})
    if unknown:
        raise ValueError(f"{kind} config has arguments that are not understood: {', '.join(unknown)}")
    fields = {ours: args[theirs] for theirs, ours in sizes.items() if args.get(theirs) is not None}
    fields.setdefault("max_length", 2048)
    if kind in MIXTRAL:
        fields |= {"ffn_dim": args.get("hidden_dim", 16384), "moe": _experts(args, kind)}
        fields.setdefault("rope_theta", 1e6)
    if fields.get("vocab_size", -1) < 0:
        table = state.get("tok_embeddings.weight", state.get("llma.tok_embeddings.weight"))
        if table is None:
            raise ValueError("the config states no vocab_size and the weights have no tok_embeddings.weight")
        fields["vocab_size"] = table.shape[0]
    scaling = args.get("rope_scaling")
    if scaling is not None:
        # The reference multiplies the position, we divide the frequency.
        fields["rope_scaling"] = RopeScaling("linear", 1.0 / scaling)
    return LlamaConfig(**fields)


def _experts(args: Mapping[str, Any], kind: str) -> MoEConfig:
    """The reference's experts; its dense files apply the weight of the balancing loss twice, its sparse ones once."""
    stated = dict(args.get("moe") or {})
    experts, top = stated.pop("num_experts", 8), stated.pop("num_experts_per_tok", 2)
    if stated:
        raise ValueError(f"{kind} config: moe has arguments that are not understood: {', '.join(sorted(stated))}")
    weight = float(args.get("load_balancing_weight", 0.1))
    return MoEConfig(experts, top, balance=weight if kind == "mixtral_sparse" else weight**2)


def read_specs(args: Mapping[str, Any], kind: str) -> tuple[TuningSpec, ...]:
    """What hangs on the model, with the reference's defaults for what ``args`` leaves out."""
    if kind not in BIASED:
        return ()
    specs: list[TuningSpec] = []
    if args.get("lora_rank", -1) > 0:
        specs.append(LoraSpec(rank=args["lora_rank"]))
    if args.get("bias_tuning", True):
        specs.append(BiasSpec(targets=BIASED[kind]))
    if args.get("norm_tuning", kind != "mixtral_peft"):
        specs.append(NormSpec())
    if kind == "llama_adapter":
        layers, new_gate = args.get("prefix_layers"), args.get("use_prefix_new_gate", False)
        specs.append(PrefixSpec(length=args.get("prefix_len", 10), layers=layers, new_gate=new_gate))
    return tuple(specs)


def rename(state: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Reference names to ours; the stacked prefixes (layers, 1, P, D) and gates go to the last blocks.

    Raises:
        ValueError: listing every key that has no place.
    """
    out: dict[str, Tensor] = {}
    unmapped = []
    for full, tensor in state.items():
        key = full.removeprefix("llma.") if all(k.startswith("llma.") for k in state) else full
        block = _BLOCK.fullmatch(key)
        if key in _PREFIX:
            out |= _spread(key, tensor, n_layers)
        elif block and block["low"]:
            out[key.replace(block["low"], f"delta.{block['low'][-1]}")] = tensor
        elif block or key in _TOP:
            out[key] = tensor
        else:
            unmapped.append(full)
    if unmapped:
        raise ValueError(f"{len(unmapped)} keys have no place in a text model: {', '.join(sorted(unmapped))}")
    return out


def _spread(key: str, tensor: Tensor, n_layers: int) -> dict[str, Tensor]:
    """One entry per adapted block; index 0 belongs to the lowest of them."""
    first = n_layers - tensor.shape[0]
    if first < 0 or (key == "prefix" and tensor.shape[1] != 1):
        raise ValueError(f"{key} has shape {tuple(tensor.shape)}, which does not fit {n_layers} layers")
    parts = {"prefix": lambda t: t[0], "prefix_gate": lambda t: t, "prefix_new_gate": lambda t: t[None]}
    return {
        f"layers.{first + i}.attention.prefix.{_PREFIX[key]}": parts[key](tensor[i]) for i in range(tensor.shape[0])
    }


def sparse_to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One matrix an expert from the block-sparse layout of experts; other tensors pass.

    There ``feed_forward.w1``, ``w2`` and ``w3`` are (E * H, D) each, expert after expert, and w2 is transposed.

    Raises:
        ValueError: for a matrix that has no router beside it, or whose rows its experts cannot share.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _STACKED.fullmatch(key)
        if match is None:
            out[key] = tensor
            continue
        gate = state.get(f"{match['layer']}.gate.weight")
        if gate is None or tensor.shape[0] % gate.shape[0]:
            raise ValueError(f"{key} {tuple(tensor.shape)} holds all experts, but its router does not say how many")
        for number, part in enumerate(tensor.chunk(gate.shape[0])):
            whole = part.t().contiguous() if match["name"] == "w2" else part
            out[f"{match['layer']}.experts.{number}.{match['name']}.weight"] = whole
    return out


def dense_to_sparse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`sparse_to_dense`.

    Raises:
        ValueError: for experts with anything but weights (fold LoRA first), or with gaps in their numbers.
    """
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        match = _EXPERT.fullmatch(key)
        if match is not None:
            part = tensor.t() if match["name"] == "w2" else tensor
            experts.setdefault(f"{match['layer']}.{match['name']}", {})[int(match["number"])] = part
        elif ".feed_forward.experts." in key:
            raise ValueError(f"{key} has no place in the block-sparse layout, which has weights alone")
        else:
            out[key] = tensor
    for key, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{key} has experts {sorted(parts)}, which leaves gaps")
        out[key] = torch.cat([parts[i] for i in range(len(parts))])
    return out
