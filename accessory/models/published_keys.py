"""Names and shapes of every tensor in the checkpoints of LLaMA2-Accessory and LLaMA-Adapter, for the full sizes,
without the checkpoints.

The encoders are written out from their published sizes, independently of the modules that read them, so that an
importer can be held against the whole list on ``meta``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.backbone.keys import build_meta
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.reference import dense_to_sparse
from accessory.models.published import Adapter, find_type
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


def _resampler(dim: int, prefix_len: int, width: int = 768, depth: int = 8, features: int = 768) -> Shapes:
    out = {"visual_query": (prefix_len, width)} | _affine("clip_proj", width, features)
    out |= _affine("clip_proj_norm", width)
    for i in range(depth):
        at = f"visual_blocks.{i}"
        out |= _affine(f"{at}.norm1", width) | _affine(f"{at}.norm2", width)
        out |= _affine(f"{at}.attn.qkv", 3 * width, width) | _affine(f"{at}.attn.proj", width, width)
        out |= _affine(f"{at}.mlp.fc1", 4 * width, width) | _affine(f"{at}.mlp.fc2", width, 4 * width)
    return out | _affine("visual_proj", dim, width) | _affine("visual_proj_norm", dim)


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


@dataclass(frozen=True)
class Tuned:
    """What a release of LLaMA-Adapter tunes beside its prefixes. ``bias``: of all linears but keys and values; ``rank``
    of LoRA on all linears, 0 without; ``legacy``: ImageBind-LLM's first form, whose network has biases."""

    bias: bool = False
    norm: bool = False
    rank: int = 0
    new_gate: bool = False
    legacy: bool = False


def release(kind: str, config: LlamaConfig, tuned: Tuned | None = None) -> Shapes:
    """The whole file of a release of LLaMA-Adapter beside a LLaMA of the sizes ``config``, merged where it is cut.

    Raises:
        ValueError: for a ``kind`` that is none.
    """
    form, tuned = find_type(kind).adapter, tuned or Tuned()
    if form is None:
        raise ValueError(f"{kind} is no release of LLaMA-Adapter")
    llama = "llama." if form.wrapped else ""
    out: Shapes = {f"{form.tokens}.weight": (form.layers * form.length, config.dim)} if form.layers else {}
    for i in range(config.n_layers):
        at = f"{llama}layers.{i}"
        if form.layers:
            out[f"{at}.attention.{form.gate}"] = (1, config.n_heads, 1, 1)
        if tuned.new_gate:
            out[f"{at}.attention.new_gate"] = (1, 1, 1, 1)
        out |= _tuned_linears(at, config, form, tuned)
        if tuned.norm or form.scaled:
            out |= {f"{at}.attention_norm.weight": (config.dim,), f"{at}.ffn_norm.weight": (config.dim,)}
    if tuned.norm or form.scaled:
        out[f"{llama}norm.weight"] = (config.dim,)
    if form.blocks is not None:
        seen = _resampler(config.dim, form.length, *form.blocks, form.features)
        out |= {"visual_query.weight": seen.pop("visual_query")} | seen
    return out if form.bind is None else out | _bind(config.dim, form.features, *form.bind, tuned.legacy)


def _tuned_linears(at: str, config: LlamaConfig, form: Adapter, tuned: Tuned) -> Shapes:
    """What is beside the seven matrices of a block."""
    out: Shapes = {}
    hidden, heads, keys = config.hidden_width, config.n_heads * config.head_width, config.kv_heads * config.head_width
    ends = {"wq": (heads, config.dim), "wk": (keys, config.dim), "wv": (keys, config.dim), "wo": (config.dim, heads)}
    ends |= {"w1": (hidden, config.dim), "w2": (config.dim, hidden), "w3": (hidden, config.dim)}
    for name, (rows, columns) in ends.items():
        part = f"{at}.{'feed_forward' if name[1].isdigit() else 'attention'}"
        if form.scaled:
            out |= {f"{part}.{name}_bias": (rows,), f"{part}.{name}_scale": (columns,)}
        if tuned.bias and name not in ("wk", "wv"):
            out[f"{part}.{name}.bias"] = (rows,)
        if tuned.rank:
            out[f"{part}.lora_{name}_l1.weight"] = (tuned.rank, columns)
            out[f"{part}.lora_{name}_l2.weight"] = (rows, tuned.rank)
    return out


def _bind(dim: int, features: int, width: int, depth: int, legacy: bool) -> Shapes:
    """ImageBind-LLM's network from a vector to a token."""
    out = _affine("image_bind_proj", dim, features)
    for i in range(1, depth + 1):
        parts = _affine(f"image_bind_norm_{i}", dim)
        parts |= _affine(f"image_bind_f1_{i}", width, dim) | _affine(f"image_bind_f3_{i}", width, dim)
        parts |= _affine(f"image_bind_f2_{i}", dim, width)
        out |= {k: v for k, v in parts.items() if legacy or not k.endswith(".bias")}
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
