"""The seeing side: LLaMA2-Accessory's models with pictures, from one CLIP to SPHINX's ten views."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory.data.encode import tile_ids
from accessory.models.mllm import MLLM
from accessory.models.published import LLAMA_TYPES, LlamaType, find_type
from accessory.models.reference import Published, assemble, read_published
from accessory.nn.moe import Routing, balance_loss, router_loss, routings
from accessory.peft.attach import trainable_state
from accessory.vision import mixture
from accessory.vision.mixture import Mixture
from accessory.vision.projector import Projector
from tools.conform.comparison import Comparison, Handler
from tools.conform.standins import IO, SHORT, Given, Pooled, from_pixels, make_tower, to_pixels
from tools.conform.text import text_case

VIEW_MAJOR = ("llama_ens5", "llama_ens5p2", "llama_ens10")
"""Types whose encoders get all pictures' first views, then all second ones; ours come picture by picture."""

DECLARED = "a picture costs the positions that it takes (the reference declares two fewer and may pass its limit)"
TUNED = ("llama_peft", "llama_ens_peft", "mixtral_peft")
UNTRAINED = "the projection trains (the reference leaves it, or all of it but biases and norms, at its random start)"


@dataclass
class Seen:
    """What passed through the parts during the training forward."""

    tokens: tuple[Tensor, ...] = ()
    features: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)
    encoders: dict[str, Tensor] = field(default_factory=dict)


def visual_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """A model with its pictures: encoders, projections, the sequence, training and cached logits, trainable names."""
    kind = config["reference_class"].split(".")[-2]
    row = find_type(kind)
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    published = read_published(weights, config["args"], kind)
    tower = make_tower(config, row, io)
    heads = config.get("patched_class_attributes", {}).get("v_num_heads", 16)
    net = assemble(published, tower, heads)
    tokens, tiles = io.pop("in.tokens"), pictures(config, io, tower)
    with torch.no_grad():
        if row.positions:
            seen = spliced(net, tokens, tiles, row, config, io, c)
            intermediates(net, seen, config, io, c)
        else:
            prefixed(net, tokens, tiles, config, io, c)
        plain(net, tokens, config, io, c)
    names_that_train(net, published, weights, config, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def pictures(config: dict[str, Any], io: IO, tower: nn.Module) -> Tensor:
    """Tiles (B,3,S,S) in [0, 1]."""
    if isinstance(tower, Given):
        return torch.zeros(len(tower.given), 3, 1, 1)
    if "in.image" in io:
        return to_pixels(io.pop("in.image"))
    times = config["image_upsample"]
    return to_pixels(io.pop("in.image_grid").repeat_interleave(times, 2).repeat_interleave(times, 3))


def lay(tokens: Tensor, runs: tuple[int, ...], row: LlamaType) -> Tensor:
    """Ids with a picture's placeholders in every row, before BOS or after it."""
    picture = torch.tensor(tile_ids(runs, row.start_end)).expand(len(tokens), -1)
    cut = 0 if row.before_bos else 1
    return torch.cat([tokens[:, :cut], picture, tokens[:, cut:]], 1)


def spliced(
    net: MLLM, tokens: Tensor, tiles: Tensor, row: LlamaType, config: dict[str, Any], io: IO, c: Comparison
) -> Seen:
    """Pictures in the sequence: positions, training logits and cached inference."""
    assert net.tower is not None
    assert net.projector is not None
    ids = lay(tokens, net.projector.runs(net.tower.runs), row)
    extra = ids.shape[1] - tokens.shape[1]
    c.equal("positions of a picture", extra, row.positions)
    theirs = config.get("actual_visual_positions")
    if theirs is not None and row.declared is not None:
        c.equal("declared by the reference", config["image_words_constant"], row.declared)
        c.deviates("positions of the reference", extra, theirs, DECLARED)
    elif theirs is not None:
        c.equal("positions of the reference", extra, theirs)
    seen = Seen()
    if "out.nohalf_train_logits" in io:
        exact = net.logits(net(ids, tiles))[:, -tokens.shape[1] :]
        c.tensor("nohalf_train_logits", exact, io.pop("out.nohalf_train_logits"))
        with rounding(), routings(net.backbone) as log:
            logits = watched(net, seen, ids, tiles)[:, -tokens.shape[1] :]
        if log:
            routed(log, net, io, c)
        c.tensor("half_effect", (logits - exact).abs().max()[None], io.pop("mid.half_effect"))
    else:
        logits = watched(net, seen, ids, tiles)[:, -tokens.shape[1] :]
    if "mid.llm_input" in io:
        c.tensor("llm_input", net.embed(ids, features=seen.features), io.pop("mid.llm_input"))
    c.tensor("train_logits", logits, io.pop("out.train_logits"))
    ours = cached(net, tokens, ids, config["infer_schedule"], features=seen.features)
    c.tensor("infer_logits", ours, io.pop("out.infer_logits"))
    return seen


def routed(log: list[Routing], net: MLLM, io: IO, c: Comparison) -> None:
    """What the experts' routers decided (every 16th token where the case holds so many), and the balancing loss."""
    for i, (logits, chosen, weights) in enumerate(log):
        at = f"layers.{i}"
        step = 1 if len(io[f"mid.{at}.gate_logits"]) == len(logits) else 16
        best = logits.softmax(-1).sort(-1, descending=True).values
        top = chosen.shape[1]
        margin = (best[:, top - 1] - best[:, top]).min()
        c.tensor(f"{at}.moe_margin_min", margin[None], io.pop(f"mid.{at}.moe_margin_min"))
        c.tensor(f"{at}.gate_logits", logits[::step], io.pop(f"mid.{at}.gate_logits"))
        c.equal(f"{at}.topk_experts", chosen[::step].tolist(), io.pop(f"mid.{at}.topk_experts").tolist())
        c.tensor(f"{at}.topk_weights", weights[::step], io.pop(f"mid.{at}.topk_weights_renormalised"))
    moe = net.backbone.config.moe
    assert moe is not None
    each = torch.stack([balance_loss(r) for r in log])
    c.tensor("load_balancing_loss_per_layer", each, io.pop("out.load_balancing_loss_per_layer"))
    c.tensor("load_balancing_loss", each.mean()[None], io.pop("out.load_balancing_loss"))
    c.tensor("load_balancing_weight", torch.tensor([moe.balance]), io.pop("out.load_balancing_weight_returned"))
    ours = router_loss(moe, log)[None]
    c.tensor("load_balancing_contribution", ours, io.pop("out.load_balancing_contribution_to_total_loss"))


def watched(net: MLLM, seen: Seen, ids: Tensor, tiles: Tensor | None = None) -> Tensor:
    """Logits, with what passes through the parts kept."""
    with watching(net, seen):
        return net.logits(net(ids, tiles))


def rounding() -> AbstractContextManager[Any]:
    """While it lasts, pictures are resized in half precision after CLIP's normalisation, as the reference does.

    It is no part of the models: the cases hold the numbers without it too, and the difference is what half precision
    costs. With it every intermediate can be compared at the usual limit.
    """

    def half(pixels: Tensor, side: int) -> Tensor:
        if pixels.shape[-1] == side:
            return pixels
        x = from_pixels(pixels).half()
        return to_pixels(F.interpolate(x, size=(side, side), mode="bicubic").float())

    return patch.object(mixture, "_bicubic", half)


def cached(net: MLLM, tokens: Tensor, ids: Tensor, schedule: list[list[int]], **pictures: Tensor | None) -> Tensor:
    """Logits (calls, B, V) of the last position of each call ``[start, length]``; ``ids`` are ``tokens`` with pictures,
    which come in the first call."""
    extra = ids.shape[1] - tokens.shape[1]
    cache = net.backbone.cache(len(ids), ids.shape[1])
    context = pictures.pop("context", None)
    rows = []
    for start, length in schedule:
        begin = start + extra if start else 0
        piece = ids[:, begin : start + length + extra]
        h = net(piece, cache=cache, context=context if start == 0 else None, **(pictures if start == 0 else {}))
        rows.append(net.logits(h[:, -1:])[:, 0])
    return torch.stack(rows)


def plain(net: MLLM, tokens: Tensor, config: dict[str, Any], io: IO, c: Comparison) -> None:
    """The same model without a picture."""
    names = [n.removeprefix("mid.noimage_") for n in io if n.startswith("mid.noimage_")]
    if "out.noimage_train_logits" not in io:
        return
    seen = Seen()
    logits = watched(net, seen, tokens)
    for name in names:
        c.tensor(f"noimage_{name}", seen.modules[name], io.pop(f"mid.noimage_{name}"))
    c.tensor("noimage_train_logits", logits, io.pop("out.noimage_train_logits"))
    ours = cached(net, tokens, tokens, config["infer_schedule"])
    c.tensor("noimage_infer_logits", ours, io.pop("out.noimage_infer_logits"))


def prefixed(net: MLLM, tokens: Tensor, tiles: Tensor, config: dict[str, Any], io: IO, c: Comparison) -> None:
    """LLaMA-Adapter: pictures in the prefix of the attention layers, and no position in the sequence."""
    assert net.tower is not None
    assert net.resampler is not None
    blocks: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, y: blocks.append(y)) for b in net.resampler.visual_blocks]
    seen = Seen()
    with watching(net, seen):
        context = net.context(tokens, tiles, torch.ones(len(tokens), dtype=torch.long))
        logits = net.logits(net(tokens, context=context))
    for hook in hooks:
        hook.remove()
    assert context is not None
    c.tensor("clip_tokens", net.tower.tokens(tiles)[0], io.pop("mid.clip_tokens"))
    for i, block in enumerate(blocks):
        name = f"visual_block{i}_query_tokens"
        c.tensor(name, block[:, : net.resampler.prefix_len], io.pop(f"mid.{name}"))
    c.tensor("visual_query_out", context, io.pop("mid.visual_query_out"))
    prefixes = [b.attention.prefix for b in net.backbone.layers if b.attention.prefix is not None]  # type: ignore[union-attr]
    actual = torch.stack([p.tokens + context for p in prefixes])
    c.tensor("actual_prefix", actual, io.pop("mid.actual_prefix"))
    for name in [n.removeprefix("mid.") for n in io if n.startswith("mid.layers")]:
        c.tensor(name, seen.modules[name], io.pop(f"mid.{name}"))
    c.tensor("train_logits", logits, io.pop("out.train_logits"))
    ours = cached(net, tokens, tokens, config["infer_schedule"], context=context)
    c.tensor("infer_logits", ours, io.pop("out.infer_logits"))


class watching:  # noqa: N801 - a context manager
    """Keeps what the blocks, the projector and the encoders of a network compute."""

    def __init__(self, net: MLLM, seen: Seen) -> None:
        self.net, self.seen = net, seen
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        seen = self.seen
        for name, module in self.net.backbone.named_modules():
            if name == "norm" or (name.startswith("layers.") and name.count(".") == 1):
                self._keep(module, seen.modules, name)
        if self.net.projector is not None:
            self.hooks.append(self.net.projector.register_forward_hook(self._projected))
        tower = self.net.tower
        if isinstance(tower, Mixture):
            for name, member in tower.members.items():
                self._keep_encoder(SHORT.get(name, name), member)
        elif tower is not None:
            self._keep_encoder("clip", tower)

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: nn.Module, where: dict[str, Tensor], name: str) -> None:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            where[name] = output

        self.hooks.append(module.register_forward_hook(keep))

    def _keep_encoder(self, name: str, module: nn.Module) -> None:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            self.seen.encoders[name] = output.sequence()

        self.hooks.append(module.register_forward_hook(keep))
        for inner_name, inner in module.named_modules():
            if inner_name == "model.vision_model":

                def keep_inner(_module: object, _inputs: object, output: Any) -> None:
                    self.seen.encoders["blip2_vision"] = output.last_hidden_state

                self.hooks.append(inner.register_forward_hook(keep_inner))

    def _projected(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.seen.tokens, self.seen.features = tuple(inputs[0]), output


def intermediates(net: MLLM, seen: Seen, config: dict[str, Any], io: IO, c: Comparison) -> None:
    """What the case recorded on the way, but for the sequence."""
    kind = config["reference_class"].split(".")[-2]
    assert net.tower is not None
    views = len(net.tower.runs)

    def order(x: Tensor) -> Tensor:
        """Rows (B * views) in the reference's order."""
        return x.unflatten(0, (-1, views)).transpose(0, 1).flatten(0, 1) if kind in VIEW_MAJOR else x

    for name in [n.removeprefix("mid.") for n in io if n.startswith("mid.")]:
        if name.startswith("enc_input."):
            encoder_input(net.tower, name, order, io, c)
        elif name.startswith("enc."):
            c.tensor(name, order(encoder_output(seen, name, io)), io.pop(f"mid.{name}"))
        elif name.startswith(("visual_proj", "qformer_proj")):
            c.tensor(name, projected(net, seen, name, order), io.pop(f"mid.{name}"))
        elif name.startswith("layers.") or name == "norm":
            c.tensor(name, seen.modules[name], io.pop(f"mid.{name}"))
        else:
            single(seen, name, io, c)


def single(seen: Seen, name: str, io: IO, c: Comparison) -> None:
    """Names of the models with one encoder."""
    assert seen.features is not None
    found = {
        "clip_tokens": lambda: seen.tokens[0],
        "qformer_last_hidden": lambda: seen.tokens[0],
        "image_tokens": lambda: seen.features,
        "open_clip_pooled_reference": lambda: seen.tokens[0][:, 0],
        "blip2_vision_last_hidden": lambda: seen.encoders["blip2_vision"],
    }.get(name)
    if found is not None:
        value = found()
        assert value is not None
        c.tensor(name, value, io.pop(f"mid.{name}"))


def encoder_input(tower: nn.Module, name: str, order: Any, io: IO, c: Comparison) -> None:
    """The pictures that an encoder got: shape, statistics, samples."""
    assert isinstance(tower, Mixture)
    _, encoder, what = name.split(".")
    member = next(m for n, m in tower.members.items() if SHORT.get(n, n) == encoder)
    assert isinstance(member, Pooled)
    assert member.seen is not None
    x = order(member.seen)
    expected = io.pop(f"mid.{name}")
    if what == "shape":
        c.equal(name, list(x.shape), expected.tolist())
        return
    if what.startswith("sample_"):
        a, b, e, f = map(int, what.split("_")[1:])
        ours = x[:, :, a::b, e::f]
    else:
        ours = (x if what == "mean" else x.abs()).mean((2, 3))
    c.tensor(name, ours, expected)


def encoder_output(seen: Seen, name: str, io: IO) -> Tensor:
    """Tokens of an encoder as the case sampled them."""
    key = {"clip_ln_post": "clip", "convnext_trunk_map": "convnext", "dinov2_norm": "dinov2"}
    short = name.removeprefix("enc.")
    found = seen.encoders[key.get(short, short)]
    expected = io[f"mid.{name}"]
    if short == "convnext_trunk_map":  # ours has its cells repeated to 16 x 16
        side = expected.shape[-1]
        return found.transpose(1, 2).unflatten(2, (16, 16))[:, :, :: 16 // side, :: 16 // side]
    return found if found.shape[1] == expected.shape[1] else found[:, ::16]


def projected(net: MLLM, seen: Seen, name: str, order: Any) -> Tensor:
    """Tokens before or after a projection, by batches of views of one length, in the reference's order."""
    projector = net.projector
    assert isinstance(projector, Projector)
    assert seen.features is not None
    assert net.tower is not None
    group, what = name.split("_proj_")
    batch = int(what.removeprefix("in").removeprefix("out").split("_")[0])
    after = seen.features.split([g.num_tokens for g in projector.groups], 1)
    parts = seen.tokens if what.startswith("in") else after
    mine = [x for g, x in zip(projector.groups, parts, strict=True) if g.name == group]
    lengths = list(dict.fromkeys(x.shape[1] for x in mine))
    chosen = [x for x in mine if x.shape[1] == lengths[batch]]
    stacked = torch.stack(chosen, 1).flatten(0, 1)  # picture by picture
    if len(chosen) == len(net.tower.runs):
        stacked = order(stacked)
    elif len(chosen) > 1:  # the parts alone, all of the first before all of the second
        stacked = torch.cat(chosen)
    if "sample" not in what:
        return stacked
    rows, channels = map(int, what.split("_")[2:])
    return stacked[:, ::rows, ::channels]


def names_that_train(net: MLLM, published: Published, weights: IO, config: dict[str, Any], c: Comparison) -> None:
    """Names of what trains, but for those that a deviation names."""
    mode = config["args"].get("trainable_mode", "sg")
    names = config["trainable_by_mode"][mode] if "trainable_by_mode" in config else config.get("trainable")
    if names is None:
        return
    theirs = {f"{part}.{n}" for part, n in our_names(published, set(names), weights, config["args"])}
    ours = set(trainable_state(net)) - {"projector.skip"}  # the published models have none
    if published.type.text in TUNED:
        every = {f"projector.{name}" for name in published.projector}
        c.deviates("trainable names", sorted(ours), sorted(theirs | every), UNTRAINED)
    else:
        c.equal("trainable names", sorted(ours), sorted(theirs))


def our_names(published: Published, names: set[str], weights: IO, args: dict[str, Any]) -> list[tuple[str, str]]:
    """Parts and our names of published names."""
    few = {n: weights[n] for n in names}
    few.setdefault("tok_embeddings.weight", weights["tok_embeddings.weight"])
    read = read_published(few, args, published.kind)
    parts = {"backbone": read.backbone, "projector": read.projector, "resampler": read.resampler}
    found = [(part, n) for part, tensors in parts.items() for n in tensors]
    return [(p, n) for p, n in found if n != "tok_embeddings.weight" or n in names]


def either_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """A type that comes with pictures and without."""
    (visual_case if config.get("with_visual") else text_case)(folder, config, c)


READ = ("llama", "llama_adapter", "llama_peft", "llama_ens_peft")
HANDLERS: dict[str, Handler] = {
    f"accessory.model.LLM.{kind}.Transformer": either_case
    for kind, row in LLAMA_TYPES.items()
    if row.tower is not None and (row.text in READ or len(row.encoders) > 1)
}
"""By the reference class that the case was computed with; Mixtral with one CLIP comes without pictures alone."""
