"""The diffusion transformers: Flag-DiT, Large-DiT, Next-DiT and their audio relatives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Steering
from accessory.diffusion.dit_config import Experts
from accessory.diffusion.dit_rotary import rotary_table, spectrum
from accessory.diffusion.flag_dit import FlagDiT
from tools.conform import dit_variants
from tools.conform.comparison import Comparison, Handler
from tools.conform.dit_common import (
    IO,
    build,
    forward,
    guided,
    left_over,
    stretched,
    table_1d,
    table_2d,
    texts,
)


def list_case(model: FlagDiT, io: IO, c: Comparison) -> None:
    """Latents of unequal sizes, then the tensor of equal ones, under the same text."""
    condition, t = texts(io, "list"), io.pop("list.in.t")
    x = [io.pop(f"list.in.x.{i}") for i in range(2)]
    with torch.no_grad():
        h, where = model.tokens(x)
    mask = where.mask
    if "list.mid.token_mask" in io:
        assert mask is not None
        c.equal("token_mask", mask.long().tolist(), io.pop("list.mid.token_mask").tolist())
    c.tensor("tokens_padded", h, io.pop("list.mid.tokens_padded"))
    if "list.mid.freqs_cis" in io:
        k = model.config
        waves = spectrum(k.head_dim, 2, k.rope_theta, t)
        c.tensor(
            "list.freqs_cis",
            torch.view_as_real(rotary_table(where.coords[..., 1:], waves)),
            io.pop("list.mid.freqs_cis"),
        )
    for i, y in enumerate(forward(model, io, "list.", c, x, t, condition, mask)):
        c.tensor(f"list.out.{i}", y, io.pop(f"list.out.{i}"))
    x_equal = io.pop("tensor.in.x")
    y = forward(model, io, "tensor.", c, x_equal, t, condition)
    assert isinstance(y, Tensor)
    c.tensor("tensor.out", y, io.pop("tensor.out"))
    if "ctor_scaled.out" in io:
        options = {"rope_linear": io["ctor.linear"].item(), "rope_ntk": io["ctor.ntk"].item()}
        with torch.no_grad():
            y = stretched(model, **options)(x_equal, t, condition)
        c.tensor("ctor_scaled.out", y, io.pop("ctor_scaled.out"))
    for name in ("ctor.linear", "ctor.ntk"):
        io.pop(name, None)


def flag_t2i(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Flag-DiT with text: lists, tensors, guided calls under every rotary scaling."""
    io = load_file(folder / "io.safetensors")
    model = build(load_file(folder / "weights.safetensors"), config["constructor"])
    linear, ntk, base = config["rope_scaling_factor"], config["ntk_factor"], config["base_seqlen"]
    io |= {"ctor.linear": torch.tensor(linear), "ctor.ntk": torch.tensor(ntk)}
    list_case(model, io, c)
    c.tensor("freqs_cis", table_1d(model, 12), io.pop("rope.freqs_cis_default_0_12"))
    c.tensor("freqs_cis_linear", table_1d(model, 12, linear=linear), io.pop("cfg.mid.freqs_cis_linear"))
    c.tensor("freqs_cis_ntk", table_1d(model, 12, ntk=ntk), io.pop("cfg.mid.freqs_cis_ntk"))
    condition, x, t = texts(io, "cfg"), io.pop("cfg.in.x"), io.pop("cfg.in.t")
    c.equal("sequence length", model.tokens(x)[1].length, config["seq_len_cfg"])
    both = stretched(model, rope_linear=linear, rope_ntk=ntk)
    proportional = Steering(base_tokens=base)
    # The reference keeps factors that a call has set until another sets them; here they belong to one call.
    cases: dict[str, tuple[FlagDiT, Steering]] = {
        "plain": (model, Steering()),
        "scale1": (model, Steering()),
        "proportional": (model, proportional),
        "rope_linear": (model, Steering(rope_scale=linear, rope_method="linear")),
        "rope_ntk": (model, Steering(rope_scale=ntk, rope_method="ntk")),
        "rope_both_prop": (both, proportional),
        "sticky_after_override": (both, Steering()),
    }
    for name, (net, steering) in cases.items():
        scale = 1.0 if name == "scale1" else config["cfg_scale"]
        y = guided(net, x, t, condition, scale, steering)
        c.tensor(f"cfg.{name}", y, io.pop(f"cfg.out.{name}"))
    left_over(io, c)


def next_t2i(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Next-DiT with text, with the time-aware switch and proportional attention."""
    io = load_file(folder / "io.safetensors")
    model = build(load_file(folder / "weights.safetensors"), config["constructor"])
    scale, shed, base = config["scale_factor"], config["scale_watershed"], config["base_seqlen"]
    io |= {"ctor.linear": torch.tensor(1.0), "ctor.ntk": torch.tensor(scale)}
    list_case(model, io, c)
    aware = Steering(rope_scale=scale, watershed=shed)
    width, shape = model.config.head_dim, (5, 6)
    early, late = io.pop("cfg.in.t_early"), io.pop("cfg.in.t_late")
    tables = {
        "rope.freqs_cis_default_5x6": (Steering(), 1.0),
        "ctor_scaled.mid.freqs_cis_5x6": (replace(aware, rope_method="ntk"), 1.0),
        "cfg.mid.freqs_cis_timeaware_early_5x6": (aware, float(early[0])),
        "cfg.mid.freqs_cis_timeaware_late_5x6": (aware, float(late[0])),
        "cfg.mid.freqs_cis_at_watershed_5x6": (replace(aware, watershed=0.25), 0.25),
    }
    for name, (steering, time) in tables.items():
        c.tensor(name, table_2d(width, shape, steering, time), io.pop(name))
    condition, x = texts(io, "cfg"), io.pop("cfg.in.x")
    c.equal("sequence length", model.tokens(x)[1].length, config["seq_len_cfg"])
    cases = {
        "plain_early": (early, Steering()),
        "plain_late": (late, Steering()),
        "proportional_late": (late, Steering(base_tokens=base)),
        "timeaware_early": (early, aware),
        "timeaware_late": (late, aware),
        "timeaware_late_prop": (late, replace(aware, base_tokens=base)),
        "watershed1_late": (late, replace(aware, watershed=1.0)),
    }
    for name, (t, steering) in cases.items():
        y = guided(model, x, t, condition, config["cfg_scale"], steering)
        c.tensor(f"cfg.{name}", y, io.pop(f"cfg.out.{name}"))
    left_over(io, c)


def large_t2i(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Large-DiT with text: fixed padding that is not masked, all channels kept."""
    io = load_file(folder / "io.safetensors")
    k = config["constructor"]
    known: dict[str, Any] = {"prediction": "epsilon", "keep_sigma": True, "fixed_length": k["max_seq_len"]}
    model = build(load_file(folder / "weights.safetensors"), k, rope_linear=k["rope_scaling_factor"], **known)
    list_case(model, io, c)
    y = guided(model, io.pop("cfg.in.x"), io.pop("cfg.in.t"), texts(io, "cfg"), config["cfg_scale"])
    c.tensor("cfg", y, io.pop("cfg.out"))
    left_over(io, c)


def label_case(folder: Path, config: dict[str, Any], c: Comparison) -> None:
    """Label-conditional models of all kinds, with experts and without."""
    io = load_file(folder / "io.safetensors")
    name = config["reference_class"]
    known: dict[str, Any] = {}
    if name.startswith("Large"):
        known = {"prediction": "epsilon", "keep_sigma": True}
    if name.startswith("Next-DiT-MoE") and "both" not in name:
        # In a case this small the gate's width does not show what it looks at.
        route = "time" if "time" in name else "space"
        known = {"experts": Experts(**{route: config["experts"]}, top=config["experts_per_token"])}
    model = build(load_file(folder / "weights.safetensors"), config["constructor"], **known)
    c.equal("null class", model.config.num_classes, config["null_class"])
    y = forward(model, io, "", c, io.pop("in.x"), io.pop("in.t"), Condition(labels=io.pop("in.y")))
    assert isinstance(y, Tensor)
    c.tensor("out", y, io.pop("out"))
    x, t, condition = io.pop("cfg.in.x"), io.pop("cfg.in.t"), Condition(labels=io.pop("cfg.in.y"))
    half = torch.cat([x[: len(x) // 2]] * 2)
    forward(model, io, "cfg.", c, half, t, condition)
    linear, ntk = config["rope_scaling_factor"], config["ntk_factor"]
    nets = {"plain": {}, "scale1": {}, "rope_linear": {"rope_linear": linear}, "rope_ntk": {"rope_ntk": ntk}}
    nets["rope_both"] = nets["rope_linear"] | nets["rope_ntk"]
    for variant, options in nets.items():
        if f"cfg.out.{variant}" in io:
            net = stretched(model, **options) if options else model
            y = guided(net, x, t, condition, 1.0 if variant == "scale1" else config["cfg_scale"])
            c.tensor(f"cfg.{variant}", y, io.pop(f"cfg.out.{variant}"))
    left_over(io, c)


HANDLERS: dict[str, Handler] = {
    **dit_variants.HANDLERS,
    "lumina_t2i DiT_Llama (Flag-DiT with text)": flag_t2i,
    "lumina_next_t2i NextDiT": next_t2i,
    "lumina_next_t2i_mini NextDiT": next_t2i,
    "Large-DiT-T2I DiT_Llama": large_t2i,
    "Next-DiT-ImageNet DiT_Llama (sandwich norm, 2-D rope)": label_case,
    "Flag-DiT-ImageNet DiT_Llama": label_case,
    "Large-DiT-ImageNet DiT_Llama": label_case,
    "Next-DiT-MoE DiT_Llama (time)": label_case,
    "Next-DiT-MoE DiT_Llama (space)": label_case,
    "Next-DiT-MoE DiT_Llama (both)": label_case,
}
"""By the reference class that the case was computed with, or by the case's name where it has none."""
