"""Weights of LLaMA2-Accessory's text models (`llama`, `llama_adapter`, `llama_peft`) in this project's terms."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from accessory.backbone.llama import LlamaConfig
from accessory.nn.rope import RopeScaling
from accessory.peft.attach import LINEARS, BiasSpec, LoraSpec, NormSpec, PrefixSpec, TuningSpec

# Linears that have a bias under bias_tuning, by model type: the adapter leaves keys and values without.
BIASED = {"llama_adapter": ("wq", "wo", "w1", "w2", "w3"), "llama_peft": LINEARS}
TYPES = ("llama", *BIASED)

_BLOCK = re.compile(
    r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.(weight|bias|(?P<low>lora_[ab])\.weight)"
    r"|layers\.\d+\.(attention_norm|ffn_norm)\.weight"
)
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
_TUNING = {
    "llama": set[str](),
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
    config = read_config(state, args, kind)
    return config, read_specs(args, kind), rename(state, config.n_layers)


def read_config(state: Mapping[str, Tensor], args: Mapping[str, Any], kind: str) -> LlamaConfig:
    """The reference's constructor arguments as a :class:`LlamaConfig`; the vocabulary may be left to the weights."""
    unknown = sorted(set(args) - set(_SIZES) - _TUNING[kind] - _NEUTRAL - {"rope_scaling"})
    if unknown:
        raise ValueError(f"{kind} config has arguments that are not understood: {', '.join(unknown)}")
    fields = {ours: args[theirs] for theirs, ours in _SIZES.items() if args.get(theirs) is not None}
    fields.setdefault("max_length", 2048)
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


def read_specs(args: Mapping[str, Any], kind: str) -> tuple[TuningSpec, ...]:
    """What hangs on the model, with the reference's defaults for what ``args`` leaves out."""
    if kind == "llama":
        return ()
    specs: list[TuningSpec] = []
    if args.get("lora_rank", -1) > 0:
        specs.append(LoraSpec(rank=args["lora_rank"]))
    if args.get("bias_tuning", True):
        specs.append(BiasSpec(targets=BIASED[kind]))
    if args.get("norm_tuning", True):
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
