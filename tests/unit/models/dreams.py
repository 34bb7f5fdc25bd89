"""Small bridges on small random backbones, and small denoisers that read their conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.diffusion.flag_dit import FlagDiT, FlagDiTConfig
from accessory.models.connector import ConnectorConfig
from accessory.models.dream import Dream, DreamConfig, TapConfig
from accessory.models.dream_presets import PRESETS
from accessory.models.dream_spans import DreamSpan
from accessory.models.mllm import MLLM
from accessory.vision.projector import Projector
from accessory.vision.tower import Tower, VisionTokens

VOCAB, BOS, DIM = 40, 1, 32
M = TypeVar("M", bound=nn.Module)


class Eyes(Tower):
    """Four quarters of a tile of 4 pixels, their colours as features."""

    def __init__(self) -> None:
        super().__init__(4, 3, (2, 2), (0.0,) * 3, (1.0,) * 3)

    def encode(self, pixels: Tensor) -> VisionTokens:
        quarters = nn.functional.avg_pool2d(pixels, 2)
        return VisionTokens(None, quarters.flatten(2).transpose(1, 2), self.grid)


def randomised(module: M, std: float = 0.3, seed: int = 0) -> M:
    """Every parameter drawn anew, also those that start as zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return module


def backbone(**options: Any) -> Llama:
    sizes: dict[str, Any] = {"dim": DIM, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48}
    config = LlamaConfig(**(sizes | {"vocab_size": VOCAB, "max_length": 256} | options))
    return randomised(Llama(config), 0.15).requires_grad_(False).eval()


def mllm(*, eyes: bool = False, **options: Any) -> MLLM:
    tower = Eyes() if eyes else None
    projector = randomised(Projector(tower.groups, DIM, "linear"), 0.5) if tower else None
    return MLLM(backbone(**options), tower, projector).requires_grad_(False).eval()


def small(name: str, **changes: Any) -> DreamConfig:
    """A preset in sizes of the small backbone."""
    config = PRESETS[name]
    connector = replace(config.connector, width=24, depth=2, heads=2, num_tokens=6)
    heads = replace(config.heads, width=None if config.residual else 24, pooled=config.heads.pooled and 24)
    tap = config.tap if config.tap.layers == (None,) else replace(config.tap, layers=(-1, -2, -4))
    queries = min(config.num_queries, 5)
    made = replace(config, num_queries=queries, connector=connector, heads=heads, tap=tap, null_ids=(BOS,))
    return replace(made, **changes)


def dream(name: str = "default", *, net: MLLM | None = None, seed: int | None = 7, **changes: Any) -> Dream:
    """A bridge; with a ``seed`` its parameters are random, None leaves the initialisation."""
    torch.manual_seed(3)
    made = Dream(net or mllm(), small(name, **changes))
    if seed is not None:
        frozen = {k: v.clone() for k, v in made.net.state_dict().items()}
        randomised(made, seed=seed)
        made.net.load_state_dict(frozen)
    return made.eval()


def both() -> TapConfig:
    return TapConfig(layers=(None, -3), mix="concat", norm=True, positions="both")


def encoder() -> ConnectorConfig:
    return ConnectorConfig("encoder", width=24, depth=2, heads=2)


def text(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random texts behind BOS."""
    g = torch.Generator().manual_seed(seed)
    return [torch.cat((torch.tensor([BOS]), torch.randint(2, VOCAB, (n - 1,), generator=g))) for n in lengths]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows as a batch with its mask; the padding is a token that would matter."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 9), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, at], mask[i, at] = row, True
    return ids, mask


def document(bridge: Dream, *parts: Tensor | None) -> Tensor:
    """Parts one behind the other, a span for every None."""
    span = torch.tensor(DreamSpan(bridge.config.num_queries).ids())
    return torch.cat([span if part is None else part for part in parts])


def flag_dit(text_dim: int = DIM) -> FlagDiT:
    config = FlagDiTConfig(dim=32, n_layers=2, n_heads=4, multiple_of=8, latent_channels=3, text_dim=text_dim)
    return randomised(FlagDiT(config), 0.2).requires_grad_(False).eval()
