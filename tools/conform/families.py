"""The families beside LLaMA: Mixtral, InternLM and Falcon; and the reference's folders: shards, overlays, training."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.backbone.reference import dense_to_sparse, from_reference, rename, sparse_to_dense
from accessory.backbone.reference_families import held_whole
from accessory.backbone.reference_folders import Language, build_language, overlay, read_reference
from accessory.nn.moe import Routing, balance_loss, router_loss, routings
from accessory.nn.rope import table
from accessory.parallel.axes import merge_shards, shard_rule, split_shards
from accessory.peft.attach import trainable_state
from tools.conform.comparison import Comparison, Handler
from tools.conform.text import cached

MIXTRAL = ("mixtral", "mixtral_peft", "mixtral_sparse")
FAMILIES = {f"accessory.model.LLM.{kind}.Transformer": kind for kind in (*MIXTRAL, "internlm", "falcon")}

# What hurts and is not imitated, by the case that has it.
GATES = "a merged prefix_gate has all heads: the reference keeps those of rank 0, and cannot load the result"
REPLICAS = "copies that differ between shards are an error: the reference takes those of rank 0 and warns"
DIFFERENCES = "a difference can be laid over a folder: the reference's loader raises a TypeError"
SPLITS = "shards can be made of this model: the reference raises a size mismatch"
AXES = "InternLM's up and down projections are cut so that two ranks compute one: the reference raises a shape error"


def family_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Cases 06 of text: training forward with its intermediates, cached inference, routing and its losses."""
    kind = FAMILIES[config["reference_class"]]
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    language = from_reference(weights, config["args"], kind)
    model = build_language(language)
    tokens = io.pop("in.tokens")
    log = forward(model, tokens, io, c)
    c.tensor("infer_logits", cached(model, tokens, config["infer_schedule"]), io.pop("out.infer_logits"))
    if log:
        routing(log, io, c)
        losses(model, kind, config["args"], tokens, io, c)
        layouts(weights, kind, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")
    if language[1]:
        theirs = rename({name: weights[name] for name in config["trainable"]}, language[0].n_layers)
        c.equal("trainable names", sorted(trainable_state(model)), sorted(theirs))


def forward(model: Llama, tokens: Tensor, io: dict[str, Tensor], c: Comparison) -> list[Routing]:
    """The full forward and what the case recorded of its blocks; returns what the experts' routers decided."""
    expected = io.pop("mid.freqs_cis_first_rows")
    k, positions = model.config, torch.arange(expected.shape[0])[None]
    c.tensor("freqs_cis", torch.view_as_real(table(positions, k.head_width, k.rope_theta, k.rope_scaling))[0], expected)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output
            if name.endswith("moe_out"):
                seen[name.replace("moe_out", "moe_in")] = inputs[0]

        return hook

    hooks = [model.norm.register_forward_hook(keep("norm"))]
    for i, block in enumerate(model.layers):
        hooks.append(block.register_forward_hook(keep(f"layers.{i}")))
        hooks.append(block.get_submodule("attention").register_forward_hook(keep(f"layers.{i}.mixer")))
        hooks.append(block.get_submodule("feed_forward").register_forward_hook(keep(f"layers.{i}.moe_out")))
    with torch.no_grad(), routings(model) as log:
        logits = model.logits(model(model.embed(tokens)))
    for hook in hooks:
        hook.remove()
    c.tensor("train_logits", logits, io.pop("out.train_logits"))
    for name in [n for n in io if n.startswith("mid.")]:
        ours = seen.get("norm" if name == "mid.ln_f" else name.removeprefix("mid."))
        if ours is not None:
            c.tensor(name.removeprefix("mid."), ours, io.pop(name))
    return log


def routing(log: list[Routing], io: dict[str, Tensor], c: Comparison) -> None:
    """Logits of every router, the experts that were chosen, and their weights."""
    for i, (logits, chosen, weights) in enumerate(log):
        at = f"mid.layers.{i}."
        c.tensor(f"layers.{i}.gate_logits", logits, io.pop(f"{at}gate_logits"))
        c.equal(f"layers.{i}.topk_experts", chosen.tolist(), io.pop(f"{at}topk_experts").tolist())
        c.tensor(f"layers.{i}.topk_weights", weights, io.pop(f"{at}topk_weights_renormalised"))
        best = logits.softmax(-1).sort(-1, descending=True).values
        margin = (best[:, chosen.shape[1] - 1] - best[:, chosen.shape[1]]).min()
        c.tensor(f"layers.{i}.moe_margin_min", margin[None], io.pop(f"{at}moe_margin_min"))


def losses(model: Llama, kind: str, args: dict[str, Any], tokens: Tensor, io: dict[str, Tensor], c: Comparison) -> None:
    """The balancing loss: the dense files put its weight into the loss and apply it once more, the sparse ones once."""
    assert model.config.moe is not None
    model.train()
    with torch.no_grad(), routings(model) as log:
        c.tensor("train_mode_logits", model.logits(model(model.embed(tokens))), io.pop("out.train_mode_logits"))
    model.eval()
    balance = model.config.moe.balance
    weight = balance if kind == "mixtral_sparse" else balance**0.5
    c.equal("stated weight", round(weight, 9), args.get("load_balancing_weight", 0.1))
    each = torch.stack([balance_loss(r) for r in log]) * (1.0 if kind == "mixtral_sparse" else weight)
    c.tensor("load_balancing_loss_per_layer", each, io.pop("out.load_balancing_loss_per_layer"))
    c.tensor("load_balancing_loss", each.mean()[None], io.pop("out.load_balancing_loss"))
    c.tensor("load_balancing_weight", torch.tensor([weight]), io.pop("out.load_balancing_weight_returned"))
    ours = router_loss(model.config.moe, log)[None]
    c.tensor("load_balancing_contribution", ours, io.pop("out.load_balancing_contribution_to_total_loss"))


def layouts(weights: dict[str, Tensor], kind: str, c: Comparison) -> None:
    """Experts in one layout, converted into the other and back."""
    if kind == "mixtral_peft":  # the block-sparse layout has no place for what is tuned
        return
    there, back = (sparse_to_dense, dense_to_sparse) if kind == "mixtral_sparse" else (dense_to_sparse, sparse_to_dense)
    same_tensors("other layout and back", back(there(weights)), weights, c)


def same_tensors(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], c: Comparison) -> None:
    """The same names and the same bits."""
    c.equal(f"{name}: names", sorted(ours), sorted(theirs))
    different = [k for k in theirs if k in ours and not torch.equal(ours[k], theirs[k])]
    c.equal(f"{name}: tensors that differ", different, [])


def write_folder(folder: Path, kind: str, args: dict[str, Any], shards: list[dict[str, Tensor]]) -> Path:
    """A folder as the reference's training leaves it, with the files that are no shards of the model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(args))
    (folder / "meta.json").write_text(json.dumps({"llama_type": kind}))
    for rank, shard in enumerate(shards):
        stem = f"consolidated.{rank:02d}-of-{len(shards):02d}"
        torch.save({"model": shard}, folder / f"{stem}.model.pth")
        torch.save({"optimizer": {}}, folder / f"{stem}.optimizer.pth")
        torch.save({"epoch": 0}, folder / f"{stem}.other.pth")
        torch.save({"dataset_state": {}}, folder / f"rank-specific-{rank:05d}-of-{len(shards):05d}.pth")
    return folder


@torch.no_grad()
def logits(language: Language, tokens: Tensor) -> Tensor:
    """(B, T, V) of the model with its tuning attached."""
    model = build_language(language)
    return model.logits(model(model.embed(tokens)))


def shards_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Cases 08: two shards merged, their axes, and cut again; the merged model computes what two ranks computed."""
    kind, args = config["llama_type"], config["args"]
    facts = json.loads((folder / "merge.json").read_text())
    io, merged = load_file(folder / "io.safetensors"), load_file(folder / "weights.safetensors")
    shards = [load_file(folder / f"consolidated.{i:02d}-of-02.model.safetensors") for i in range(2)]
    whole, tokens = held_whole(kind, args), io.pop("in.tokens")
    ours = merge_shards(shards, whole=whole)
    for name, fact in facts["kinds"].items():
        expert = ".experts." in name  # whole on one rank: the reference states no axis
        rule = "expert" if expert else "interleaved" if fact["custom_merge"] else fact["concat_dim"]
        if not name.endswith("prefix_gate"):
            c.equal("axes", (name, shard_rule(name, whole)), (name, rule))
    gate = merged.pop("llma.prefix_gate", None)
    if gate is not None:
        both = io.pop("mid.prefix_gate_concat_dim1")
        c.deviates("prefix_gate", bool(torch.equal(ours["llma.prefix_gate"], both)), True, GATES)
    same_tensors("merged", {k: v for k, v in ours.items() if not k.endswith("prefix_gate")}, merged, c)
    for rank, (again, shard) in enumerate(zip(split_shards(ours, 2, whole), shards, strict=True)):
        same_tensors(f"cut again, rank {rank}", again, shard, c)
    if "split_error" in facts["split_mp1_to_mp2"]:
        c.deviates("cut in two", len(split_shards(ours, 2, whole)), 2, SPLITS)
    with tempfile.TemporaryDirectory() as place:
        language = read_reference([write_folder(Path(place) / "two", kind, args, shards)], pickles=True)
    if "forward_error_mp2" in facts["split_mp1_to_mp2"]:
        c.deviates("feed-forward of two ranks", halves_add_up(language), True, AXES)
    computed = logits(language, tokens)
    for name in [n for n in io if n.endswith("_logits")]:
        c.tensor(name.removeprefix("out."), computed, io.pop(name))
    if (folder / "special_cases.json").is_file():
        special(config, json.loads((folder / "special_cases.json").read_text()), shards, io, c)
    if io:
        c.problems.append(f"nothing computes {', '.join(sorted(io))}")


def halves_add_up(language: Language) -> bool:
    """Whether the first feed-forward layer is the sum of what two ranks compute with their shards of it."""
    config, _, tensors = language
    x = torch.randn(5, config.dim, generator=torch.Generator().manual_seed(0))

    def layer(state: dict[str, Tensor]) -> Tensor:
        w1, w2, w3 = (state[f"layers.0.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        return (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    summed = sum((layer(shard) for shard in split_shards(tensors, 2)), torch.zeros(()))
    return torch.allclose(summed, layer(tensors), rtol=1e-4, atol=1e-4)


def special(
    config: dict[str, Any], facts: dict[str, Any], shards: list[dict[str, Tensor]], io: dict[str, Tensor], c: Comparison
) -> None:
    """Unequal copies, differences that add, and Meta's own files."""
    merged = merge_shards(shards)
    unequal = [shards[0], shards[1] | {"llma.norm.weight": shards[1]["llma.norm.weight"] + 1}]
    try:
        merge_shards(unequal)
        refused = False
    except ValueError as error:
        refused = "llma.norm.weight" in str(error)
    c.deviates("unequal copies", refused, True, REPLICAS)
    added = {k: torch.full_like(v, 0.25) for k, v in merged.items() if "norm" in k}
    added |= {"llma.output.weight": torch.full_like(merged["llma.output.weight"], 0.125)}
    stated = facts["diff_format"]["direct_load_diff_checkpoint"]
    ours = overlay({k: merged[k] for k in stated["existing_keys"]}, added, difference=True)
    for name in [n for n in io if n.startswith("out.special.diff.")]:
        c.tensor(name.removeprefix("out.special."), ours[name.removeprefix("out.special.diff.")], io.pop(name))
    with tempfile.TemporaryDirectory() as place:
        base = write_folder(Path(place) / "base", config["llama_type"], config["args"], shards)
        top = write_folder(Path(place) / "top", config["llama_type"], config["args"], split_shards(added, 2))
        for path in sorted(top.glob("*.model.pth")):
            path.rename(path.with_name(path.name.replace(".model.", ".model-diff.")))
        read = read_reference([base, top], pickles=True)[2]
    moved = all(torch.equal(read[k.removeprefix("llma.")], merged[k] + added[k]) for k in added)
    c.deviates("difference over a folder", moved, True, DIFFERENCES)
    # Meta's files have the same tensors without the wrapper's name.
    bare = merge_shards([{k.removeprefix("llma."): v for k, v in s.items()} for s in shards])
    same_tensors("meta_ori_format", {f"llma.{k}": v for k, v in bare.items()}, merged, c)
    # A helper inside of the reference, on a tensor that the case does not give: nothing of ours corresponds to it.
    for name in [n for n in io if n.startswith("out.special.tensor_load_shard")]:
        io.pop(name)


def checkpoint_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Cases 10: a folder that training wrote, alone or over the weights that it was trained on."""
    facts = json.loads((folder / "checkpoint.json").read_text())
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    kind, args, tokens = facts["meta_json"]["llama_type"], facts["config_json"], io.pop("in.tokens")
    c.equal("llama_type", kind, config["llama_type"])
    c.tensor("before_saving", logits(from_reference(weights, args, kind), tokens), io.pop("out.logits_before_saving"))
    stated = facts["model_file"]["params"]
    saved = {k: weights[k].to(getattr(torch, dtype)) for k, (dtype, _) in stated.items()}
    c.equal("shapes", {k: list(v.shape) for k, v in saved.items()}, {k: shape for k, (_, shape) in stated.items()})
    with tempfile.TemporaryDirectory() as place:
        folders = [write_folder(Path(place) / facts["folder"], kind, args, [saved])]
        c.equal("files", sorted(p.name for p in folders[0].iterdir()), sorted({*facts["files"]} - {"tokenizer.model"}))
        if len(saved) < len(weights):  # trained parts alone, over weights in which those parts have other values
            base = {k: v + 1 if k in saved else v for k, v in weights.items()}
            folders.insert(0, write_folder(Path(place) / "base", kind, args, [base]))
        language = read_reference(folders, pickles=True)
    c.tensor("after_loading", logits(language, tokens), io.pop("out.logits_after_from_pretrained"))
    if len(saved) < len(weights):
        model = build_language(language)
        theirs = rename({k: weights[k] for k in saved}, language[0].n_layers)
        c.equal("trainable names", sorted(trainable_state(model)), sorted(theirs))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(FAMILIES, family_case),
    "accessory.util.tensor_parallel (on MetaModel)": shards_case,
    "accessory.util.misc.save_checkpoint and MetaModel.from_pretrained": checkpoint_case,
}
"""By the reference class that the case was computed with."""
