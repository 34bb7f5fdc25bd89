"""Pictures drawn at their own aspect: sizes, crops, and batches of unequal pictures."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from accessory import config as configuration
from accessory.data.collate import collate
from accessory.data.encode import DreamLayout
from accessory.data.image import to_tensor
from accessory.data.loader import Loader
from accessory.data.targets import target
from accessory.diffusion.buckets import Nearest, bucket_sizes
from accessory.models.conditioner import DreamConditioner
from accessory.models.dream_loss import DreamLossConfig
from accessory.models.dream_spans import NullPolicy
from accessory.schema import Encoded, Picture, Sample, Turn
from accessory.train.features import CachedFeatures
from accessory.train.generation import (
    DiffusionConfig,
    DiffusionObjective,
    GenerationConfig,
    JointObjective,
    targets_of,
)
from accessory.train.generator_run import GeneratorRunConfig, fitting, main_config
from tests.tiny_generator import SIZE, draw_config, draw_model, open_captions, shake

NEVER = DiffusionConfig(drop=NullPolicy(all=0.0))
SHAPES = {"wide": (48, 24), "tall": (20, 40), "square": (33, 33), "third": (40, 30)}


def write(folder: Path) -> Path:
    """One picture of every shape, each a gradient of its own, with its name as caption."""
    rows = []
    for i, (name, (width, height)) in enumerate(SHAPES.items()):
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        Image.fromarray(np.stack([x, y, np.full_like(x, 60 * i)], -1).astype(np.uint8)).save(folder / f"{name}.png")
        rows.append({"file": f"{name}.png", "text": f"a {name} hat"})
    path = folder / "shapes.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def loader(folder: Path, batch_size: int, fit: Nearest | None, workers: int = 0) -> Loader:
    return open_captions(write(folder), batch_size, fit, num_workers=workers)


def test_each_picture_gets_the_nearest_size(tmp_path: Path) -> None:
    fit = fitting(draw_model(tmp_path), 2.0)
    assert fit is not None
    assert {name: fit(*shape) for name, shape in SHAPES.items()} == {
        "wide": (20, 12), "tall": (12, 20), "square": (16, 16), "third": (16, 12),
    }  # fmt: skip
    write(tmp_path)
    for name, shape in SHAPES.items():
        made = target(Picture(str(tmp_path / f"{name}.png")), SIZE, fit=fit)
        width, height = fit(*shape)
        assert made.pixels.shape == (3, height, width)
        assert width * height <= SIZE * SIZE, "no picture costs more than the square"
        assert width % 4 == height % 4 == 0
        # The whole of one side is there, and the middle of the other: gradients say from where to where.
        left, right = (float(made.pixels[0, :, i].mean()) for i in (0, -1))
        top, bottom = (float(made.pixels[1, i].mean()) for i in (0, -1))
        assert min(left + 1 - right, top + 1 - bottom) < 0.1
        assert left == pytest.approx(1 - right, abs=0.05)
        assert top == pytest.approx(1 - bottom, abs=0.05)


def test_squares_are_what_they_were(tmp_path: Path) -> None:
    write(tmp_path)
    fit = fitting(draw_model(tmp_path), 2.0)
    square, wide = (Picture(str(tmp_path / f"{name}.png")) for name in ("square", "wide"))
    for shape in ("square", "wide", "tall"):
        image = Image.open(tmp_path / f"{shape}.png")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cut = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        made = target(Picture(str(tmp_path / f"{shape}.png")), SIZE)
        assert torch.equal(made.pixels, to_tensor(cut))
        key = hashlib.sha256(f"{SIZE} ".encode() + np.asarray(cut).transpose(2, 0, 1).tobytes()).hexdigest()[:32]
        assert made.key == key, "caches of yesterday name it"
    same, other = target(square, SIZE, fit=fit), target(wide, SIZE, fit=fit)
    assert torch.equal(same.pixels, target(square, SIZE).pixels)
    assert same.key == target(square, SIZE).key
    assert other.key != target(wide, SIZE).key
    assert fitting(draw_model(tmp_path), 1.0) is None


def test_a_batch_of_several_sizes_has_the_loss_of_each_picture_alone(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    shake(model.denoiser)
    fit = fitting(model, 2.0)
    objective = DiffusionObjective(NEVER, seed=5)
    batch = next(iter(loader(tmp_path, 4, fit)))
    targets = targets_of(batch)
    assert isinstance(targets.pixels, list)
    assert len({p.shape for p in targets.pixels}) == 4
    draws = objective.draw(model, targets)
    with torch.no_grad():
        together = objective.losses(model, targets, draws, objective.condition(model, targets, draws))
        singles = iter(loader(tmp_path, 1, fit))
        alone = torch.stack([objective(model, next(singles))[0] for _ in range(4)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(objective(model, batch)[0], alone.sum(), rtol=1e-5, atol=1e-6)
        # And it matters: squares of the same pictures lose something else, and the pictures differ from each other.
        squares = objective(model, next(iter(loader(tmp_path, 4, None))))[0]
    assert abs(float(squares - alone.sum())) > 1e-3
    assert float(alone.max() - alone.min()) > 1e-3


def test_pictures_of_one_length_and_two_shapes(tmp_path: Path) -> None:
    """Wide and tall have as many tokens: nothing has to be padded, and still each has its own places."""
    model = draw_model(tmp_path)
    shake(model.denoiser)
    wide, tall, t = torch.randn(12, 6, 10), torch.randn(12, 10, 6), torch.tensor([0.3, 0.3])
    condition = model.condition(["a hat", "a hat"])
    with torch.no_grad():
        made = model.denoiser([wide, tall], t, condition)
        alone = [model.denoiser(x[None], t[:1], condition[:1])[0] for x in (wide, tall)]
        wrong = model.denoiser(tall.view(1, 12, 6, 10), t[:1], condition[:1])[0]
    for a, b in zip(made, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert float((wrong.view(12, 10, 6) - alone[1]).abs().max()) > 1e-3


def test_gradients_of_unequal_sizes_are_those_of_the_singles(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    shake(model.denoiser)
    fit = fitting(model, 2.0)

    def gradients(batch_size: int) -> list[torch.Tensor]:
        model.zero_grad()
        batches, objective = iter(loader(tmp_path, batch_size, fit)), DiffusionObjective(NEVER, seed=5)
        for _ in range(4 // batch_size):
            objective(model, next(batches))[0].backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for n, p in model.denoiser.named_parameters() if p.grad is not None and "pad" not in n]

    for whole, part in zip(gradients(4), gradients(1), strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-3, atol=1e-5)


def test_workers_and_caches_carry_unequal_pictures(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    shake(model.denoiser)
    fit = fitting(model, 2.0)
    assert pickle.loads(pickle.dumps(fit)) == fit
    here, there = (targets_of(next(iter(loader(tmp_path, 4, fit, workers)))) for workers in (0, 1))
    assert here.keys == there.keys
    assert all(torch.equal(a, b) for a, b in zip(here.pixels, there.pixels, strict=True))
    batch = next(iter(loader(tmp_path, 4, fit)))
    features = CachedFeatures(model, tmp_path / "features", "tiny")
    with torch.no_grad():
        online = float(DiffusionObjective(NEVER, 0)(model, batch)[0])
        cached = DiffusionObjective(NEVER, 0, features)
        assert [float(cached(model, batch)[0]) for _ in range(2)] == pytest.approx([online] * 2, rel=1e-5)
    features.close()


def test_dialogues_draw_their_own_sizes_too(tmp_path: Path) -> None:
    write(tmp_path)
    model = draw_model(tmp_path, dream=True)
    shake(model.denoiser)
    assert isinstance(model.conditioner, DreamConditioner)
    own, fit = model.conditioner.model.encoder, fitting(model, 2.0)
    encoder = own.under(own.template, DreamLayout(3, SIZE, fit=fit))
    rows: list[Encoded] = []
    for i, name in enumerate(("wide", "tall")):
        said = Turn("assistant", (Picture(str(tmp_path / f"{name}.png")), "There."))
        row = encoder.encode(Sample((Turn("user", (f"a {name} hat",)), said)))
        rows.append(Encoded(row.ids, row.labels, row.tiles, "shapes", i, row.targets, draw=i))

    def loss(*which: Encoded) -> float:
        config = GenerationConfig(NEVER, DreamLossConfig(language=0.0, picture=1.0))
        with torch.no_grad():
            return float(JointObjective(config, seed=0)(model, collate(which, encoder.pad_id))[0])

    assert [tuple(r.targets[0].pixels.shape) for r in rows] == [(3, 12, 20), (3, 20, 12)]
    alone = [loss(row) for row in rows]
    assert loss(*rows) == pytest.approx(sum(alone), rel=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_an_experiment_file_asks_for_aspects(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "data.yaml").write_text(
        "sources:\n  - {kind: captions, path: shapes.jsonl, columns: {image: file, caption: text}}\n"
    )
    path = tmp_path / "experiment.yaml"
    path.write_text(
        configuration.dump({"generator": configuration.plain(draw_config(tmp_path))})
        + "data: {sources: data.yaml, workers: 0, window: 1}\n"
        + f"train: {{output_dir: {tmp_path}/run, max_steps: 1, lr: 1.0e-2, batch_size: 4, precision: fp32, "
        "log_every: 1, tensorboard: false}\n"
    )
    assert configuration.load(path, GeneratorRunConfig).data.aspects == 1.0
    losses = []
    for aspects in ("1.0", "2.0"):
        result = main_config(path, [f"data.aspects={aspects}", f"train.output_dir={tmp_path}/run{aspects}"])
        assert result is not None
        losses.append(result.row["diffusion"])
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"data\.aspects 0\.5 is a longer side"):
        configuration.load(path, GeneratorRunConfig, ["data.aspects=0.5"])
    with pytest.raises(ValueError, match=r"generator\.size 18: .*whole number of patches of 4"):
        main_config(path, ["data.aspects=2.0", "generator.size=18", f"train.output_dir={tmp_path}/odd"])
    assert (20, 12) in bucket_sizes(16, patch=4, max_aspect=2.0)
