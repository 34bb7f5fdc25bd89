"""Hugging Face's layout of the family: key map, rotary row order, reading and export."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.backbone import families, store
from accessory.backbone.keys import check_keys, expected_shapes
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.sizes import from_hf_config, model_type, to_hf_config

TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    **families.META_INNER,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    _, layer, inner = stem.split(".", 2)
    if inner.startswith(("feed_forward.experts.", "feed_forward.gate")):
        return f"model.layers.{layer}.block_sparse_moe.{inner.removeprefix('feed_forward.')}.{suffix}"
    return f"model.layers.{layer}.{INNER[inner]}.{suffix}"


def interleave(x: Tensor, head_dim: int) -> Tensor:
    """Reorder rows (heads * A, ...) from halves (i, i + A/2) to neighbouring pairs (2i, 2i + 1) in every head."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(x.shape)


def halve(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of :func:`interleave`."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


def _rotary(name: str) -> bool:
    return ".wq." in name or ".wk." in name


def from_hf(config: LlamaConfig, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our names and row order from Hugging Face's; tensors other than q and k are passed on as they are.

    Raises:
        ValueError: listing keys that are missing, unexpected or mis-shaped, under the names of Hugging Face's LLaMA.
    """
    # old exports carry the rotary table; it is computed
    found = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    found = families.plain_names(config, found)
    if config.tie_embeddings and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        if "model.embed_tokens.weight" in found and not torch.equal(head, found["model.embed_tokens.weight"]):
            raise ValueError(f"{where}: tie_word_embeddings is true, but lm_head.weight differs from the embeddings")
    shapes = expected_shapes(config)
    check_keys({hf_name(k): v for k, v in shapes.items()}, found, where)
    ours = {k: found[hf_name(k)] for k in shapes}
    return {k: reordered(config, k, v) for k, v in ours.items()}


def reordered(config: LlamaConfig, name: str, tensor: Tensor) -> Tensor:
    """A tensor of Hugging Face's under our ``name``, in our row order."""
    return interleave(tensor, config.head_width) if _rotary(name) else tensor


def to_hf(config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_hf`."""
    plain = {hf_name(k): halve(v, config.head_width) if _rotary(k) else v for k, v in tensors.items()}
    return families.falcon_names(config, plain) if model_type(config) == "falcon" else plain


def load_pickle(path: Path, *, allowed: bool) -> dict[str, Any]:
    """The dictionary in a torch pickle, read with ``weights_only=True``: tensors and plain containers, no code.

    Raises:
        ValueError: when pickles are not allowed here, the file holds anything else, or is torn.
    """
    if not allowed:
        raise ValueError(f"{path} is a pickle; convert it first: python -m accessory convert {path.parent} NEW_FOLDER")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors ({str(error).splitlines()[0]})") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint (truncated?): {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(value).__name__}")
    return value


def read_hf(folder: Path, *, pickles: bool = False) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Config and weights (our names and row order) of a Hugging Face folder: safetensors, single or sharded.

    ``pickles``: also ``pytorch_model*.bin``, where no safetensors are.

    Raises:
        ValueError: for an unsupported config, torn or missing files, and keys that do not fit.
    """
    folder = Path(folder)
    config = from_hf_config(store.read_json(folder / "config.json"))
    if any(folder.glob("model*.safetensors*")):
        tensors = store.read_tensors(folder)
    else:
        tensors = {}
        for path in sorted(folder.glob("pytorch_model*.bin")):
            tensors |= load_pickle(path, allowed=pickles)
    return config, from_hf(config, tensors, str(folder))


def save_hf(
    model: Llama, folder: Path, tokenizer_dir: Path | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Export ``model`` so that ``transformers.AutoModelForCausalLM.from_pretrained(folder)`` computes the same logits.

    Writes config, generation config, safetensors (with an index when sharded) and copies the tokenizer's files.

    Raises:
        ValueError: when a slot is filled (LoRA, prefix, scale, added bias: merge first), no Hugging Face family has
            this config, ``tokenizer_dir`` holds no tokenizer, or ``folder`` is not empty.
    """
    state = model.state_dict()
    shapes = expected_shapes(model.config)
    filled = [k for k in state if k not in shapes]
    # slots without parameters of their own
    filled += [
        f"{name}.{slot}"
        for name, module in model.named_modules()
        for slot in ("delta", "scale", "prefix")
        if getattr(module, slot, None) is not None and not any(k.startswith(f"{name}.{slot}") for k in state)
    ]
    if filled:
        raise ValueError(
            f"{len(filled)} slot(s) are filled and would be lost: {', '.join(filled[:20])}; merge them into the "
            "weights or detach them first"
        )
    check_keys(shapes, state, "the model to export")
    write_hf(model.config, state, folder, tokenizer_dir, max_shard_bytes)


def write_hf(
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    folder: Path,
    tokenizer_dir: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As :func:`save_hf`, from tensors under our names."""
    dtype = str(tensors["tok_embeddings.weight"].dtype).removeprefix("torch.")
    tokens = token_ids(tokenizer_dir) if tokenizer_dir is not None else dict.fromkeys(SPECIAL)
    written = to_hf_config(config) | tokens | {"torch_dtype": dtype}
    with store.atomic_folder(folder) as private:
        store.write_tensors(private, to_hf(config, tensors), max_shard_bytes)
        store.write_json(private / "config.json", written)
        store.write_json(private / "generation_config.json", tokens)
        for file in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if tokenizer_dir is not None and (tokenizer_dir / file).is_file():
                shutil.copyfile(tokenizer_dir / file, private / file)


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds a tokenizer (Hugging Face's or a sentencepiece model)."""
    return any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def token_ids(tokenizer_dir: Path) -> dict[str, int | None]:
    """Ids of the bos, eos and pad tokens that ``tokenizer_config.json`` names; None where it names none.

    Raises:
        ValueError: when the folder holds no tokenizer.
    """
    tokenizer_dir = Path(tokenizer_dir)
    if not has_tokenizer(tokenizer_dir):
        raise ValueError(f"{tokenizer_dir} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    named: dict[str, Any] = {}
    if (tokenizer_dir / "tokenizer_config.json").is_file():
        named = store.read_json(tokenizer_dir / "tokenizer_config.json")
    ids: dict[str, int] = {}
    if (tokenizer_dir / "tokenizer.json").is_file():
        whole = store.read_json(tokenizer_dir / "tokenizer.json")
        vocab = whole.get("model", {}).get("vocab")
        ids = dict(vocab) if isinstance(vocab, dict) else {}
        ids |= {t["content"]: t["id"] for t in whole.get("added_tokens", ())}

    def find(key: str) -> int | None:
        token = named.get(key.removesuffix("_id"))
        return ids.get(token["content"] if isinstance(token, dict) else token) if token else None

    return {key: find(key) for key in SPECIAL}
