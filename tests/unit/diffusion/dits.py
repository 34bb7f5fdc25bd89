"""Small diffusion transformers with random weights, and conditions for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accessory.diffusion.condition import Condition
from accessory.diffusion.dit_config import Experts, FlagDiTConfig
from accessory.diffusion.flag_dit import FlagDiT

FLAG = FlagDiTConfig(dim=48, n_layers=2, n_heads=4, multiple_of=16, text_dim=20)
NEXT = replace(FLAG, norms="sandwich", final_shift=False, eol_token=False, rope_axes=2, n_kv_heads=2)
LABEL = replace(FLAG, text_dim=None, num_classes=5, eol_token=False, pad_token=False)
NEXT_LABEL = replace(LABEL, norms="post", rope_axes=2)
KINDS = {
    "flag": FLAG,
    "flag_plain_qk": replace(FLAG, qk_norm=False),
    "large_t2i": replace(FLAG, prediction="epsilon", keep_sigma=True, fixed_length=60),
    "next": NEXT,
    "next_mha": replace(NEXT, n_kv_heads=None),
    "label": LABEL,
    "next_label": NEXT_LABEL,
    "moe_time": replace(NEXT_LABEL, experts=Experts(time=4)),
    "moe_space": replace(NEXT_LABEL, experts=Experts(space=4)),
    "moe_both": replace(NEXT_LABEL, experts=Experts(time=3, space=4)),
    "video": replace(FLAG, rope_axes=3, eof_token=True),
    "text_and_label": replace(NEXT, num_classes=5),
}


def randomised(config: FlagDiTConfig, seed: int = 0) -> FlagDiT:
    """A model none of whose parameters is zero or one."""
    torch.manual_seed(seed)
    model = FlagDiT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.5 if name.endswith("gate") else 0.15)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return model


def told(config: FlagDiTConfig, batch: int, length: int = 7, seed: int = 1) -> Condition:
    """Text of unequal lengths, labels, or both."""
    torch.manual_seed(seed)
    labels = None if config.num_classes is None else torch.arange(batch) % (config.num_classes + 1)
    if config.text_dim is None:
        return Condition(labels=labels)
    mask = torch.arange(length) < torch.tensor([length - i % 4 for i in range(batch)])[:, None]
    return Condition(seq=torch.randn(batch, length, config.text_dim), mask=mask, labels=labels)


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Seeded latents."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()
