"""Published sizes of the Lumina diffusion transformers: a size is a row."""

from __future__ import annotations

from dataclasses import replace

from accessory.diffusion.dit_config import Experts, FlagDiTConfig

FLAG_T2I = FlagDiTConfig()
LARGE_T2I = replace(FLAG_T2I, prediction="epsilon", keep_sigma=True, fixed_length=4224)
FLAG_LABEL = replace(FLAG_T2I, text_dim=None, num_classes=1000, eol_token=False, pad_token=False)
LARGE_LABEL = replace(FLAG_LABEL, prediction="epsilon", keep_sigma=True)
NEXT_T2I = FlagDiTConfig(
    dim=2304, n_layers=24, text_dim=2048, norms="sandwich", final_shift=False, eol_token=False, rope_axes=2
)
NEXT_LABEL = replace(FLAG_LABEL, norms="post", rope_axes=2)

_600M = {"dim": 1536, "n_layers": 16}
_2B = {"dim": 2304, "n_layers": 24}
_7B = {"dim": 4096, "n_layers": 32}


def _sized(base: FlagDiTConfig, size: dict[str, int]) -> FlagDiTConfig:
    return replace(base, dim=size["dim"], n_layers=size["n_layers"])


_MOE = _sized(NEXT_LABEL, _600M)

SIZES: dict[str, FlagDiTConfig] = {
    "flag_t2i_5b": FLAG_T2I,
    "flag_t2i_5b_caption5120": replace(FLAG_T2I, text_dim=5120),
    "flag_t2i_5b_caption2048": replace(FLAG_T2I, text_dim=2048),
    "large_t2i_3b": LARGE_T2I,
    "next_t2i_2b": replace(NEXT_T2I, n_kv_heads=8),
    "next_t2i_2b_mha": NEXT_T2I,
    "flag_imagenet_600m": _sized(FLAG_LABEL, _600M),
    "flag_imagenet_3b": FLAG_LABEL,
    "flag_imagenet_7b": _sized(FLAG_LABEL, _7B),
    "large_imagenet_600m": _sized(LARGE_LABEL, _600M),
    "large_imagenet_3b": LARGE_LABEL,
    "large_imagenet_7b": _sized(LARGE_LABEL, _7B),
    "next_imagenet_600m": _sized(NEXT_LABEL, _600M),
    "next_imagenet_2b": _sized(NEXT_LABEL, _2B),
    "next_imagenet_3b": NEXT_LABEL,
    "next_imagenet_7b": _sized(NEXT_LABEL, _7B),
    "next_moe_600m_time": replace(_MOE, experts=Experts(time=8)),
    "next_moe_600m_time_gqa": replace(_MOE, n_kv_heads=8, experts=Experts(time=8)),
    "next_moe_600m_space": replace(_MOE, experts=Experts(space=8)),
    "next_moe_600m_both": replace(_MOE, experts=Experts(time=4, space=4)),
}
"""By name. The number in a name is the published one, which is not the number of parameters."""
