"""The dream bridge: DreamLLM's assembly, losses, gradients and two-pass inference, and its projectors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory.backbone.hf import from_hf, from_hf_config, to_hf
from accessory.backbone.weights import from_tensors
from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents, Prediction, Steering
from accessory.diffusion.objective import loss
from accessory.diffusion.schedule import make_scheduler
from accessory.models.dream import Dream
from accessory.models.dream_loss import DreamLossConfig, language_loss
from accessory.models.dream_weights import fill, from_dreamllm, from_zoo, split_dreamllm
from accessory.models.mllm import MLLM
from accessory.nn.cache import Past
from accessory.nn.projection import Projection
from accessory.tokens import DREAM, DREAM_END, DREAM_START, IMAGE
from accessory.vision.projector import Projector
from accessory.vision.tower import Tower, VisionTokens
from tools.conform.comparison import Comparison, Handler

IO = dict[str, Tensor]


class Clip(Tower):
    """A CLIP vision transformer of the transformers library as DreamLLM reads it: the last but one layer, no class."""

    def __init__(self, sizes: dict[str, int], state: IO) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        side = sizes["size"] // sizes["patch"]
        super().__init__(sizes["size"], sizes["width"], (side, side), (0.0,) * 3, (1.0,) * 3)
        width, inner = sizes["width"], state["encoder.layers.0.mlp.fc1.bias"].shape[0]
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            image_size=sizes["size"],
            patch_size=sizes["patch"],
        )
        self.model: nn.Module = CLIPVisionModel(config).eval()
        inside = "vision_model." if any(k.startswith("vision_model.") for k in self.model.state_dict()) else ""
        self.model.load_state_dict({inside + k: v for k, v in state.items()})

    def encode(self, pixels: Tensor) -> VisionTokens:
        """Patches of the last layer but one."""
        seen = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return VisionTokens(None, seen[:, 1:], self.grid)


def assemble(folder: Path, config: dict[str, Any]) -> tuple[Dream, Tensor]:
    """The bridge of a case, and the matrix of its closed-form denoiser."""
    weights = load_file(folder / "weights.safetensors")
    table = weights.pop("stable_diffusion_head.V")
    files = split_dreamllm(weights)
    special = config["llm"]["special_tokens2ids_dict"]
    tokens = special["additional_special_tokens"]
    made = from_dreamllm(files, tokens["<dream_start>"], tokens["<dream_end>"], special["<s>"])
    stated = {k: v for k, v in config["llm"].items() if not k.startswith(("special_", "loss_", "log_", "use_"))}
    llama = from_hf_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **stated})
    backbone = from_tensors(llama, from_hf(llama, made.llm, str(folder)))
    clip = {
        k.removeprefix("clip_vision_model."): v
        for k, v in files["clip_vision_embedding"].items()
        if k.startswith("clip_vision_model.")
    }
    tower = Clip(config["vision"], clip)
    projector = Projector(tower.groups, llama.dim, "linear_norm" if config["post_layernorm"] else "linear")
    projector.load_state_dict(made.projector | {"skip": projector.skip.detach()})
    dream = Dream(MLLM(backbone, tower, projector), made.config)
    fill(dream, made.bridge, str(folder))
    return dream.eval().requires_grad_(False), table


def placeholders(ids: Tensor, config: dict[str, Any], patches: int, *, dreams: bool = True) -> Tensor:
    """The reference's ids with our placeholders for what it overwrites; without ``dreams`` its fillers stay text."""
    tokens = config["llm"]["special_tokens2ids_dict"]["additional_special_tokens"]
    ids = ids.clone()
    spans = [("<im_start>", patches, IMAGE)] + [("<dream_start>", config["n_queries"], DREAM)] * dreams
    for name, length, placeholder in spans:
        for row, column in (ids == tokens[name]).nonzero().tolist():
            ids[row, column + 1 : column + 1 + length] = placeholder
    if dreams:
        ids[ids == tokens["<dream_start>"]] = DREAM_START
        ids[ids == tokens["<dream_end>"]] = DREAM_END
    return ids


class Toy:
    """The case's closed-form denoiser in place of a UNet."""

    prediction: Prediction
    latent_channels = 4

    def __init__(self, table: Tensor, prediction_type: str) -> None:
        self.table = table
        self.prediction = "v" if prediction_type == "v_prediction" else "epsilon"

    def __call__(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Tensor:
        """Prediction (B, 4, rows, columns)."""
        assert isinstance(x, Tensor)
        assert condition.seq is not None
        told = (condition.seq @ self.table).mean(1)[:, :, None, None]
        return 0.5 * x + 0.1 * t[:, None, None, None] / 1000 + told * x.cos()


class Diffusion:
    """The diffusion loss of a case: this project's, and by formula where the reference has options that it has not."""

    def __init__(self, table: Tensor, config: dict[str, Any], io: IO) -> None:
        self.io, self.toy = io, Toy(table, config["prediction_type"])
        ends = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        kind = {"prediction_type": config["prediction_type"]}
        self.scheduler = make_scheduler("DDPMScheduler", {**ends, **kind})
        self.latents = io["in.latents_unscaled"] * config["vae_scaling_factor"]

    def loss(self, condition: Condition, options: dict[str, Any]) -> Tensor:
        """Mean squared error under a variant's options."""
        io, t = self.io, self.io["in.timesteps"]
        noise = io["in.noise"] + options.get("noise_offset", 0.0) * io["in.noise_offset_draw"]
        if not options.keys() & {"input_perturbation", "snr_gamma"}:
            return loss(self.toy, self.latents, condition, noise=noise, t=t, process=self.scheduler).mean()
        a = self.scheduler.alphas_cumprod[t][:, None, None, None]
        added = noise + options.get("input_perturbation", 0.0) * io["in.input_perturbation_noise"]
        v = self.toy.prediction == "v"
        target = a.sqrt() * noise - (1 - a).sqrt() * self.latents if v else noise
        out = self.toy(a.sqrt() * self.latents + (1 - a).sqrt() * added, t, condition)
        each = (out - target).square().mean((1, 2, 3))
        if gamma := options.get("snr_gamma"):
            snr = (a / (1 - a)).flatten() + v
            each = each * snr.clamp(max=gamma) / snr
        return each.mean()


def losses(
    dream: Dream, config: dict[str, Any], diffusion: Diffusion, made: Condition, lm: Tensor, c: Comparison
) -> None:
    """Both losses and their sum, for every variant of the case."""
    io = diffusion.io
    for name, options in config["variants"].items():
        condition = made
        if "drop_prob" in options:
            condition = made.where(io["in.drop_mask"].bool(), filler_null(dream, config))
        vm = diffusion.loss(condition, options)
        language, picture = options.get("w", (1.0, 10.0))
        scale = {"l1_norm": "l1", "l2_norm": "l2"}.get(options.get("schedule", ""), "none")
        total = DreamLossConfig(language, picture, scale).total(lm, vm)
        for part, value in (("lm_loss", lm), ("vm_loss", vm), ("loss", total)):
            c.tensor(f"{name}.{part}", value, io.pop(f"{name}.out.{part}"))
        if name == "base":
            gradients(dream, total, io, c)


def filler_null(dream: Dream, config: dict[str, Any]) -> Condition:
    """The reference's dropped condition: the states of filler tokens, for its queries are not inserted there."""
    special, n = config["llm"]["special_tokens2ids_dict"], config["n_queries"]
    tokens = special["additional_special_tokens"]
    row = [special["<s>"], tokens["<dream_start>"], *[tokens["<im_patch>"]] * n, tokens["<dream_end>"], special["</s>"]]
    states = dream.net(torch.tensor([row]))[:, 2 : 2 + n]
    return dream.connect({None: states}, {None: states[:, :0]}, torch.ones(1, 0, dtype=torch.bool))


def gradients(dream: Dream, total: Tensor, io: IO, c: Comparison) -> None:
    """Gradients of the total loss for the parameters that the case recorded, under the reference's names."""
    backbone = dream.net.backbone
    named = {f"net.backbone.{k}": p for k, p in backbone.named_parameters()}
    own = {
        "model.dream_embedding.dream_queries": "queries",
        "stable_diffusion_head.projector.projector.weight": "connector.body.layers.0.weight",
        "model.clip_vision_embedding.projector.projector.bias": "net.projector.visual_proj.0.bias",
    }
    everything = dict(dream.named_parameters())
    wanted = [*named.values(), *(everything[k] for k in own.values())]
    found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    llm = {
        k: torch.zeros_like(p) if g is None else g
        for (k, p), g in zip(backbone.named_parameters(), found[: len(named)], strict=True)
    }
    theirs = to_hf(backbone.config, llm) | dict(zip(own, found[len(named) :], strict=True))
    for key in [k for k in io if k.startswith("base.out.grad.")]:
        expected, ours = io.pop(key), theirs[key.removeprefix("base.out.grad.")]
        assert ours is not None
        c.tensor(key.replace(".out", ""), ours.reshape(expected.shape), expected)


def two_pass(dream: Dream, io: IO, c: Comparison) -> None:
    """Inference: the context once, then the span on its cache; the same in one pass; and unequal lengths together."""
    cached = Dream(dream.net, replace(dream.config, joint=False))
    cached.load_state_dict(dream.state_dict())
    contexts = {name: io[f"encode.in.ids_{name}"] for name in ("a", "b", "null")}
    for name, ids in contexts.items():
        expected = io.pop(f"encode.out.states_{name}")
        c.tensor(f"encode.states_{name}", in_one(dream, ids), expected)
        c.tensor(f"encode.states_{name} (cached)", on_cache(dream, ids), expected)
    expected = io.pop("encode.out.condition_a")
    for kind, bridge in (("one pass", dream), ("two passes", cached)):
        made = bridge.condition(contexts["a"]).seq
        assert made is not None
        c.tensor(f"encode.condition_a ({kind})", made, expected)
    padded_on_the_right(dream, contexts, io, c)


def padded_on_the_right(dream: Dream, contexts: IO, io: IO, c: Comparison) -> None:
    """Two unequal contexts as one batch: by our positions each is as if it were alone, by the reference's (which count
    on from the cache, padding included) the shorter one is not."""
    backbone, long, short = dream.net.backbone, contexts["a"], contexts["b"]
    ids = torch.cat((long, torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]))))
    mask = torch.arange(ids.shape[1]) < torch.tensor([[long.shape[1]], [short.shape[1]]])
    together, span = on_cache(dream, ids, mask), torch.tensor(dream.span.ids()).expand(2, -1)
    for row, ids_alone in enumerate((long, short)):
        c.tensor(f"encode.batched row {row}", together[row], on_cache(dream, ids_alone)[0])
    cache = backbone.cache(*ids.shape)
    backbone(dream.embed(ids), mask=mask, cache=cache)
    positions = torch.arange(ids.shape[1], ids.shape[1] + span.shape[1])[None]
    whole = torch.cat((mask, torch.ones_like(span, dtype=torch.bool)), 1)
    late = backbone(dream.embed(span), mask=whole, positions=positions, cache=Past(cache))[:, 1:-1]
    name = "encode.out.reference_batched_right_padded"
    c.tensor(name.replace(".out", ""), late, io.pop(name))


def in_one(dream: Dream, ids: Tensor) -> Tensor:
    """States (B, Q, D) at the queries behind a context, in one forward."""
    span = torch.tensor(dream.span.ids()).expand(len(ids), -1)
    return dream.read(torch.cat((ids, span), 1)).final[:, ids.shape[1] + 1 : -1]


def on_cache(dream: Dream, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same states from two forwards; ``mask`` (B, T) is False on padding."""
    cache = dream.net.backbone.cache(*ids.shape)
    dream.read(ids, mask=mask, cache=cache)
    span = torch.tensor(dream.span.ids()).expand(len(ids), -1)
    whole = None if mask is None else torch.cat((mask, torch.ones_like(span, dtype=torch.bool)), 1)
    return dream.read(span, mask=whole, cache=Past(cache)).final[:, 1:-1]


def assembly_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Insertion, states, logits, every loss variant, gradients, and inference."""
    dream, table = assemble(folder, config)
    net, io = dream.net, load_file(folder / "io.safetensors")
    patches = (config["vision"]["size"] // config["vision"]["patch"]) ** 2
    ids = placeholders(io["in.input_ids"], config, patches)
    mask, tiles = io["in.attention_mask"].bool(), io["in.images"]
    trained = (dream.queries, *dream.connector.parameters(), *net.backbone.parameters())
    for p in (*trained, *(net.projector or nn.Identity()).parameters()):
        p.requires_grad_(True)
    features = net.encode(tiles)
    c.tensor("image_features", features, io.pop("base.mid.image_features"))
    c.tensor("inputs_embeds", dream.embed(ids, features=features), io.pop("base.mid.inputs_embeds"))
    made = dream(ids, features=features, mask=mask)
    condition = made.condition
    assert condition is not None
    assert condition.seq is not None
    # Rows of padding are junk in the reference too.
    c.tensor("last_hidden", made.h[mask], io.pop("base.mid.last_hidden")[mask])
    rows, columns = dream.span.find(ids)
    at = columns[:, None] + 1 + torch.arange(dream.config.num_queries)
    c.tensor("condition_before_projector", made.h[rows[:, None], at], io.pop("base.mid.condition_before_projector"))
    c.tensor("condition", condition.seq, io.pop("base.mid.condition"))
    scores = dream.logits(made.h)
    c.tensor("logits", scores[mask], io.pop("base.out.logits")[mask])
    labels = io["in.labels"].masked_fill(io["in.labels"] == dream.trigger_id, DREAM_START)
    total, count = language_loss(scores, dream.targets(labels), dream.trigger_id)
    losses(dream, config, Diffusion(table, config, io), condition, total / count, c)
    c.tensor("eval_mode.loss", total / count, io.pop("eval_mode.out.loss"))
    with torch.no_grad():
        plain = placeholders(io["in.input_ids"], config, patches, dreams=False)
        filler = dream.logits(net(plain, features=features, mask=mask))
        c.tensor("no_target_images.logits", filler[mask], io.pop("no_target_images.out.logits_valid_rows")[mask])
        two_pass(dream, io, c)
    if left := [name for name in io if ".in." not in f".{name}"]:
        c.problems.append(f"nothing computes {', '.join(sorted(left))}")


@torch.no_grad()
def projectors_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Every projector of the zoo from its own keys."""
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    for name in sorted({k.split("/")[0] for k in weights}):
        mine = {k.removeprefix(f"{name}/"): v for k, v in weights.items() if k.startswith(f"{name}/")}
        kind, depth, layers = from_zoo(mine)
        hidden = (layers["layers.0.weight"].shape[0], layers["layers.1.weight"].shape[0]) if kind == "sam" else (1, 1)
        width = config["out_dim"]
        made = Projection(kind, config["in_dim"], width, depth=depth, bias="layers.0.bias" in layers, hidden=hidden)
        made.load_state_dict(layers)
        x = io["sam_worked.in.map"] if kind == "sam" else io["in.tokens"]
        c.tensor(name, made(x), io.pop(f"{name}.out"))
        if kind == "conv":
            spread = made(io["conv.in.vector"])
            c.equal("conv.from_vector tokens", spread.shape[1], 256)
            c.tensor("conv.from_vector", spread[:, :20], io.pop("conv.out.from_vector_first_20_of_256"))
    if left := [name for name in io if ".in." not in f".{name}"]:
        c.problems.append(f"nothing computes {', '.join(sorted(left))}")


HANDLERS: dict[str, Handler] = {
    "DreamLLM (inner model, causal head, dream embedding, CLIP embedding, diffusion head)": assembly_case,
    "DreamLLM projectors": projectors_case,
}
"""By the reference class that the case was computed with."""
