"""What the cases of the diffusion transformers share: models of a case, guided calls, intermediates, tables."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents, Steering
from accessory.diffusion.dit_rotary import rotary_table, spectrum
from accessory.diffusion.dit_weights import from_tensors, infer_config, published
from accessory.diffusion.flag_dit import FlagDiT
from tools.conform.comparison import Comparison

IO = dict[str, Tensor]
GUIDED = 3  # channels that the references guide


def build(weights: IO, constructor: dict[str, Any], **known: Any) -> FlagDiT:
    """A model of a case: its configuration comes from the shapes, the constructor only adds what they do not show."""
    heads = constructor.get("n_heads", constructor.get("num_heads"))
    known = {"n_heads": heads, "norm_eps": constructor.get("norm_eps", 1e-5)} | known
    state = published(weights)
    return from_tensors(state, infer_config(state, **known)).eval()


def stretched(model: FlagDiT, **options: Any) -> FlagDiT:
    """The same weights under another configuration."""
    return from_tensors(model.state_dict(), replace(model.config, **options)).eval()


def texts(io: IO, prefix: str) -> Condition:
    """The text condition of a part of a case."""
    return Condition(seq=io.pop(f"{prefix}.in.cap_feats"), mask=io.pop(f"{prefix}.in.cap_mask").bool())


@torch.no_grad()
def guided(
    model: FlagDiT, x: Tensor, t: Tensor, condition: Condition, scale: float, steering: Steering | None = None
) -> Tensor:
    """The references' guided call: [conditional; unconditional], the first half of ``x`` twice, three channels."""
    half = x[: len(x) // 2]
    y = model(torch.cat([half, half]), t, condition, steering=steering)
    assert isinstance(y, Tensor)
    cond, null = y[:, :GUIDED].chunk(2)
    mixed = null + scale * (cond - null)
    return torch.cat([torch.cat([mixed, mixed]), y[:, GUIDED:]], 1)


def recorded(model: FlagDiT, names: list[str], call: Callable[[], Latents]) -> tuple[Latents, IO]:
    """The result of a call, and the first output of every sub-module that is named."""
    seen: IO = {}
    hooks = []
    for name in names:

        def keep(_module: object, _inputs: object, output: Tensor, name: str = name) -> None:
            seen.setdefault(name, output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        out = call()
    for hook in hooks:
        hook.remove()
    return out, seen


def forward(
    model: FlagDiT,
    io: IO,
    prefix: str,
    c: Comparison,
    x: Latents,
    t: Tensor,
    condition: Condition,
    mask: Tensor | None = None,
) -> Latents:
    """One forward whose recorded intermediates are compared; ``mask`` (B, T) says which tokens are no junk."""
    names = [name.removeprefix(f"{prefix}mid.") for name in io if name.startswith(f"{prefix}mid.")]
    known = {"proj_in": "x_embedder"}
    ours = {name: known.get(name, name).replace("blocks.", "layers.") for name in names}
    if not model.config.qk_norm:
        # There the reference has one identity for queries and keys; what it recorded last are the keys.
        ours = {name: other.replace("q_norm", "wk") for name, other in ours.items()}
    out, seen = recorded(model, list(ours.values()), lambda: model(x, t, condition))
    for name in names:
        expected = io.pop(f"{prefix}mid.{name}")
        found = seen[ours[name]]
        found = found.reshape(expected.shape) if found.numel() == expected.numel() else found
        real = condition.mask if name.endswith("ky_norm") else mask
        if real is not None and expected.ndim == 3:
            found, expected = found[real], expected[real]
        c.tensor(prefix + name, found, expected)
    return out


def left_over(io: IO, c: Comparison) -> None:
    """Nothing of a case may be left out in silence."""
    rest = [name for name in io if ".in." not in name and not name.startswith("in.")]
    if rest:
        c.problems.append(f"nothing computes {', '.join(sorted(rest))}")


def table_1d(model: FlagDiT, length: int, linear: float = 1.0, ntk: float = 1.0) -> Tensor:
    """Rotary table (T, A/2, 2) of places in a sequence."""
    k = model.config
    waves = spectrum(k.head_dim, 1, k.rope_theta * ntk, torch.zeros(1)) / linear
    return torch.view_as_real(rotary_table(torch.arange(length)[None, :, None], waves))[0]


def table_2d(width: int, shape: tuple[int, int], steering: Steering, time: float = 1.0, length: int = 128) -> Tensor:
    """Rotary table (rows, columns, A/2, 2)."""
    axes = (torch.arange(shape[0]), torch.arange(shape[1]))
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)[None]
    waves = spectrum(width, 2, 10000.0, torch.tensor([time]), steering, length)
    return torch.view_as_real(rotary_table(places, waves))[0].unflatten(0, shape)
