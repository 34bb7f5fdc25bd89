"""Training to draw: what is lost, what is random, what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.data.collate import collate
from accessory.data.encode import DreamLayout, Encoder
from accessory.data.rows import RowRejected
from accessory.diffusion.condition import Condition
from accessory.diffusion.flag_dit import FlagDiT
from accessory.models.build import ResamplerConfig
from accessory.models.dream_loss import DreamLossConfig
from accessory.models.dream_spans import NullPolicy
from accessory.models.generator import Generator, build_generator
from accessory.models.text_encoder import TextEncoder
from accessory.parallel import groups
from accessory.peft.attach import PrefixSpec
from accessory.schema import Batch, Picture, Sample, Turn
from accessory.tokens import DREAM, DREAM_START, IGNORE
from accessory.train import checkpoint
from accessory.train.config import EmaConfig, TrainConfig
from accessory.train.features import CachedFeatures
from accessory.train.generation import (
    DiffusionConfig,
    DiffusionObjective,
    GenerationConfig,
    JointObjective,
    targets_of,
)
from accessory.train.generator_run import DrawnDataConfig, GeneratorRunConfig, row_encoder
from accessory.train.loop import train
from tests.distributed.helpers import run_ranks
from tests.tiny import tiny_config, tiny_tokenizer
from tests.tiny_generator import BRIDGE, SIZE, caption_loader, draw_model, tiny_generator_config, write_captions

NEVER = DiffusionConfig(drop=NullPolicy(all=0.0))


def settings(folder: Path, **options: Any) -> TrainConfig:
    given = {
        "output_dir": str(folder), "max_steps": 4, "lr": 1e-3, "batch_size": 4, "precision": "fp32",
        "checkpoint_every": 2, "log_every": 1, "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(**{**given, **options})


def trained(model: Generator) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("told", [True, False])
def test_who_draws_is_not_asked_for_tokens_or_padding(
    told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one size have no padding; without the denoiser's word for it, its token would be blamed."""
    caplog.set_level("INFO", "accessory")
    if not told:
        monkeypatch.setattr(FlagDiT, "seldom", ())
    run = settings(tmp_path / "run", max_steps=1)
    train(draw_model(tmp_path), caption_loader(tmp_path, 4), DiffusionObjective(NEVER, 0), run)
    assert "images/s" in caplog.text
    assert "tokens/s" not in caplog.text
    blamed = "1 trainable parameters never received a gradient: ['denoiser.pad_token']"
    assert (blamed in caplog.text) == (not told)
    assert ("never received" in caplog.text) == (not told)


def test_captions_become_prompts_and_pictures(tmp_path: Path) -> None:
    batch = next(iter(caption_loader(tmp_path, 4)))
    targets = targets_of(batch)
    assert isinstance(targets.pixels, Tensor)
    assert targets.pixels.shape == (4, 3, SIZE, SIZE)
    assert batch.ids.shape == (4, 0)
    assert batch.images == 4
    assert all(isinstance(p, str) and p.startswith("a ") for p in targets.prompts)
    assert [draw for draw, _ in targets.places] == [0, 1, 2, 3]
    assert len(set(targets.keys)) == 4


def test_noise_belongs_to_the_draw_and_not_to_its_batch(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    objective = DiffusionObjective(NEVER, seed=5)
    four = next(iter(caption_loader(tmp_path, 4)))
    twos = iter(caption_loader(tmp_path, 2))
    whole = objective(model, four)[0]
    parts = [objective(model, next(twos))[0] for _ in range(2)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole, DiffusionObjective(NEVER, seed=6)(model, four)[0])


def test_two_ranks_draw_what_one_does(tmp_path: Path) -> None:
    def work(world: int) -> Any:
        def inner(rank: int) -> Any:
            place, own = tmp_path / f"rank{rank}of{world}", tmp_path / f"world{world}"
            place.mkdir()  # both ranks write a tokenizer and pictures: never into one folder at the same time
            model, loader = draw_model(place), caption_loader(place, 4 // world, rank, world)
            config = settings(own, batch_size=4 // world, tensorboard=False)
            result = train(model, loader, DiffusionObjective(DiffusionConfig(), config.seed), config)
            assert groups.world_size() == world
            return [float(result.row[k]) for k in ("loss", "grad_norm", "diffusion")]

        return inner

    (alone,), (first, second) = run_ranks(work(1), 1), run_ranks(work(2), 2)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-4)


def test_dropped_rows_get_the_null_of_inference(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    targets = targets_of(next(iter(caption_loader(tmp_path, 8))))
    objective = DiffusionObjective(DiffusionConfig(drop=NullPolicy(all=0.5)), seed=1)
    draws = objective.draw(model, targets)
    made = objective.condition(model, targets, draws)
    null = model.null(1)
    gone = [i for i, kind in enumerate(draws.drop) if kind == "all"]
    kept = [i for i, kind in enumerate(draws.drop) if kind == "keep"]
    assert gone
    assert kept
    for i in gone:
        _same(made[[i]].trimmed(), null.trimmed())
    for i in kept:
        assert not torch.equal(made[[i]].mask, null.padded(made.mask.shape[1]).mask)  # type: ignore[union-attr,arg-type]


def _same(a: Condition, b: Condition) -> None:
    assert a.parts().keys() == b.parts().keys()
    for name, part in a.parts().items():
        assert torch.equal(part, b.parts()[name]), name


def test_cached_features_train_as_online_ones_and_run_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = draw_model(tmp_path)
    batches = iter(caption_loader(tmp_path, 4))
    pair = [next(batches), next(batches)]
    plain = DiffusionObjective(DiffusionConfig(), 0)
    first = CachedFeatures(model, tmp_path / "features", "tiny")
    online = [plain(model, b)[0].item() for b in pair]
    cached = DiffusionObjective(DiffusionConfig(), 0, first)
    assert [cached(model, b)[0].item() for b in pair] == pytest.approx(online, rel=1e-5)
    first.null(model)
    first.close()
    second = CachedFeatures(model, tmp_path / "features", "tiny")
    null = model.null(1)
    monkeypatch.setattr(Generator, "null", lambda *_: null)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("the encoder ran"))
    monkeypatch.setattr(model.codec, "moments", lambda *_: pytest.fail("the codec ran"))
    again = DiffusionObjective(DiffusionConfig(), 0, second)
    assert [again(model, b)[0].item() for b in pair] == pytest.approx(online, rel=1e-5)
    second.close()
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_trained_conditioner_is_not_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the conditioner trains"):
        CachedFeatures(draw_model(tmp_path, dream=True), tmp_path / "features", "tiny")


def test_only_what_is_named_changes(tmp_path: Path) -> None:
    for dream, part in ((False, "denoiser."), (True, "conditioner.dream.")):
        model = draw_model(tmp_path, dream=dream, seed=1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if dream:  # a fresh transformer gives zero whatever it is told
            with torch.no_grad():
                for p in model.denoiser.parameters():
                    p.add_(0.1 * torch.randn_like(p))
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = settings(tmp_path / f"run{dream}", max_steps=2)
        train(model, caption_loader(tmp_path, 4), DiffusionObjective(DiffusionConfig(), 0), config)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed
        assert all(n.startswith(part) for n in changed)
        assert changed <= set(trained(model))


def test_the_average_resumes_exactly_and_is_exported(tmp_path: Path) -> None:
    ema = EmaConfig(decay=0.9, warmup=2, every=1)

    def go(name: str, steps: tuple[int, ...], average: EmaConfig | None = ema) -> tuple[Any, Any]:
        for stop in steps:
            model = draw_model(tmp_path)
            config = settings(tmp_path / name, max_steps=stop, ema=average, lr=1e-2)
            objective = DiffusionObjective(DiffusionConfig(), 0)
            result = train(model, caption_loader(tmp_path, 4), objective, config, resume="auto")
        last = checkpoint.load(tmp_path / name / f"step-{steps[-1]:06d}")
        from safetensors.torch import load_file

        assert result.final is not None
        return last, load_file(result.final / "trainable.safetensors")

    (whole, final), (parts, other) = go("whole", (4,)), go("none", (4,), None)
    assert not parts.average
    assert all(torch.equal(v, parts.trainable[k]) for k, v in whole.trainable.items())
    assert all(torch.equal(v, whole.average[k]) for k, v in final.items())
    assert all(torch.equal(v, parts.trainable[k]) for k, v in other.items())
    assert any(not torch.equal(v, whole.trainable[k]) for k, v in final.items())


def test_a_cut_run_has_the_average_of_an_uncut_one(tmp_path: Path) -> None:
    ema = EmaConfig(decay=0.9, warmup=2, every=2)

    def run(name: str, *stops: int) -> checkpoint.Checkpoint:
        for stop in stops:
            model = draw_model(tmp_path)
            config = settings(tmp_path / name, max_steps=4, ema=ema, lr=1e-2, checkpoint_every=2, keep_last=9)
            if stop < 4:
                config = settings(tmp_path / name, max_steps=stop, min_lr=1e-2, ema=ema, lr=1e-2, checkpoint_every=2)
            if len(stops) == 1 or stop == 4:
                config = settings(tmp_path / name, max_steps=4, min_lr=1e-2, ema=ema, lr=1e-2, checkpoint_every=2)
            objective = DiffusionObjective(DiffusionConfig(), 0)
            train(model, caption_loader(tmp_path, 4), objective, config, resume="auto")
        return checkpoint.load(tmp_path / name / "step-000004")

    whole, parts = run("whole", 4), run("parts", 2, 4)
    assert whole.average
    for name, value in whole.average.items():
        assert torch.equal(value, parts.average[name]), name
    earlier = checkpoint.load(tmp_path / "parts" / "step-000002").average
    assert any(not torch.equal(v, earlier[k]) for k, v in whole.average.items())


def document(model: Generator, folder: Path) -> Batch:
    """Two dialogues: one draws two pictures and talks about them, one only talks."""
    own = model.conditioner.model.encoder
    encoder = own.under(own.template, DreamLayout(3, SIZE))
    red, blue = (Picture(str(folder / f"{c}.png")) for c in ("red", "blue"))
    drawn = (Turn("user", ("Draw a red hat",)), Turn("assistant", (red, "There is a red hat.")))
    more = (Turn("user", ("and a blue one",)), Turn("assistant", ("Here:", blue)))
    talk = (Turn("user", ("What is this?",)), Turn("assistant", ("This is a cat.",)))
    rows = [encoder.encode(Sample((*drawn, *more))), encoder.encode(Sample(talk))]
    return collate(rows, encoder.pad_id)


def test_a_model_that_sees_through_its_prefix_writes_rows_too(tmp_path: Path) -> None:
    """It has no positions for pictures, and a limit on how many a dialogue brings."""
    write_captions(tmp_path)
    sees = ResamplerConfig(length=2, width=16, depth=1, heads=2, max_tiles=2)
    below = replace(
        tiny_config(tiny_tokenizer(tmp_path / "words")), projector=None, resampler=sees, tuning=(PrefixSpec(length=2),)
    )
    made = tiny_generator_config(below, "dream", tuning=BRIDGE)
    config = GeneratorRunConfig(
        settings(tmp_path / "run", max_steps=1), DrawnDataConfig("data.yaml"), made,
        GenerationConfig(DiffusionConfig(drop=NullPolicy(all=0.0)), DreamLossConfig(language=1.0)),
    )  # fmt: skip
    encoder = row_encoder(config, build_generator(made, train=True))
    assert isinstance(encoder, Encoder)
    red = Picture(str(tmp_path / "red.png"))

    def dialogue(shown: int) -> Sample:
        return Sample((Turn("user", (*[red] * shown, "Draw this")), Turn("assistant", (red,))))

    row = encoder.encode(dialogue(2))
    assert (len(row.targets), len(row.tiles), int((row.ids == DREAM).sum())) == (1, 2, 3)
    with pytest.raises(RowRejected, match="max_tiles"):
        encoder.encode(dialogue(3))


def joint(**weights: float) -> JointObjective:
    config = GenerationConfig(DiffusionConfig(drop=NullPolicy(all=0.0)), DreamLossConfig(**weights), norms_every=1)
    return JointObjective(config, seed=0)


def test_documents_hold_spans_and_learn_their_triggers(tmp_path: Path) -> None:
    caption_loader(tmp_path, 1)
    batch = document(draw_model(tmp_path, dream=True), tmp_path)
    assert len(targets_of(batch)) == 2
    assert int((batch.ids == DREAM_START).sum()) == 2
    assert int((batch.labels == DREAM_START).sum()) == 2
    assert int((batch.ids == DREAM).sum()) == 6
    assert bool((batch.labels[batch.ids == DREAM] == IGNORE).all())
    assert len(batch.tiles) == 2  # each is seen once it is drawn
    assert bool((batch.labels[(batch.ids < 0) & (batch.ids != DREAM_START)] == IGNORE).all())


def test_joint_losses_are_means_of_their_own(tmp_path: Path) -> None:
    caption_loader(tmp_path, 1)
    model = draw_model(tmp_path, dream=True)
    batch = document(model, tmp_path)

    def mean(**weights: float) -> tuple[float, dict[str, float]]:
        loss, count, metrics = joint(**weights)(model, batch)
        return float(loss.detach()) / count, {k: float(v) / count for k, v in metrics.items()}

    total, parts = mean(language=1.0, picture=10.0)
    assert total == pytest.approx(parts["language"] + 10 * parts["diffusion"], rel=1e-5)
    assert mean(language=1.0, picture=0.0)[0] == pytest.approx(parts["language"], rel=1e-5)
    assert mean(language=0.0, picture=1.0)[0] == pytest.approx(parts["diffusion"], rel=1e-5)
    assert mean(language=1.0, picture=1.0, trigger=9.0)[1]["language"] != pytest.approx(parts["language"], rel=1e-3)
    assert parts["language"] == pytest.approx(5.9, abs=0.6)  # about log of the vocabulary


class Documents:
    """The same batch for ever, or its two rows as micro-batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        while True:
            yield from self.batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_gradient_norms_of_the_parts_are_logged(tmp_path: Path) -> None:
    caption_loader(tmp_path, 1)
    names = ("conditioner.dream.queries", "conditioner.dream.start*", "conditioner.dream.heads.*", "denoiser.*")
    rows = []
    for pieces in (1, 2):
        model = draw_model(tmp_path, dream=True, tuning=names)
        whole = document(model, tmp_path)
        targets = targets_of(whole)
        split = [
            Batch(whole.ids[:1], whole.labels[:1], whole.mask[:1], whole.tiles, whole.sources[:1], targets),
            Batch(whole.ids[1:], whole.labels[1:], whole.mask[1:], whole.tiles[:0], whole.sources[1:], None),
        ]
        config = settings(tmp_path / f"joint{pieces}", max_steps=1, accumulation=pieces)
        source = Documents([whole] if pieces == 1 else split)
        rows.append(train(model, source, joint(language=1.0, picture=2.0), config).row)
    first, second = rows
    for name in ("loss", "language", "diffusion", "grad_norm", "grad_norm/language", "grad_norm/diffusion"):
        assert first[name] == pytest.approx(second[name], rel=1e-3), name
    assert first["grad_norm/language"] > 0
    assert first["grad_norm/diffusion"] > 0


@pytest.mark.slow
def test_eight_pictures_are_learned_by_heart(tmp_path: Path) -> None:
    model = draw_model(tmp_path)
    objective = DiffusionObjective(NEVER, 0)
    batch = next(iter(caption_loader(tmp_path, 8)))
    with torch.no_grad():
        before = float(objective(model, batch)[0]) / 8
    config = settings(
        tmp_path / "heart", max_steps=1000, lr=4e-3, batch_size=8, log_every=100, checkpoint_every=1000,
        warmup_steps=10, betas=(0.9, 0.98),
    )  # fmt: skip
    train(model, caption_loader(tmp_path, 8), objective, config)
    with torch.no_grad():
        after = float(objective(model, batch)[0]) / 8
    assert before > 1
    assert after < 0.1
