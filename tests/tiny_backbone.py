"""A tiny backbone with weights that matter, and GGUF files of it."""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from accessory.backbone import gguf
from accessory.backbone.llama import Llama, LlamaConfig

TINY = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=40)


def model(config: LlamaConfig = TINY) -> Llama:
    m = Llama(config).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return m


def logits(m: Llama) -> Tensor:
    with torch.no_grad():
        return m.logits(m(m.embed(torch.arange(20)[None])))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_gguf(
    path: Path, m: Llama, kind: str = "F32", extra: dict[str, Tensor] | None = None, arch: str = "llama"
) -> Path:
    """A file as llama.cpp's converter writes it."""
    c, names = m.config, {v: k for k, v in gguf.NAMES.items()}
    writer = GGUFWriter(path, arch)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_width)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    for name, tensor in m.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, inner = stem.split(".", 2)
            stem = f"blk.{layer}.{names[inner]}"
        else:
            stem = names[stem]
        dtype = GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        writer.add_tensor(f"{stem}.weight", quants.quantize(tensor.numpy(), dtype), raw_dtype=dtype)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
