"""Every stage of training that an experiment file describes, on tiny parts: DreamLLM's three, ChatIllusion's two, our
denoiser and the bridge on it. What is large in a stage (networks, pictures, steps) is replaced; its objective, its
tuning, its optimizer and where it starts are those of the file."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from accessory import config as configuration
from accessory.data.tiling import TilingConfig
from accessory.diffusion.latents import FAMILIES
from accessory.diffusion.sampler import Ancestral, SamplerSettings
from accessory.diffusion.time_grid import Grid
from accessory.models.build import TowerSource
from accessory.models.connector import ConnectorConfig, HeadsConfig
from accessory.models.dream_presets import PRESETS
from accessory.models.generator import GeneratorConfig, load_generator
from accessory.models.generator_config import DreamSource, FlagDiTSource, TextSource, VaeSource
from accessory.peft.attach import LoraSpec
from accessory.train.generator_run import GeneratorRunConfig, run
from tests.structure.source import ROOT
from tests.tiny import tiny_config, tiny_tokenizer
from tests.tiny_generator import DREAM, LEARNER, PROFILE, SETTINGS, write_captions

STAGES = (
    "dreamllm_stage1", "dreamllm_stage2", "dreamllm_stage3", "chatillusion_stage1", "chatillusion_stage2",
    "nano_dit", "nano_dream",
)  # fmt: skip
WIDTH, SIDE, LIMIT = 24, 32, 60.0
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = SamplerSettings(Ancestral(), Grid(points=3))


def write_data(folder: Path) -> Path:
    """Captions, and dialogues in which the answer is a picture and a word about it."""
    write_captions(folder, 4)
    rows: list[dict[str, Any]] = []
    for name in ("red", "blue"):
        shown = [{"type": "image_url", "image_url": {"url": f"{name}.png"}}, {"type": "text", "text": "There."}]
        asked = {"role": "user", "content": f"Draw a {name} hat."}
        rows.append({"messages": [asked, {"role": "assistant", "content": shown}]})
    (folder / "drawn.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = folder / "data.yaml"
    path.write_text(
        "sources:\n  - {kind: captions, path: captions.jsonl, columns: {image: file, caption: text}}\n"
        "  - {kind: messages, path: drawn.jsonl}\n"
    )
    return path


def write_decoder(folder: Path, sdxl: bool) -> None:
    """A network and a VAE as diffusers writes them, of the smallest sizes that have all parts."""
    torch.manual_seed(5)
    more: dict[str, Any] = {}
    if sdxl:
        # The pooled vector, and six numbers in four channels each.
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": WIDTH + 24,
        }  # fmt: skip
    diffusers.UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, **more,
    ).save_pretrained(folder / "unet")  # fmt: skip
    family = FAMILIES["sdxl" if sdxl else "sd"]
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=4, latent_channels=family.channels,
        scaling_factor=family.scale, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip


def shrunk(name: str, given: GeneratorConfig, folder: Path) -> GeneratorConfig:
    """The generator of a stage with tiny parts in the places of its own."""
    model = replace(
        tiny_config(tiny_tokenizer(folder / "words")),
        tower=TowerSource(preset="tiny-clip", weights=None),
        tiling=TilingConfig(size=32),
    )
    if name == "nano_dit":
        text, denoiser = TextSource(PROFILE, model), FlagDiTSource(replace(LEARNER, latent_channels=48))
        return replace(given, denoiser=denoiser, conditioner=text, size=SIDE)
    assert isinstance(given.conditioner, DreamSource)
    if name == "nano_dream":
        assert given.base == "runs/nano_dit/final"
        model = replace(model, tuning=(LoraSpec(rank=2),))
        return replace(given, base=str(folder / "nano_dit" / "final"), conditioner=DreamSource(model, DREAM, PROFILE))
    preset = given.conditioner.dream
    assert isinstance(preset, str)
    sdxl = preset == "chatillusion"
    bridge = PRESETS[preset]
    connector: ConnectorConfig = replace(bridge.connector, width=WIDTH, heads=2, num_tokens=6)
    heads: HeadsConfig = replace(bridge.heads, width=WIDTH, pooled=WIDTH) if sdxl else bridge.heads
    bridge = replace(bridge, num_queries=min(bridge.num_queries, 4), connector=connector, heads=heads)
    if sdxl:
        model = replace(model, tower=None, projector=None, tuning=())
    if not (folder / preset).exists():
        write_decoder(folder / preset, sdxl)
    weights = str(folder / preset)
    return replace(
        given,
        denoiser=replace(given.denoiser, source=weights),  # type: ignore[arg-type]
        codec=VaeSource(weights, "sdxl" if sdxl else "sd"),
        conditioner=DreamSource(model, bridge, PROFILE),
        size=SIDE,
    )


def stage(name: str, folder: Path) -> GeneratorRunConfig:
    """A stage's experiment file in two steps of two rows."""
    config = configuration.load(ROOT / "exps" / f"{name}.yaml", GeneratorRunConfig)
    start = None if config.init is None else str(folder / Path(config.init).parent.name / "final")
    train = replace(
        config.train, output_dir=str(folder / name), max_steps=2, batch_size=2, warmup_steps=1, log_every=1,
        checkpoint_every=1000, tensorboard=False, lr=max(config.train.lr, 1e-3),
    )  # fmt: skip
    return replace(
        config,
        train=train,
        data=replace(config.data, sources=str(folder / "data.yaml"), workers=0, window=1),
        generator=shrunk(name, config.generator, folder),
        init=start,
        cache=str(folder / "cache"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stages")
    write_data(made)
    return made


@pytest.mark.parametrize("name", STAGES)  # in this order: a stage begins where the one before it ended
def test_a_stage_runs_from_its_file_to_a_picture(name: str, folder: Path) -> None:
    check(name, folder, "cpu")


@NEEDS_GPU
def test_all_stages_on_one_gpu(tmp_path: Path) -> None:
    write_data(tmp_path)
    for name in STAGES:
        check(name, tmp_path, "cuda")


def check(name: str, folder: Path, device: str) -> None:
    """Run a stage and see what it left."""
    config = stage(name, folder)
    began = time.process_time()
    result = run(config, device=device)
    assert time.process_time() - began < LIMIT
    assert result is not None
    assert (result.step, result.reason) == (2, "steps")
    assert result.final == folder / name / "final"
    losses = [v for k, v in result.row.items() if k in ("loss", "language", "diffusion")]
    assert len(losses) == (2 if config.objective.loss is None else 3)
    assert all(math.isfinite(v) for v in losses)
    assert result.row["diffusion"] > 0
    state = load_file(result.final / "trainable.safetensors")
    named = [k for k in state if any(fnmatchcase(k, p) for p in config.generator.tuning)]
    assert named
    if config.init is not None:
        # What the stage before left, moved where this one trains and nowhere else.
        first = load_file(Path(config.init) / "trainable.safetensors")
        moved = {k for k, v in state.items() if k in first and not torch.equal(v, first[k])}
        assert moved
        assert moved <= set(named)
        assert len(moved) < len(first), "and something else stood still"
    if name == "nano_dream":
        return  # it ends in a folder that stands on another; the picture of that one is the next test's
    settings = SETTINGS if name == "nano_dit" else STEPS
    [picture] = load_generator(result.final).generate(["a red square"], seeds=[1], settings=settings)
    assert picture.size == (SIDE, SIDE)


def test_the_bridge_stands_on_the_stage_before(folder: Path) -> None:
    made, base = (load_generator(folder / name / "final") for name in ("nano_dream", "nano_dit"))
    own, others = dict(made.denoiser.named_parameters()), dict(base.denoiser.named_parameters())
    assert all(torch.equal(p, others[n]) for n, p in own.items())
    [picture] = made.generate(["a red square"], seeds=[1], settings=SETTINGS)
    assert picture.size == (SIDE, SIDE)
    other = folder / "nano_dit" / "final" / "trainable.safetensors"
    kept = other.read_bytes()
    try:
        other.write_bytes(kept[:-4] + b"\0\0\0\1")
        with pytest.raises(ValueError, match="is not the generator that this one was trained on"):
            load_generator(folder / "nano_dream" / "final")
    finally:
        other.write_bytes(kept)


def test_every_stage_is_here() -> None:
    drawing = {p.stem for p in (ROOT / "exps").glob("*.yaml") if "generator" in configuration.read(p)}
    assert drawing == set(STAGES)
