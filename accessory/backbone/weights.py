"""Loading a backbone from a folder: strict, built on ``meta``, memory-mapped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from accessory.backbone import gguf, hf, meta, reference_folders, store
from accessory.backbone.keys import build_meta, check_keys, config_from_dict, expected_shapes, write_config
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.quantized import Source, load, open_folder, stored_quantization, unread
from accessory.nn.unread import Cut, held
from accessory.peft.quantize import Quantization

Layout = Literal["accessory", "hf", "meta", "gguf"]


def detect(folder: Path) -> Layout:
    """Which layout the weights of a folder (or a single ``.gguf`` file) have, from file names and ``config.json``.

    Raises:
        ValueError: when the folder matches no layout or two of them.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix == ".gguf":
        return "gguf"
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder nor a .gguf file")
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    path = folder / "config.json"
    ours = path.is_file() and store.read_json(path).get("format") == "accessory"
    shards = [n for n in names if re.fullmatch(r"consolidated\.\d+(-of-\d+\.model(-diff)?)?\.(pth|safetensors)", n)]
    model = [n for n in names if re.fullmatch(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", n)]
    gguf = [n for n in names if n.endswith(".gguf")]
    found = [group[0] for group in (shards, model, gguf) if group]
    if len(found) > 1:
        raise ValueError(f"{folder} holds weights in more than one format: {', '.join(found)}; keep one")
    if not found and {"config.yaml", "trainable.safetensors"} <= set(names):
        raise ValueError(
            f"{folder} is a folder of trained parts (config.yaml, trainable.safetensors) that stands on base weights "
            "named in its config.yaml; it holds no whole language model, and only whole ones are converted"
        )
    if not found:
        raise ValueError(f"{folder} holds no weights (model*.safetensors, consolidated.*, *.gguf)")
    if gguf:
        return "gguf"
    if ours:
        return "accessory"
    return "meta" if shards else "hf"


def read_folder(
    folder: Path, *, layout: Layout | None = None, pickles: bool = False, overlays: Sequence[Path] = ()
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Config and strictly checked weights (our names and row order) of a folder in any layout.

    ``layout`` None detects it. ``pickles``: also read ``.pth``/``.bin`` files, with ``weights_only=True``; only the
    convert command sets it. ``overlays``: folders of LLaMA2-Accessory laid over the first, see
    :func:`accessory.backbone.reference_folders.read_reference`; what was tuned is folded in.

    Raises:
        ValueError: for everything that does not fit.
    """
    folder = Path(folder)
    layout = detect(folder) if layout is None else layout
    if overlays and layout != "meta":
        raise ValueError(f"{folder} has layout {layout}; folders are laid over those of LLaMA2-Accessory (meta) alone")
    if layout == "gguf":
        return gguf.load_gguf(gguf.single_file(folder))
    if layout == "hf":
        return hf.read_hf(folder, pickles=pickles)
    if layout == "meta" and (overlays or reference_folders.llama_type(folder) not in (None, "llama")):
        return reference_folders.fold(reference_folders.read_reference([folder, *overlays], pickles=pickles))
    if layout == "meta":
        return meta.read_meta(folder, pickles=pickles)
    if (stored := stored_quantization(folder)) is not None:
        raise ValueError(f"{folder} holds quantised weights ({stored.kind}); read the ones that they were made of")
    stated = store.read_json(folder / "config.json").get("backbone")
    if not isinstance(stated, dict):
        raise ValueError(f"{folder / 'config.json'} has no object 'backbone'")
    config = config_from_dict(stated)
    sharded = any(folder.glob("consolidated.*"))
    tensors = meta.merge_folder(folder, pickles=pickles) if sharded else store.read_tensors(folder)
    check_keys(expected_shapes(config), tensors, str(folder))
    return config, tensors


def from_tensors(
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """A model that owns the very tensors it is given (cast and moved where asked).

    ``dtype`` None takes that of the embedding table for all: files that mix types would not multiply.
    """
    dtype = tensors["tok_embeddings.weight"].dtype if dtype is None else dtype
    model = build_meta(config)
    state = {k: v.to(device=device, dtype=dtype) for k, v in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_backbone(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
    later: bool = False,
) -> Llama:
    """A backbone from a folder in our layout or Hugging Face's (or a GGUF file, dequantised to bf16), in eval mode.

    Tensors that need no cast, move or reordering stay memory-mapped: nothing is held twice. ``quantization``: linears
    are quantised as they are read, a layer at a time; a folder that is quantised already is read as it is. ``later``:
    where tensors can be read one by one, none is read before the model is spread (:mod:`accessory.nn.unread`).

    Raises:
        ValueError: for an unknown or ambiguous layout, torn files, and missing, unexpected or mis-shaped keys.
    """
    folder = Path(folder)
    if folder.is_dir() and quantization is None:
        quantization = stored_quantization(folder)
    if quantization is None and not later:
        config, tensors = read_folder(folder)
        return from_tensors(config, tensors, dtype=dtype, device=device)
    layout = detect(folder)
    source = open_folder(folder, layout)
    if source is not None and later:
        return unread(source, quantization, dtype)
    if quantization is None:
        return from_tensors(*read_folder(folder, layout=layout), dtype=dtype, device=device)
    if source is None:
        return quantized_from_tensors(*read_folder(folder, layout=layout), quantization, dtype=dtype, device=device)
    return load(source, quantization, dtype, device)


def quantized_from_tensors(
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    quantization: Quantization,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """As :func:`from_tensors`, quantised a layer at a time; ``tensors`` is emptied on the way, which frees them.

    Raises:
        ValueError: when ``quantization`` does not fit the sizes.
    """
    dtype = tensors["tok_embeddings.weight"].dtype if dtype is None else dtype
    return load(Source(config, {k: partial(_taken, tensors, k) for k in tensors}), quantization, dtype, device)


def _taken(tensors: dict[str, Tensor], name: str, cut: Cut | None = None) -> Tensor:
    """A tensor out of ``tensors``, which it leaves."""
    return held(tensors.pop(name))(cut)


def save_accessory(
    config: LlamaConfig, tensors: Mapping[str, Tensor], folder: Path, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write our layout (``config.json`` and safetensors under our names) atomically.

    Raises:
        ValueError: when the folder is not empty or the tensors do not fit ``config``.
    """
    check_keys(expected_shapes(config), tensors, "the model to save")
    with store.atomic_folder(folder) as private:
        store.write_tensors(private, tensors, max_shard_bytes)
        write_config(private, config)
