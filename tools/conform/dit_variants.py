"""The diffusion transformers beside their plain forwards: regions, diffusers, tables, gradients, audio, sizes."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Region, Steering
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.diffusion.dit_rotary import rotary_table, spectrum
from accessory.diffusion.dit_sizes import SIZES
from accessory.diffusion.dit_weights import infer_config, to_diffusers
from accessory.diffusion.flag_dit import FlagDiT
from tools.conform.comparison import Comparison, Handler
from tools.conform.dit_common import build, forward, guided, left_over, recorded, stretched, table_2d


def cells(rows: int, columns: int, order: list[int]) -> tuple[Region, ...]:
    """A grid of regions, row by row, with the prompts in ``order``."""
    found = []
    for i, row in enumerate(order):
        y, x = divmod(i, columns)
        found.append(Region((x / columns, y / rows, (x + 1) / columns, (y + 1) / rows), row))
    return tuple(found)


def regions_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Regional prompts: the intended map, and the released one with the cell that it gives to the wrong prompt."""
    io = load_file(folder / "io.safetensors")
    model = build(load_file(folder / "weights.safetensors"), config["constructor"])
    x, t, number = io.pop("in.x"), io.pop("in.t"), config["n_captions"]
    features, mask = io.pop("in.cap_feats"), io.pop("in.cap_mask").bool()
    whole, whole_mask = io.pop("in.global_cap_feats"), io.pop("in.global_cap_mask").bool()
    prompts = Condition(seq=features[:number], mask=mask[:number])
    both = Condition(seq=torch.cat([whole, features[number:]]), mask=torch.cat([whole_mask, mask[number:]]))
    vector = (whole * whole_mask[..., None]).sum(1) / whole_mask.sum(1, keepdim=True)
    # The released network gives the joined prompts to the negative row too; a condition's pooled vector can say so.
    shared = replace(both, pooled=vector.expand(2, -1))
    for rows, columns in config["grids"]:
        name = f"{rows}rows_{columns}cols"
        wrong = [(y + 1) * (x_ + 1) - 1 for y in range(rows) for x_ in range(columns)]
        for kind, order in (("intended", list(range(number))), ("reference", wrong)):
            parts = cells(rows, columns, order)
            found = torch.zeros(number + 1, model.tokens(x)[1].length, dtype=torch.long)
            found[number] = 1
            for region in parts:
                found[region.row] += model.tokens(x)[1].inside(region.box)[0]
            c.equal(f"{name}.mask_{kind}", found.tolist(), io.pop(f"{name}.region_mask_{kind}").long().tolist())
            s = Steering(regions=parts, region_condition=prompts, halves=2)
            y = guided(model, x, t, shared, config["cfg_scale"], s)
            c.tensor(f"{name}.{kind}_cfg", y, io.pop(f"{name}.out.{kind}_cfg"))
            if kind == "reference":
                continue
            with torch.no_grad():
                c.tensor(f"{name}.nocfg", model(x, t, shared, steering=s), io.pop(f"{name}.out.intended_forward_nocfg"))
            names = [n.removeprefix(f"{name}.mid.") for n in io if n.startswith(f"{name}.mid.")]
            half = torch.cat([x[:1], x[:1]])
            _, seen = recorded(model, names, lambda s=s, half=half: model(half, t, shared, steering=s))  # type: ignore[misc]
            for n in names:
                expected = io.pop(f"{name}.mid.{n}")
                c.tensor(f"{name}.{n}", seen[n][: len(expected)], expected)
            own = guided(model, x, t, both, config["cfg_scale"], s)
            c.tensor(f"{name}.own_negative", own, io.pop(f"{name}.out.intended_cfg_own_negative_vector"))
    left_over(io, c)


def diffusers_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Both outputs of the twin case, and the key map."""
    io = load_file(folder / "io.safetensors")
    weights = load_file(folder / "weights.safetensors")
    model = build(weights, config["constructor"])
    whole = stretched(model, keep_sigma=True)
    theirs = config["key_map_lumina_to_diffusers"]
    ours = to_diffusers(weights)
    c.equal("diffusers keys", sorted(ours), sorted(name for names in theirs.values() for name in names))
    for name, names in theirs.items():
        c.equal("key map", [torch.equal(ours[other], weights[name]) for other in names], [True] * len(names))
    x, t, condition = (
        io.pop("in.x"),
        io.pop("in.t"),
        Condition(seq=io.pop("in.cap_feats"), mask=io.pop("in.cap_mask").bool()),
    )
    for row in config["scaling"]:
        steering = Steering(rope_scale=row["scale_factor"], watershed=row["watershed"])
        # All rows at once: each picture switches by its own time, as the stored single calls do.
        for kind, net in (("lumina", model), ("diffusers_all8", whole)):
            with torch.no_grad():
                y = net(x, t, condition, steering=steering)
            for i in range(len(x)):
                c.tensor(f"{row['name']}.{kind}", y[i : i + 1], io.pop(f"{row['name']}.out.{kind}.{i}"))
    left_over(io, c)


TABLE = r"d(\d+)\.([12]d)\.(ntk_v\d|ntk|linear|interpolation|default|none)\.?(?:scale)?([\d.]+?)?(?:\.t([\d.]+))?"
METHODS: dict[str, Any] = {"interpolation": "linear", "ntk_v1": "ntk", "ntk_v2": "frequency", "ntk_v3": "time_smooth"}


def tables_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Rotary tables of one and two axes under every scaling."""
    io = load_file(folder / "io.safetensors")
    for name, expected in io.items():
        parts = re.fullmatch(TABLE, name)
        assert parts is not None, name
        width, kind, scale, time = int(parts[1]), parts[3], float(parts[4] or 1), float(parts[5] or 1)
        if parts[2] == "1d":
            waves = spectrum(width, 1, 10000.0 * (scale if kind == "ntk" else 1.0), torch.zeros(1))
            waves = waves / (scale if kind == "linear" else 1.0)
            places = torch.arange(len(expected))[None, :, None]
            c.tensor(name, torch.view_as_real(rotary_table(places, waves))[0], expected)
            continue
        steering = Steering() if kind in ("default", "none") else Steering(scale, METHODS[kind])
        shape = (expected.shape[0], expected.shape[1])
        c.tensor(name, table_2d(width, shape, steering, time, config["train_seq_len"]), expected)


def train_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Losses of unequal pictures and the gradients of all parameters."""
    io = load_file(folder / "io.safetensors")
    model = build(load_file(folder / "weights.safetensors"), config["constructor"]).train()
    t = io.pop("in.t")
    condition = Condition(seq=io.pop("in.cap_feats"), mask=io.pop("in.cap_mask").bool())
    noise, data = ([io.pop(f"in.x{k}.{i}") for i in range(len(t))] for k in (0, 1))
    y = model([time * b + (1 - time) * a for time, a, b in zip(t, noise, data)], t, condition)
    losses = torch.stack([(out - (b - a)).square().mean() for out, a, b in zip(y, noise, data)])
    c.tensor("loss_per_image", losses, io.pop("out.loss_per_image"))
    c.tensor("loss_mean", losses.mean(), io.pop("out.loss_mean"))
    losses.mean().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    c.equal("gradients", sorted(grads), sorted(n.removeprefix("out.grad.") for n in io if n.startswith("out.grad.")))
    for name, grad in grads.items():
        c.tensor(f"grad.{name}", grad, io.pop(f"out.grad.{name}"))
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    c.tensor("grad_global_l2_norm", norm, io.pop("out.grad_global_l2_norm"))
    left_over(io, c)


def audio_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """The one-axis relatives: forward, flow-matching loss, guided field and its Euler trajectory."""
    io = load_file(folder / "io.safetensors")
    k, weights = config["constructor"], load_file(folder / "weights.safetensors")
    known = {"rope_linear": k.get("rope_scaling_factor", 1.0), "rope_ntk": k.get("ntk_factor", 1.0), "time_steps": 1000}
    model = build(weights, k, norm_eps=config["effective"]["norm_eps"], **known)
    raw = stretched(model, time_steps=None)  # told the step itself
    text = io.pop("in.context")
    condition = Condition(seq=text, mask=torch.ones(text.shape[:2], dtype=torch.bool))
    x, t = io.pop("in.x"), io.pop("in.t")
    y = forward(raw, io, "", c, x, t, condition)
    assert isinstance(y, Tensor)
    c.tensor("out", y, io.pop("out"))
    noise, data, s = io.pop("train.in.noise"), io.pop("train.in.x1"), 1e-4
    time = (t / 1000)[:, None, None]
    noisy, target = time * data + (1 - (1 - s) * time) * noise, data - (1 - s) * noise
    c.tensor("train.x_noisy", noisy, io.pop("train.mid.x_noisy"))
    c.tensor("train.target", target, io.pop("train.mid.target"))
    with torch.no_grad():
        loss = (raw(noisy, t, condition) - target).square().mean()
    c.tensor("train.loss", loss, io.pop("train.out.loss"))
    null, z = io.pop("sample.in.uncond_context"), io.pop("sample.in.z")
    both = Condition(seq=torch.cat([text, null]), mask=torch.ones(2 * len(z), text.shape[1], dtype=torch.bool))

    @torch.no_grad()
    def field(x: Tensor, time: float, scale: float) -> Tensor:
        cond, null = model(torch.cat([x, x]), torch.full((2 * len(x),), time), both).chunk(2)
        return null + scale * (cond - null)

    for name, scale in (("cfg3", config["cfg_scale"]), ("nocfg", 1.0)):
        for key in [n for n in io if n.startswith(f"sample.out.{name}.velocity_at_t")]:
            c.tensor(key, field(z, float(key.rpartition("_t")[2]), scale), io.pop(key))
        points, states = torch.linspace(0, 1, config["euler_points"]), [z]
        for a, b in itertools.pairwise(points):
            states.append(states[-1] + (b - a) * field(states[-1], float(a), scale))
        c.tensor(f"{name}.euler_trajectory", torch.stack(states), io.pop(f"sample.out.{name}.euler_trajectory"))
    left_over(io, c)


# Names of the stored counts, and of the size here.
COUNTS = {
    "flag_t2i_5B_caption4096": "flag_t2i_5b",
    "flag_t2i_5B_caption5120": "flag_t2i_5b_caption5120",
    "flag_t2i_5B_caption2048": "flag_t2i_5b_caption2048",
    "next_t2i_2B_gqa_caption2048": "next_t2i_2b",
    "next_t2i_2B_mha_caption2048": "next_t2i_2b_mha",
    "next_compositional_2B_gqa_caption2048": "next_t2i_2b",
    "large_t2i_3B_caption4096": "large_t2i_3b",
} | {
    f"{kind}_imagenet_{size}": f"{kind}_imagenet_{size.lower()}"
    for kind, sizes in (("flag", "600M 3B 7B"), ("large", "600M 3B 7B"), ("next", "600M 2B 3B 7B"))
    for size in sizes.split()
} | {f"next_moe_600M_{kind}": f"next_moe_600m_{kind}" for kind in ("time", "time_gqa", "space", "both")}  # fmt: skip


def counts_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Parameters, tensors and shapes of full-size models, built without memory. The other rows are other families'."""
    rows = json.loads((folder / "config.json").read_text())["models"]
    for theirs, ours in COUNTS.items():
        row = rows[theirs]
        with torch.device("meta"):
            state = FlagDiT(SIZES[ours]).state_dict()
        c.equal(f"{theirs} parameters", sum(t.numel() for t in state.values()), row["parameters"])
        c.equal(f"{theirs} tensors", len(state), row["tensors"])
        shapes = {
            name: list(state[name].shape) if name in state else None
            for name in row["keys_of_index_0_and_outside_layers"]
        }
        c.equal(f"{theirs} shapes", shapes, row["keys_of_index_0_and_outside_layers"])
        seen: FlagDiTConfig = infer_config(state, n_heads=SIZES[ours].n_heads)
        c.equal(
            f"{theirs} inferred",
            (seen.hidden, seen.norms, seen.experts),
            (SIZES[ours].hidden, SIZES[ours].norms, SIZES[ours].experts),
        )


HANDLERS: dict[str, Handler] = {
    "lumina_next_compositional_generation NextDiT": regions_case,
    "diffusers LuminaNextDiT2DModel vs lumina_next_t2i_mini NextDiT": diffusers_case,
    "rope tables: lumina_t2i (1d), lumina_next_t2i_mini (2d), visual_anagrams variants": tables_case,
    "Flag-DiT T2I": train_case,
    "Next-DiT T2I": train_case,
    "lumina_audio/lumina_music FlagDiT (identical file in both trees) and CFM": audio_case,
    "lumina_audio/lumina_music FlagDiTv2 (identical file in both trees) and CFM": audio_case,
    "full_size_counts": counts_case,
}
"""By the reference class that the case was computed with, or by the case's name where it has none."""
