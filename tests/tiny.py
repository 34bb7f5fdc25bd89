"""A whole model in milliseconds: random weights, a tokenizer made on the spot, no assets.

``tiny_model_dir(tmp_path)`` is a model folder that every ``--model DIR`` takes; ``tiny_model(tmp_path)`` is the built
model. The weights are random, so it babbles, but pictures, turns, templates and caches are those of a real one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from accessory.backbone.llama import LlamaConfig
from accessory.data import tokenizer as words
from accessory.data.tiling import TilingConfig
from accessory.models import build
from accessory.models.build import BackboneConfig, Model, ModelConfig, ProjectorConfig, TowerSource
from accessory.peft.attach import TrainSpec

CONTROL = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "What is this? This is a small red cat on a green hat. How many birds are there? There are three birds.",
    "user assistant system Human: Assistant: the picture shows a dog, a boat and two blue stars.",
    "Where is the apple? The apple is left of the pear. Read the word. The word is moon.",
]


def tiny_tokenizer(folder: Path) -> Path:
    """A byte-level BPE with ChatML's, LLaMA's and padding's control tokens; returns its ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def tiny_config(tokenizer_path: Path, *, template: str = "chatml_plain", grid: int = 1) -> ModelConfig:
    """Two blocks of width 32 over a tower of 64-pixel tiles and 4 tokens each; all of it trains and is saved."""
    return ModelConfig(
        backbone=BackboneConfig(
            source=None,
            llama=LlamaConfig(
                dim=32,
                n_layers=2,
                n_heads=4,
                n_kv_heads=2,
                vocab_size=words.load(tokenizer_path).vocab_size,
                ffn_dim=48,
                max_length=1024,
            ),
            tokenizer=str(tokenizer_path),
            dtype="fp32",
        ),
        tower=TowerSource(preset="tiny", weights=None),
        projector=ProjectorConfig(layers="linear_norm"),
        tuning=(TrainSpec(("backbone.*", "projector.*", "tower.*")),),
        template=template,
        tiling=TilingConfig(size=64, grid=grid),
        max_length=512,
    )


def tiny_model(tmp_path: Path, *, seed: int = 0, train: bool = False, **options: object) -> Model:
    """The built model; ``options`` replace fields of :func:`tiny_config`."""
    torch.manual_seed(seed)
    config = replace(tiny_config(tiny_tokenizer(tmp_path / "tokenizer")), **options)  # type: ignore[arg-type]
    model = build.build(config, train=True)
    if not train:
        model.net.requires_grad_(False).eval()
    return model


def tiny_model_dir(tmp_path: Path, *, seed: int = 0, **options: object) -> Path:
    """A model folder with every weight in it."""
    folder = tmp_path / "tiny"
    build.save(tiny_model(tmp_path, seed=seed, train=True, **options), folder)
    return folder


@torch.no_grad()
def disturb(net: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """Move everything that trains away from where it started (gates and deltas from zero)."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.add_(std * torch.randn(p.shape, generator=g))
