"""From an experiment file with a generator to its folder, by the verb that trains everything else too."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory import config as configuration
from accessory.cli import train as verb
from accessory.diffusion.latent_cache import CacheWriter
from accessory.models.generator import is_generator, load_generator
from accessory.train import checkpoint
from accessory.train.generator_run import GeneratorRunConfig, main_config
from tests.tiny_generator import draw_config, write_captions


def experiment(folder: Path, more: str = "") -> Path:
    write_captions(folder)
    (folder / "data.yaml").write_text(
        "sources:\n  - {kind: captions, path: captions.jsonl, columns: {image: file, caption: text}}\n"
    )
    generator = configuration.dump({"generator": configuration.plain(draw_config(folder))})
    path = folder / "experiment.yaml"
    path.write_text(
        f"{generator}cache_features: true\ncache: {folder}/cache\n{more}"
        "data: {sources: data.yaml, workers: 1, window: 1}\n"
        f"train: {{output_dir: {folder}/run, max_steps: 2, lr: 1.0e-2, batch_size: 4, precision: fp32, log_every: 1, "
        "ema: {decay: 0.5}, tensorboard: false}\n"
    )
    return path


def test_the_verb_trains_a_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path)
    plain = {"config": str(path), "overrides": [], "resume": None, "outline": False}
    assert verb.main(argparse.Namespace(**plain, dry_run=True)) == 0
    assert "asks for pictures with ['a " in capsys.readouterr().out
    assert verb.main(argparse.Namespace(**plain, dry_run=False)) == 0
    final = tmp_path / "run" / "final"
    assert is_generator(final)
    assert {p.name for p in final.iterdir()} >= {"run.yaml", "sources.yaml"}
    average = checkpoint.load(tmp_path / "run" / "step-000002").average
    made = dict(load_generator(final).named_parameters())
    assert all(torch.equal(v, made[k]) for k, v in average.items())
    [row] = load_generator(final).generate(["a red square"], seeds=[1])
    assert row.size == (16, 16)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        main_config(path, ["objective.diffusion.drop.all=0.3", "train.max_steps=4"], "auto")


def _run(path: Path, name: str) -> None:
    main_config(path, [f"train.output_dir={path.parent}/{name}", "train.max_steps=6"])


def test_two_runs_share_a_cache(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=_run, args=(path, name)) for name in ("a", "b")]
    for process in runs:
        process.start()
    for process in runs:
        process.join(120)
    assert [process.exitcode for process in runs] == [0, 0]
    states = [load_file(tmp_path / name / "final" / "trainable.safetensors") for name in ("a", "b")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    [texts] = (tmp_path / "cache" / "features").glob("texts-*")
    made_by = json.loads((texts / "index-0.jsonl").read_text().splitlines()[0])["made_by"]
    with CacheWriter(texts, made_by) as cache:  # as a run that is still going
        assert len(cache) == 8
        _run(path, "c")
        assert (texts / "index-1.jsonl").is_file()


def test_the_plan_shows_what_everything_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path)
    left_out = ["generator.sampler=null"]
    main_config(path, left_out, dry_run=True)
    shown = capsys.readouterr().out.partition("the first row")[0]
    tree = configuration.parse(shown)
    assert tree["generator"]["sampler"]["grid"]["points"] > 1
    main_config(path, left_out)
    assert tree["generator"] == configuration.parse((tmp_path / "run" / "final" / "config.yaml").read_text())


def test_init_is_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    main_config(path)
    final = tmp_path / "run" / "final"
    again = [
        f"init={final}",
        f"train.output_dir={tmp_path}/again",
        "train.max_steps=1",
        "train.lr=0.0",
        "train.ema=null",
    ]
    result = main_config(path, again)
    assert result is not None
    assert result.final is not None
    first, second = (load_file(f / "trainable.safetensors") for f in (final, result.final))
    assert all(torch.equal(v, second[k]) for k, v in first.items() if k.startswith("denoiser."))
    other = [*again, f"train.output_dir={tmp_path}/other", "generator.denoiser.config.n_layers=2"]
    with pytest.raises(ValueError, match="do not fit the generator"):
        main_config(path, other)


def test_weights_of_a_language_loss_need_a_bridge(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    with pytest.raises(ValueError, match="dream bridge"):
        main_config(path, ["objective.loss={language: 1.0}", "cache_features=false"])
    with pytest.raises(ValueError, match="dialogues with dream spans only"):
        configuration.load(path, GeneratorRunConfig, ["objective.diffusion.drop.text=0.2"])
    for option in ("data.packing.length=64", "train.loss_chunk=8"):
        with pytest.raises(ValueError, match=r"is for dialogues \(objective\.loss\)"):
            configuration.load(path, GeneratorRunConfig, [option])
        assert configuration.load(path, GeneratorRunConfig, [option, "objective.loss={language: 1.0}"]).train
