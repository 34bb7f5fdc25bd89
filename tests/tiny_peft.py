"""A tiny backbone inside a model, and the specs that the tests run over."""

import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.peft.attach import (
    BiasSpec,
    LoraSpec,
    NormSpec,
    PrefixSpec,
    ScaleSpec,
    TrainSpec,
    TuningSpec,
    attach,
)

CONFIG = LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=50)

# Every method by a readable name, with its variants.
METHODS: dict[str, TuningSpec] = {
    "lora": LoraSpec(rank=3),
    "lora_alpha": LoraSpec(rank=3, alpha=12.0, targets=("wq", "w2")),
    "prefix": PrefixSpec(length=5, layers=2),
    "prefix_raw": PrefixSpec(length=4, gate="raw"),
    "prefix_new_gate": PrefixSpec(length=4, layers=1, new_gate=True, init_std=0.5),
    "bias": BiasSpec(),
    "scale": ScaleSpec(targets=("wk", "wo", "w1")),
    "norm": NormSpec(),
    "train": TrainSpec(("projector.*", "backbone.layers.0.*.w?.weight")),
}


class Wrapped(nn.Module):
    """A backbone with a projector in front, as in a multimodal model."""

    def __init__(self, config: LlamaConfig = CONFIG) -> None:
        super().__init__()
        self.projector = nn.Linear(config.dim, config.dim)
        self.backbone = Llama(config)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.backbone.logits(self.backbone(self.projector(x), context=context))


def make(*specs: TuningSpec, config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Wrapped:
    """A seeded model with ``specs`` attached."""
    torch.manual_seed(1)
    model = Wrapped(config).to(dtype).eval()
    if specs:
        attach(model, specs)
    return model


def inputs() -> Tensor:
    """A fixed batch (2, 7, D)."""
    return torch.randn(2, 7, CONFIG.dim, generator=torch.Generator().manual_seed(2))
