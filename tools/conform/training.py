"""Training: the learning rate, clipping, which parameters decay, and whole epochs of the reference's loop."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.backbone.reference import TYPES, from_reference, rename
from accessory.data.tokenizer import from_gguf
from accessory.models.mllm import MLLM
from accessory.peft.attach import attach
from accessory.schema import Batch
from accessory.tokens import IGNORE
from accessory.train.config import GroupConfig, TrainConfig
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.optim import Optimizer, decays, warm_cosine
from tools.conform.comparison import Comparison, Handler, UnsupportedError
from tools.conform.models import wrapped

RISES = "the learning rate stays at its minimum behind the last epoch (the reference's rises again)"
DIVIDES = "a warm-up as long as the run ends at the full rate (the reference divides by zero)"
NO_DECAY = (
    "norms of projections, gates, learned vectors and every 1-D parameter never decay (the reference decays all whose "
    "name does not end in .bias or norm.weight)"
)
UNUSED = "rates by layer are patterns with a scale (the reference's table is unused by its scripts and fails on a dict)"
MEAN = (
    "an update of ours weighs every token alike; here, as in the reference, every micro-batch is averaged by itself "
    "and then counts the same"
)
RANKS = "the norm under tensor parallelism has no recorded inputs; tests/distributed compares ours with one rank's"

PLAIN = ("llama", "llama_peft", "llama_adapter")  # whose names need nothing but the importer's table


def config(**options: Any) -> TrainConfig:
    """A training configuration that needs no folder."""
    return TrainConfig(output_dir="unused", max_steps=10, lr=1e-3, **options)


def rates(folder: Path, _: dict[str, Any], c: Comparison) -> None:
    """The two schedules, and the rates of two groups."""
    found = json.loads((folder / "lr.json").read_text())
    for kind, at, warmup, end in (
        ("iterations", "it", "warmup_iters", "lr_decay_iters"),
        ("epochs", "epoch", "warmup_epochs", "epochs"),
    ):
        if not found[kind]:
            c.problems.append(f"lr.json has no {kind}")
        for case in found[kind]:
            a = case["args"]
            for row in case["rows"]:
                ours = warm_cosine(row[at], a["lr"], a["min_lr"], a[warmup], a[end])
                if "error" in row:
                    c.deviates("lr of a run of warm-up alone", ours, a["lr"], DIVIDES)
                    continue
                if kind == "epochs" and row[at] > a[end]:
                    c.deviates("lr behind the end", ours, a["min_lr"], RISES)
                    continue
                c.tensor(f"lr by {kind}", torch.tensor(ours / a["lr"]), torch.tensor(row["lr"] / a["lr"]))
                c.tensor("lr of groups", grouped(ours) / a["lr"], torch.tensor(row["group_lrs"]) / a["lr"])


def grouped(lr: float) -> Tensor:
    """The rates that an optimizer of two groups steps with."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    optimizer = Optimizer(model, config(groups=(GroupConfig("b.*", lr_scale=0.3),)))
    optimizer.step(lr)
    return torch.tensor([group["lr"] for group in optimizer.steppers[0].param_groups])


def clipping(folder: Path, case: dict[str, Any], c: Comparison) -> None:
    """Gradients before and after, and the norm that is logged."""
    io, found = load_file(folder / "io.safetensors"), json.loads((folder / "clip.json").read_text())
    a, b, d = case["dims"]
    for i, combination in enumerate(found["toy"]):
        model = nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.Linear(b, d))
        for name, parameter in model.named_parameters():
            parameter.grad = io[f"in.grad.{name}"].clone()
        norm, _ = Optimizer(model, config(clip_norm=combination["max_norm"])).clip(float(combination["norm_type"]))
        c.tensor("total norm", norm, torch.tensor(combination["returned_norm"]))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            c.tensor("clipped", parameter.grad, io[f"out.combo{i}.grad.{name}"])
    c.deviates("norms of ranks", len(set(found["model_parallel"]["norms_mp2_rank0_rank1"])), 1, RANKS)


def decayed(folder: Path, _: dict[str, Any], c: Comparison) -> None:
    """Which of the trainable parameters decay, model by model."""
    for case in json.loads((folder / "groups.json").read_text()):
        groups = {name: bool(g["weight_decay"]) for g in case["result"]["groups"] for name in g["params"]}
        if case["llama_type"] in PLAIN and not case.get("with_visual"):
            trained(case, groups, c)
        for name, theirs in groups.items():
            ours = decays(name, torch.empty((2,) * dimensions(name)))
            if ours == theirs or not protected(name):
                c.equal(f"{case['llama_type']} decay", (name, ours), (name, theirs))
            else:
                c.deviates("decay", (ours, theirs), (False, True), NO_DECAY)
    rows = json.loads((folder / "layerwise.json").read_text())
    c.deviates("layer-wise", bool(rows) and groups_by_pattern(), True, UNUSED)


def dimensions(name: str) -> int:
    """Dimensions of a parameter of the reference, by its name."""
    flat = r"(norm\d?|\w*_norm|ln_\w+|_proj\.1)\.weight$|\.bias$|prefix_new_gate$"
    return 1 if re.search(flat, name) else 2


def protected(name: str) -> bool:
    """Whether this project says of a parameter that it must not decay, where the reference lets it."""
    return bool(re.search(r"_proj\.1\.weight|ln_\w+\.weight|norm\w*\.weight|_img$|prefix|gate$", name))


def trained(case: dict[str, Any], groups: dict[str, bool], c: Comparison) -> None:
    """Names, and the decay of the very parameters that our model trains."""
    names = [*groups, *case["result"]["frozen"]]
    sizes = {**case["args"], "vocab_size": 8}
    llama, specs, _ = from_reference({}, sizes, case["llama_type"])
    model = Llama(llama)
    if specs:
        attach(model, specs)
    layers, stack = llama.n_layers, {"prefix": torch.zeros(1, 1, 1, 1), "prefix_gate": torch.zeros(1, 1)}
    stack["prefix_new_gate"] = torch.zeros(1)
    ours = {n: p.requires_grad for n, p in model.named_parameters()}
    stated = {n: stack.get(n.removeprefix("llma."), torch.zeros(1)) for n in names}
    theirs = rename({n: t for n, t in stated.items() if n in groups}, layers)
    c.equal(f"{case['llama_type']} trainable", sorted(n for n, on in ours.items() if on), sorted(theirs))
    c.equal(f"{case['llama_type']} all", sorted(ours), sorted(rename(stated, layers)))


def groups_by_pattern() -> bool:
    """Whether a lower layer can learn more slowly than a higher one."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    optimizer = Optimizer(model, config(groups=(GroupConfig("layers.0.*", lr_scale=0.5),)))
    return {scale for _, scale, _ in optimizer.groups} == {0.5, 1.0}


def epoch(folder: Path, case: dict[str, Any], c: Comparison) -> None:
    """One epoch: losses, rates and norms of every iteration, and the trained parameters."""
    if case["llama_type"] not in TYPES:
        raise UnsupportedError(f"there is no importer of {case['llama_type']} yet")
    io, log = load_file(folder / "io.safetensors"), json.loads((folder / "log.json").read_text())["per_iteration"]
    h, net, n = case["hyper_parameters"], wrapped(folder, case), case["n_iter"]
    limit = h["clip_grad"] if h["clip_grad"] > 0 else None
    optimizer = Optimizer(net, config(weight_decay=h["weight_decay"], clip_norm=limit))
    objective = DialogueObjective(ObjectiveConfig(), from_gguf(NO_WORDS))
    net.train()
    norm, lr = 0.0, 0.0
    for i in range(n):
        if i % h["accum_iter"] == 0:
            lr = warm_cosine(i / n, h["lr"], h["min_lr"], h["warmup_epochs"], h["epochs"])
        total, count, metrics = objective(net, batch(io, i))
        loss = total / count
        (loss / h["accum_iter"]).backward()
        optimizer.collect()
        if (i + 1) % h["accum_iter"] == 0:
            optimizer.gradients()
            norm = float(optimizer.clip()[0])
            optimizer.step(lr)
        row = log[str(i)]
        c.tensor("closs", torch.as_tensor(metrics["language"]) / count, torch.tensor(row["closs"]))
        if "load_balancing" in row:  # logged with its weight once, minimised with its weight twice
            added = row["load_balancing"] * case["args"].get("load_balancing_weight", 0.1)
            c.tensor("load_balancing", torch.as_tensor(metrics["router"]) / count, torch.tensor(added))
        c.tensor("lr", torch.tensor(lr / h["lr"]), torch.tensor(row["lr"] / h["lr"]))
        if "grad_norm" in row:
            c.tensor("grad_norm", torch.tensor(norm), torch.tensor(row["grad_norm"]))
    compare_final(net, io, c)
    if h["accum_iter"] > 1:
        c.deviates("accumulation", h["accum_iter"] > 1, True, MEAN)


NO_WORDS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}


def batch(io: dict[str, Tensor], i: int) -> Batch:
    """The batch of an iteration in our terms; the reference cuts off columns that have no label behind them."""
    ids, labels = io.pop(f"in.iter{i}.examples"), io.pop(f"in.iter{i}.labels")
    end = 1 + int(labels.any(0).nonzero().max())
    ids, labels = ids[:, :end], labels[:, :end]
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, labels.masked_fill(labels == 0, IGNORE), mask, torch.zeros(0, 3, 1, 1))


def compare_final(net: MLLM, io: dict[str, Tensor], c: Comparison) -> None:
    """The trained parameters after the epoch."""
    ours = {n: p for n, p in net.backbone.named_parameters() if p.requires_grad}
    final = rename({n.removeprefix("out.final."): io.pop(n) for n in list(io)}, net.backbone.config.n_layers)
    c.equal("trained names", sorted(ours), sorted(final))
    for name in sorted(final.keys() & ours.keys()):
        c.tensor("final", ours[name], final[name])


HANDLERS: dict[str, Handler] = {
    "accessory.util.lr_sched.adjust_learning_rate and adjust_learning_rate_epoch": rates,
    "accessory.util.clip_grad.clip_grad_norm on an FSDP(use_orig_params) CPU module": clipping,
    "accessory.util.misc.add_weight_decay on MetaModel (the grouping the training scripts use); "
    "accessory.util.param_group.make_param_groups (unused by the scripts)": decayed,
    "accessory.engine_finetune.train_one_epoch on MetaModel": epoch,
}
"""By the reference class that the case was computed with."""
