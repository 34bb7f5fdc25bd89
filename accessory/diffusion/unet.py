"""Denoisers of diffusers behind our contract: the UNets of SD 1.5, 2.1 and SDXL, and the transformers of SD3 and
Lumina-Image 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.diffusion.condition import Condition
from accessory.diffusion.denoiser import Latents, Prediction, Steering

Call = Callable[[Any, Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Needs:
    """What a network must be given.

    Attributes:
        channels: of the latents.
        seq: width C of the text features.
        pooled: width P of the pooled vector, None where there is none.
        sizes: whether it wants SDXL's six numbers.
        classes: number of classes of a label-conditional network.
    """

    channels: int
    seq: int
    pooled: int | None = None
    sizes: bool = False
    classes: int | None = None


@dataclass(frozen=True)
class _Kind:
    """How one class of diffusers is called: ``folder`` in a pipeline, whether it takes a mask, flow or not."""

    folder: str
    masked: bool
    flow: bool
    needs: Callable[[Any], Needs]
    call: Call


class DiffusersDenoiser(nn.Module):
    """One of diffusers' networks as a :class:`~accessory.diffusion.denoiser.Denoiser`.

    A network that takes no mask (SD3) is shown the real positions only: rows of one length run together. A list of
    latents of unequal sizes runs size by size.

    Args:
        net: a network of :data:`KINDS`.
        prediction: what its output means; flow networks are turned to our direction (velocity ``data - noise``, t = 0
            is noise), whichever their own is.
        frozen: parameters train not and dropout stays off; gradients still reach latents and condition.

    Raises:
        ValueError: for a network that we do not know or that wants what a :class:`Condition` has not.
    """

    net: Any

    def __init__(self, net: Any, prediction: Prediction, *, frozen: bool = True) -> None:
        super().__init__()
        name = type(net).__name__
        if name not in KINDS:
            raise ValueError(f"no adapter for {name}; there are {', '.join(KINDS)}")
        self._kind = KINDS[name]
        if (prediction == "flow") != self._kind.flow:
            raise ValueError(
                f"{name} does not predict {prediction!r}: {'flow only' if self._kind.flow else 'epsilon or v'}"
            )
        self.net = net
        self.needs = self._kind.needs(net.config)
        self.prediction: Prediction = prediction
        self.latent_channels = self.needs.channels
        self.frozen = frozen
        if frozen:
            net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DiffusersDenoiser:
        """A frozen network stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def forward(self, x: Latents, t: Tensor, condition: Condition, *, steering: Steering | None = None) -> Latents:
        """Prediction of the layout of ``x``: (B, C, H, W), or a list of (C, H, W), at times ``t`` (B,).

        Raises:
            ValueError: for a condition without the parts in ``needs``, of other widths or another batch, for a row of
                text without a real position, and for any steering: these networks have nothing to steer.
        """
        _refuse(steering)
        self._check(x, t, condition)
        groups = _groups(x, condition if not self._kind.masked else None)
        if isinstance(x, Tensor) and len(groups) == 1:
            return self._run(x, t, condition)
        outputs: list[Tensor] = [torch.empty(0)] * len(x)
        for rows in groups:
            some = torch.stack([x[i] for i in rows])
            for i, y in zip(rows, self._run(some, t[rows], condition[rows]), strict=True):
                outputs[i] = y
        return torch.stack(outputs) if isinstance(x, Tensor) else outputs

    def _run(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._kind.call(self.net, x, t, condition if self._kind.masked else _real(condition))

    def _check(self, x: Latents, t: Tensor, c: Condition) -> None:
        name, needs, batch = type(self.net).__name__, self.needs, len(x)
        if t.shape != (batch,) or len(c) != batch:
            raise ValueError(f"{batch} latents need {batch} times and conditions, got {tuple(t.shape)} and {len(c)}")
        for latent in [x] if isinstance(x, Tensor) else x:
            if latent.shape[-3] != needs.channels:
                raise ValueError(f"{name} takes latents of {needs.channels} channels, got {tuple(latent.shape)}")
        if c.seq is None or c.mask is None:
            raise ValueError(f"{name} needs text features: the condition has no seq")
        if c.seq.shape[-1] != needs.seq:
            raise ValueError(f"{name} takes text features of width {needs.seq}, the condition's have {c.seq.shape[-1]}")
        if empty := (~c.mask.any(1)).nonzero().flatten().tolist():
            raise ValueError(f"rows {empty} of the condition have no real position (an empty prompt still has its BOS)")
        if needs.pooled is not None and (c.pooled is None or c.pooled.shape[-1] != needs.pooled):
            found = "none" if c.pooled is None else f"one of {c.pooled.shape[-1]}"
            raise ValueError(f"{name} needs a pooled vector of width {needs.pooled}, the condition has {found}")
        if needs.sizes and c.sizes is None:
            raise ValueError(f"{name} needs sizes: original, crop and target, six numbers a picture")
        if needs.classes is not None and c.labels is None:
            raise ValueError(f"{name} needs labels (0 to {needs.classes - 1}), the condition has none")


def _refuse(steering: Steering | None) -> None:
    if steering is None:
        return
    plain = Steering()
    asked = [
        f.name
        for f in fields(Steering)
        if getattr(steering, f.name) is not getattr(plain, f.name)
        and (f.name == "region_condition" or getattr(steering, f.name) not in (getattr(plain, f.name), []))
    ]
    if asked:
        raise ValueError(f"a network of diffusers cannot be steered by {', '.join(asked)}")


def _groups(x: Latents, condition: Condition | None) -> list[list[int]]:
    """Rows that can run as one batch: of one size, and of one text length where a ``condition`` is given."""
    found: dict[tuple[object, ...], list[int]] = {}
    counts = [0] * len(x)
    if condition is not None and condition.mask is not None:
        counts = condition.mask.sum(1).tolist()
    for i, (row, count) in enumerate(zip(x, counts, strict=True)):
        found.setdefault((row.shape, count), []).append(i)
    return list(found.values())


def _real(c: Condition) -> Condition:
    """Conditions of equal counts of real positions without the others."""
    assert c.seq is not None
    assert c.mask is not None
    if bool(c.mask.all()):
        return c
    # (B, L, C) -> (sum of counts, C) -> (B, count, C)
    seq = c.seq[c.mask].unflatten(0, (len(c), -1))
    return Condition(seq, torch.ones_like(seq[..., 0], dtype=torch.bool), c.pooled, c.labels, c.sizes)


def leading(c: Condition) -> Condition:
    """The same rows with their real positions first: where a network takes the first n of a mask that has n."""
    assert c.seq is not None
    assert c.mask is not None
    if bool((c.mask.long().diff(dim=1) <= 0).all()):
        return c
    order = c.mask.long().argsort(dim=1, descending=True, stable=True)
    seq = c.seq.gather(1, order[..., None].expand_as(c.seq))
    return Condition(seq, c.mask.gather(1, order), c.pooled, c.labels, c.sizes)


# --- the networks -----------------------------------------------------------------------------------------------------


def _unet_needs(config: Any) -> Needs:
    widths = config.cross_attention_dim
    known = set(widths) if isinstance(widths, list | tuple) else {widths}
    odd = {
        "cross_attention_dim": None if len(known) == 1 else widths,
        "addition_embed_type": None if config.addition_embed_type == "text_time" else config.addition_embed_type,
        "out_channels": None if config.out_channels == config.in_channels else config.out_channels,
        **{k: config.get(k) for k in ("encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim")},
    }
    if wrong := [f"{k}={v!r}" for k, v in odd.items() if v is not None]:
        raise ValueError(f"this UNet wants what a condition does not have: {', '.join(wrong)}")
    added = config.addition_embed_type is not None
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim if added else None
    return Needs(config.in_channels, known.pop(), pooled, added, config.num_class_embeds)


def _unet(net: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    assert c.mask is not None
    added = net.config.addition_embed_type is not None
    return net(
        x,
        t,
        c.seq,
        class_labels=None if net.config.num_class_embeds is None else c.labels,
        # Without padding no mask is given: it would change nothing but the kernel, and with it the last bits.
        encoder_attention_mask=None if bool(c.mask.all()) else c.mask,
        added_cond_kwargs={"text_embeds": c.pooled, "time_ids": c.sizes} if added else None,
        return_dict=False,
    )[0]


def _sd3(net: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    # Its time runs from data (0) to noise (1000), and its velocity from data to noise.
    return -net(x, c.seq, c.pooled, (1 - t) * 1000, return_dict=False)[0]


def _lumina2(net: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    c = leading(c)
    return net(x, t, c.seq, c.mask, return_dict=False)[0]


KINDS: dict[str, _Kind] = {
    "UNet2DConditionModel": _Kind("unet", True, False, _unet_needs, _unet),
    "SD3Transformer2DModel": _Kind(
        "transformer",
        False,
        True,
        lambda c: Needs(c.in_channels, c.joint_attention_dim, c.pooled_projection_dim),
        _sd3,
    ),
    "Lumina2Transformer2DModel": _Kind(
        "transformer", True, True, lambda c: Needs(c.in_channels, c.cap_feat_dim), _lumina2
    ),
}


# --- folders ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path, names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The first of the sub-folders ``names`` (or ``folder`` itself) with a JSON configuration, and that.

    Raises:
        ValueError: when there is none.
    """
    for place in [*(folder / name for name in names), folder]:
        for file in ("config.json", "scheduler_config.json"):
            if (place / file).is_file():
                return place, json.loads((place / file).read_text(encoding="utf-8"))
    raise ValueError(f"{folder} holds no {' or '.join(f'{n}/' for n in names)} with a configuration")


def prediction_of(config: dict[str, Any]) -> Prediction:
    """What a network predicts by its scheduler's configuration, as diffusers reads it.

    Raises:
        ValueError: for a prediction that we do not have (``sample``).
    """
    if "FlowMatch" in str(config.get("_class_name", "")):
        return "flow"
    kinds: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}
    stated = config.get("prediction_type", "epsilon")  # configurations older than the option predict noise
    if stated not in kinds:
        raise ValueError(f"the scheduler's prediction_type {stated!r} is not one of {', '.join(kinds)}")
    return kinds[stated]


def load(
    folder: Path,
    *,
    prediction: Prediction | None = None,
    frozen: bool = True,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> DiffusersDenoiser:
    """The denoiser of a local folder that diffusers wrote: a whole pipeline, or its ``unet`` or ``transformer`` alone.

    Only safetensors are read. ``prediction`` None asks the scheduler beside the network, which is what tells SD 2.1
    at 768 pixels (v) from its base (epsilon). ``variant``: the middle of the file names, ``fp16`` for instance.

    Raises:
        ValueError: for a folder without a network that we know, without safetensors, or without a scheduler to say
            what is predicted.
    """
    import diffusers

    folder = Path(folder)
    place, config = read_config(folder, ("unet", "transformer"))
    name = config.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"{place} holds a {name}; there are adapters for {', '.join(KINDS)}")
    if prediction is None:
        root = folder if place != folder else folder.parent
        if not (root / "scheduler" / "scheduler_config.json").is_file():
            raise ValueError(f"{root} has no scheduler that says what {name} predicts; state the prediction")
        prediction = prediction_of(read_config(root, ("scheduler",))[1])
    try:
        net = getattr(diffusers, name).from_pretrained(
            place, torch_dtype=dtype, use_safetensors=True, local_files_only=True, variant=variant
        )
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error}") from None
    return DiffusersDenoiser(net, prediction, frozen=frozen)
