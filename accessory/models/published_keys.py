"""Names and shapes of every tensor in LLaMA2-Accessory's checkpoints, for the full sizes, without the checkpoints.

The encoders are written out from their published sizes, independently of the modules that read them, so that an
importer can be held against the whole list on ``meta``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accessory.backbone.keys import build_meta
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.reference import dense_to_sparse
from accessory.models.published import find_type
from accessory.peft.attach import TuningSpec, attach

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def _affine(name: str, out: int, *inner: int) -> Shapes:
    """A weight (out, *inner), or a norm's where nothing is inner, and its bias."""
    return {f"{name}.weight": (out, *inner), f"{name}.bias": (out,)}


def _resblock(at: str, width: int) -> Shapes:
    """A block of open_clip's transformers."""
    out = {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
    out |= _affine(f"{at}.ln_1", width) | _affine(f"{at}.ln_2", width) | _affine(f"{at}.attn.out_proj", width, width)
    return out | _affine(f"{at}.mlp.c_fc", 4 * width, width) | _affine(f"{at}.mlp.c_proj", width, 4 * width)


def clip(text: bool) -> Shapes:
    """CLIP ViT-L/14 of open_clip; ``text`` False: as SPHINX keeps it, without the blocks of its text half, of which the
    other tensors stay."""
    out: Shapes = {
        "positional_embedding": (77, 768),
        "text_projection": (768, 768),
        "logit_scale": (),
        "token_embedding.weight": (49408, 768),
        "visual.class_embedding": (1024,),
        "visual.positional_embedding": (257, 1024),
        "visual.proj": (1024, 768),
        "visual.conv1.weight": (1024, 3, 14, 14),
    }
    out |= _affine("ln_final", 768) | _affine("visual.ln_pre", 1024) | _affine("visual.ln_post", 1024)
    for i in range(24):
        out |= _resblock(f"visual.transformer.resblocks.{i}", 1024)
    for i in range(12 if text else 0):
        out |= _resblock(f"transformer.resblocks.{i}", 768)
    return out


def convnext() -> Shapes:
    """ConvNeXt-XXL of timm, its head's norm kept."""
    depths, widths = (3, 4, 30, 3), (384, 768, 1536, 3072)
    out = _affine("stem.0", widths[0], 3, 4, 4) | _affine("stem.1", widths[0]) | _affine("head.norm", widths[-1])
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if s:
            out |= _affine(f"stages.{s}.downsample.0", widths[s - 1])
            out |= _affine(f"stages.{s}.downsample.1", width, widths[s - 1], 2, 2)
        for n in range(depth):
            at = f"stages.{s}.blocks.{n}"
            out |= {f"{at}.gamma": (width,)} | _affine(f"{at}.conv_dw", width, 1, 7, 7) | _affine(f"{at}.norm", width)
            out |= _affine(f"{at}.mlp.fc1", 4 * width, width) | _affine(f"{at}.mlp.fc2", width, 4 * width)
    return out


def dinov2() -> Shapes:
    """DINOv2 ViT-g/14 of its own repository."""
    c = 1536
    out: Shapes = {"cls_token": (1, 1, c), "mask_token": (1, c), "pos_embed": (1, 1370, c)}
    out |= _affine("patch_embed.proj", c, 3, 14, 14) | _affine("norm", c)
    for i in range(40):
        at = f"blocks.{i}"
        out |= (
            {f"{at}.ls1.gamma": (c,), f"{at}.ls2.gamma": (c,)} | _affine(f"{at}.norm1", c) | _affine(f"{at}.norm2", c)
        )
        out |= _affine(f"{at}.attn.qkv", 3 * c, c) | _affine(f"{at}.attn.proj", c, c)
        out |= _affine(f"{at}.mlp.w12", 8192, c) | _affine(f"{at}.mlp.w3", c, 4096)
    return out


def blip2() -> Shapes:
    """BLIP-2's vision model and Q-Former."""
    v, q = 1408, 768
    see = "vision_model"
    out: Shapes = {
        "query_tokens": (1, 32, q),
        f"{see}.embeddings.class_embedding": (1, 1, v),
        f"{see}.embeddings.position_embedding": (1, 257, v),
    }
    out |= _affine(f"{see}.embeddings.patch_embedding", v, 3, 14, 14) | _affine(f"{see}.post_layernorm", v)
    for i in range(39):
        at = f"{see}.encoder.layers.{i}"
        out |= _affine(f"{at}.self_attn.qkv", 3 * v, v) | _affine(f"{at}.self_attn.projection", v, v)
        out |= _affine(f"{at}.layer_norm1", v) | _affine(f"{at}.layer_norm2", v)
        out |= _affine(f"{at}.mlp.fc1", 6144, v) | _affine(f"{at}.mlp.fc2", v, 6144)
    out |= _affine("qformer.layernorm", q)
    for i in range(12):
        at = f"qformer.encoder.layer.{i}"
        for part, inner in (("attention", q), *((("crossattention", v),) if i % 2 == 0 else ())):
            out |= _affine(f"{at}.{part}.attention.query", q, q) | _affine(f"{at}.{part}.attention.key", q, inner)
            out |= _affine(f"{at}.{part}.attention.value", q, inner)
            out |= _affine(f"{at}.{part}.output.dense", q, q) | _affine(f"{at}.{part}.output.LayerNorm", q)
        out |= _affine(f"{at}.intermediate_query.dense", 4 * q, q) | _affine(f"{at}.output_query.dense", q, 4 * q)
        out |= _affine(f"{at}.output_query.LayerNorm", q)
    return out


def encoder(prefix: str, kind: str) -> Shapes:
    """An encoder of a type by its prefix, names without it."""
    if prefix == "clip":  # whole where it is the only encoder, but the adapter drops the text blocks as SPHINX does
        return clip(text=find_type(kind).before_bos)
    return {"openclip_convnext_xxl": convnext, "dinov2_vitg14": dinov2, "qformer": blip2}[prefix]()


def joints(kind: str, dim: int, prefix_len: int = 10) -> Shapes:
    """What stands between the encoders and a language model of width ``dim``."""
    row = find_type(kind)
    if row.text == "llama_adapter":
        return _resampler(dim, prefix_len)
    if row.before_bos:
        return _affine("clip_proj", dim, 768) | _affine("clip_proj_norm", dim)
    out: Shapes = {"start_img": (1, 1, dim), "end_img": (1, 1, dim)}
    if "qformer" in row.encoders:
        out |= _affine("qformer_proj.0", dim, 768) | _affine("qformer_proj.1", dim)
    widths = {"clip": 1024, "openclip_convnext_xxl": 3072, "dinov2_vitg14": 1536}
    joined = sum(widths.get(e, 0) for e in row.encoders)
    return out | (_affine("visual_proj.0", dim, joined) | _affine("visual_proj.1", dim) if joined else {})


def _resampler(dim: int, prefix_len: int) -> Shapes:
    out = {"visual_query": (prefix_len, 768)} | _affine("clip_proj", 768, 768) | _affine("clip_proj_norm", 768)
    for i in range(8):
        at = f"visual_blocks.{i}"
        out |= _affine(f"{at}.norm1", 768) | _affine(f"{at}.norm2", 768) | _affine(f"{at}.attn.qkv", 3 * 768, 768)
        out |= _affine(f"{at}.attn.proj", 768, 768)
        out |= _affine(f"{at}.mlp.fc1", 4 * 768, 768) | _affine(f"{at}.mlp.fc2", 768, 4 * 768)
    return out | _affine("visual_proj", dim, 768) | _affine("visual_proj_norm", dim)


def language(config: LlamaConfig, specs: tuple[TuningSpec, ...] = ()) -> Shapes:
    """The language model with what is attached to it, under the published names."""
    model = build_meta(config)
    if specs:
        attach(model, specs)
    out: Shapes = {}
    prefixes: dict[str, list[Shape]] = {}
    for name, value in model.state_dict().items():
        if ".attention.prefix." in name:
            prefixes.setdefault(name.rpartition(".")[2], []).append(tuple(value.shape))
        else:
            out[name.replace(".delta.a.", ".lora_a.").replace(".delta.b.", ".lora_b.")] = tuple(value.shape)
    names = {"tokens": "prefix", "gate": "prefix_gate", "new_gate": "prefix_new_gate"}
    for part, shapes in prefixes.items():
        layers = len(shapes)
        out[names[part]] = {"tokens": (layers, 1, *shapes[0]), "gate": (layers, *shapes[0])}.get(part, (layers,))
    return out


def checkpoint(kind: str, config: LlamaConfig, specs: tuple[TuningSpec, ...] = ()) -> Shapes:
    """The whole checkpoint of a type: names (with the wrapper's ``llma.``) and shapes."""
    row = find_type(kind)
    out = language(config, specs)
    if row.text == "mixtral_sparse":
        out = {n: tuple(t.shape) for n, t in dense_to_sparse(on_meta(out)).items()}
    if row.encoders:
        length = next((s.length for s in specs if s.kind == "prefix"), 10)
        out |= joints(kind, config.dim, length)
    for prefix in row.encoders:
        out |= {f"{prefix}.{name}": shape for name, shape in encoder(prefix, kind).items()}
    return {f"llma.{name}": shape for name, shape in out.items()}


def on_meta(shapes: Mapping[str, Shape], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors without memory."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def count(shapes: Mapping[str, Shape]) -> int:
    """Numbers in all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
