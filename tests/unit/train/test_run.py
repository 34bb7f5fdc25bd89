"""From an experiment file to a model folder."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory import config as configuration
from accessory.data.emoji import Concept
from accessory.models import build
from accessory.peft.attach import LoraSpec, TrainSpec, trainable_state
from accessory.peft.quantize import Quantization
from accessory.serve import chat
from accessory.train import checkpoint, objective
from accessory.train import run as running
from accessory.train.disjoint import RowGroup
from accessory.train.outline import outline
from accessory.train.run import RunConfig, main_config, run, warm_start
from tests.tiny import tiny_model, tiny_model_dir
from tests.unit.train.squares import COLOURS, QUESTION, write_squares


def experiment(folder: Path, steps: int = 2) -> RunConfig:
    return configuration.load(write_squares(folder, steps), RunConfig)


def test_a_run_ends_in_a_folder_that_is_the_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(Concept(n, n, (), "", "") for n in ("red", "green", "blue", "yellow"))
    monkeypatch.setattr(objective, "concepts", lambda cache: known)
    path = write_squares(tmp_path, 2)
    result = main_config(path, ["objective.align={weight: 0.5, source: null}"])
    assert result is not None
    assert result.final == tmp_path / "run" / "final"
    assert set(result.row) > {"loss", "language", "align", "aligned_right"}
    assert "align:" in (result.final / "run.yaml").read_text()
    assert "max_steps: 2" in (result.final / "run.yaml").read_text()
    assert (result.final / "sources.yaml").read_text() == (tmp_path / "data.yaml").read_text()
    state = load_file(result.final / build.WEIGHTS_FILE)
    assert not [k for k in state if k.startswith("aligner")]  # training's own
    loaded = build.load(result.final)
    for name, p in loaded.net.named_parameters():
        assert torch.equal(p, state[name]), name
    fresh = tiny_model(tmp_path, train=True, max_length=128)
    with pytest.raises(ValueError, match="do not fit"):
        warm_start(fresh.net.backbone, result.final)
    warm_start(fresh.net, result.final)
    assert all(torch.equal(p, state[n]) for n, p in fresh.net.named_parameters())


def test_the_seed_decides_where_a_run_starts(tmp_path: Path) -> None:
    config = experiment(tmp_path, steps=1)

    def trained(seed: int, name: str) -> dict[str, torch.Tensor]:
        train = replace(config.train, seed=seed, output_dir=str(tmp_path / name), lr=0.0, min_lr=0.0)
        result = run(replace(config, train=train), folder=tmp_path)
        assert result is not None
        assert result.final is not None
        return load_file(result.final / build.WEIGHTS_FILE)

    first, same, other = trained(1, "a"), trained(1, "b"), trained(2, "c")
    assert all(torch.equal(v, same[k]) for k, v in first.items())
    assert not torch.equal(first["projector.skip"], other["projector.skip"])


def test_init_starts_from_another_folder(tmp_path: Path) -> None:
    config = experiment(tmp_path, steps=1)
    folder = tiny_model_dir(tmp_path, seed=7, max_length=128)
    train = replace(config.train, lr=0.0, min_lr=0.0)
    result = run(replace(config, train=train, init=str(folder)), folder=tmp_path)
    assert result is not None
    assert result.final is not None
    state, wanted = (load_file(f / build.WEIGHTS_FILE) for f in (result.final, folder))
    assert set(state) == set(wanted)
    assert all(torch.equal(v, wanted[k]) for k, v in state.items())


def test_init_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    made = tiny_model(tmp_path, train=True, tuning=(LoraSpec(rank=2),))
    before = {k: v.clone() for k, v in trainable_state(made.net).items()}
    bad = {k: v + 1 for k, v in before.items()} | {"backbone.nowhere": torch.zeros(1)}
    save_file(bad, tmp_path / build.WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"1 tensors do not fit the model: backbone\.nowhere"):
        warm_start(made.net, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in trainable_state(made.net).items())


def test_init_with_tensors_that_would_be_dropped_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path)
    made = tiny_model(tmp_path, train=True, tuning=(TrainSpec(("projector.*",)),))
    before = {k: v.clone() for k, v in made.net.state_dict().items()}
    with pytest.raises(ValueError, match=r"neither trains nor exports: backbone\..*model\.base"):
        warm_start(made.net, folder)
    assert all(torch.equal(v, before[k]) for k, v in made.net.state_dict().items())


def test_a_resumed_run_takes_nothing_from_its_start(tmp_path: Path) -> None:
    config = replace(experiment(tmp_path, steps=1), init=str(tiny_model_dir(tmp_path, seed=7, max_length=128)))
    with pytest.raises(ValueError, match="match_scale needs"):
        run(replace(config, match_scale=True), folder=tmp_path)
    assert run(config, folder=tmp_path) is not None
    again = replace(config, init=str(tmp_path / "gone"), match_scale=True)  # neither is looked at any more
    result = run(replace(again, train=replace(config.train, max_steps=2)), "auto", folder=tmp_path)
    assert result is not None
    assert result.step == 2


@pytest.mark.parametrize("early", [None, 3])
def test_pictures_are_learned_through_the_prefix(tmp_path: Path, early: int | None) -> None:
    """A file of pictures and texts trains a LLaMA-Adapter, whose pictures have no other way in; a run that is cut off
    and resumed ends as one that was not, and the folder answers."""
    path = write_squares(tmp_path, 120)
    text = {"id": "text", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "none"}]}
    with (tmp_path / "squares.jsonl").open("a") as file:
        file.write(json.dumps(text) + "\n")
    prefix = f"kind: prefix, length: 3, layers: 1, init_std: 0.1, early: {'null' if early is None else early}"
    config = configuration.load(
        path,
        RunConfig,
        [
            "model.projector=null",
            "model.resampler={length: 3, width: 16, depth: 1, heads: 2}",
            f"model.tuning=[{{{prefix}}}, {{kind: train, patterns: ['backbone.*', 'resampler.*', 'tower.*']}}]",
            "train.batch_size=5",
            "train.checkpoint_every=60",
            "train.keep_last=3",
        ],
    )
    result = run(config, folder=tmp_path)
    assert result is not None
    assert result.final is not None
    whole = load_file(result.final / build.WEIGHTS_FILE)
    assert {n.split(".")[0] for n in whole} == {"backbone", "resampler", "tower"}
    shutil.rmtree(result.final)
    shutil.rmtree(checkpoint.folder(config.train.output_dir, 120))
    again = run(config, "auto", folder=tmp_path)
    assert again is not None
    assert again.final is not None
    state = load_file(again.final / build.WEIGHTS_FILE)
    assert all(torch.equal(v, whole[n]) for n, v in state.items())
    model = chat.load(again.final, device="cpu")
    assert [model.chat(QUESTION, [tmp_path / f"{name}.png"]) for name in COLOURS] == list(COLOURS)
    assert model.chat(QUESTION) == "none"
    model.model.net.resampler.visual_proj_norm.weight.data.zero_()  # type: ignore[union-attr]
    assert len({model.chat(QUESTION, [tmp_path / f"{name}.png"]) for name in COLOURS}) == 1


def test_match_scale_leaves_data_and_ledger_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(Concept(n, n, (), "", "") for n in ("red", "green", "blue", "yellow"))
    monkeypatch.setattr(objective, "concepts", lambda cache: known)
    opened: list[int] = []
    real = running.load_sources
    monkeypatch.setattr(running, "load_sources", lambda *a, **k: (opened.append(1), real(*a, **k))[1])
    path = write_squares(tmp_path, 1)
    with (tmp_path / "squares.jsonl").open("a") as file:
        bad = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
        file.write(json.dumps({"id": "bad", "image": "nowhere.png", "conversations": bad}) + "\n")
    more = ["objective.align={weight: 0.5, source: null}", "match_scale=true", "data.max_bad_rate=0.5"]
    config = configuration.load(path, RunConfig, ["train.batch_size=8", "model.projector.layers=linear", *more])
    result = run(config, folder=tmp_path)
    assert result is not None
    assert opened == [1]
    draws = [json.loads(line)["draw"] for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert len(draws) == len(set(draws)) >= 1
    frozen = replace(config.model, tuning=(TrainSpec(("tower.*",)),))
    train = replace(config.train, output_dir=str(tmp_path / "frozen"))
    with pytest.raises(ValueError, match="match_scale changes the projector"):
        run(replace(config, model=frozen, train=train), folder=tmp_path)


def test_a_damaged_start_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / build.WEIGHTS_FILE).write_bytes(b"torn")
    made = tiny_model(tmp_path, train=True)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        warm_start(made.net, tmp_path)


def test_dry_run_describes_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = experiment(tmp_path)
    with caplog.at_level(logging.INFO, logger="accessory"):
        assert run(config, folder=tmp_path, dry_run=True) is None
    assert "trained: backbone" in caplog.text
    assert "4 rows" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_global_batch_becomes_accumulation(tmp_path: Path) -> None:
    """An update of eight rows is the same whether one rank reads two at once or four."""
    config = experiment(tmp_path, steps=2)

    def trained(name: str, **options: Any) -> dict[str, torch.Tensor]:
        train = replace(config.train, output_dir=str(tmp_path / name), **options)
        result = run(replace(config, train=train), folder=tmp_path)
        assert result is not None
        assert result.final is not None
        said = configuration.load(result.final / "run.yaml", RunConfig).train  # the same recipe on other ranks
        assert (said.accumulation, said.global_batch) == (options.get("accumulation", 1), options.get("global_batch"))
        kept = configuration.parse((tmp_path / name / "step-000002" / "config.yaml").read_text())
        assert kept["train"].get("global_batch") == options.get("global_batch")
        return load_file(result.final / build.WEIGHTS_FILE)

    stated, two, four = (
        trained("a", batch_size=4, accumulation=2),
        trained("b", batch_size=2, global_batch=8),
        trained("c", batch_size=4, global_batch=8),
    )
    for name, value in stated.items():
        assert torch.equal(value, four[name])
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)
    assert replace(config.train, global_batch=16).on(2).accumulation == 2
    with pytest.raises(ValueError, match=r"global_batch 8 is no multiple of train.batch_size 4 x 3 ranks = 12"):
        replace(config.train, global_batch=8).on(3)
    with pytest.raises(ValueError, match="write one of them"):
        replace(config.train, global_batch=8, accumulation=2)
    with pytest.raises(ValueError, match="global_batch is 0"):
        replace(config.train, global_batch=0)


def test_an_outline_counts_a_quantised_backbone_of_any_dtype(tmp_path: Path) -> None:
    config = experiment(tmp_path)

    def both(quantization: Quantization | None, dtype: Any) -> tuple[int, int]:
        backbone = replace(config.model.backbone, dtype=dtype)
        tuning = (TrainSpec(("projector.*",)),)
        model = replace(config.model, backbone=backbone, tuning=tuning, quantization=quantization)
        made = build.build(model, train=True).net.backbone
        return outline(replace(config, model=model), tmp_path).memory, sum(t.nbytes for t in made.state_dict().values())

    for dtype in ("fp32", "bf16"):
        (whole, full), (less, codes) = both(None, dtype), both(Quantization("int8"), dtype)
        assert whole - less == full - codes > 0


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        run(replace(config, data=replace(config.data, sources="nowhere.yaml")), folder=tmp_path, dry_run=True)


def test_the_plan_and_the_export_show_what_the_base_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = experiment(tmp_path, steps=1)
    base = tiny_model_dir(tmp_path, max_length=128)
    model = replace(build.ModelConfig(), base=str(base), tuning=(TrainSpec(("projector.*",)),))
    assert run(replace(config, model=model), folder=tmp_path, dry_run=True) is None
    assert "max_length: 128" in capsys.readouterr().out
    result = run(replace(config, model=model), folder=tmp_path)
    assert result is not None
    assert result.final is not None
    assert "max_length: 128" in (result.final / "run.yaml").read_text()
    again = configuration.load(result.final / "run.yaml", RunConfig)  # what is shown can be run
    assert run(replace(again, data=config.data), "auto", folder=tmp_path) is not None


def test_a_cut_run_goes_on_with_its_packs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit, in the middle of a window, with rows waiting for the next one."""
    options = [
        "data.packing={length: 70, tiles: 3}", "data.window=2", "train.batch_size=1", "train.min_lr=5.0e-3",
        "train.warmup_steps=0", "train.loss_chunk=3",
    ]  # fmt: skip

    def go(name: str, *stops: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        config = configuration.load(write_squares(tmp_path, 9), RunConfig, options)
        for stop in stops:
            train = replace(config.train, output_dir=str(tmp_path / name), max_steps=stop, checkpoint_every=stop)
            run(replace(config, train=train), "auto", folder=tmp_path)
        state = checkpoint.load(tmp_path / name / f"step-{stops[0]:06d}").state
        return dict(checkpoint.load(tmp_path / name / "step-000009").trainable), state["ranks"][0]["data"]

    caplog.set_level(logging.INFO)
    (whole, _), (parts, state) = go("whole", 9), go("parts", 4, 9)
    assert state["given"] == 1
    assert state["held"]
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert "packs of 70 positions were" in caplog.text
    options[0] = "data.packing=null"
    assert any(not torch.equal(v, whole[k]) for k, v in go("plain", 9)[0].items())


def test_a_dry_run_says_how_full_packs_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = write_squares(tmp_path, 2)
    assert main_config(path, ["data.packing.length=70", "data.window=4"], dry_run=True) is None
    assert "packs of 70 positions were 9" in caplog.text
    caplog.clear()
    assert main_config(path, dry_run=True) is None
    assert "packs of" not in caplog.text


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    group = RowGroup("all", ("*",), ("*",))
    with pytest.raises(ValueError, match="loss_chunk computes scores again"):
        run(
            replace(
                config,
                objective=replace(config.objective, disjoint=(group,)),
                train=replace(config.train, loss_chunk=4),
            ),
            folder=tmp_path,
        )
    with pytest.raises(ValueError, match="loss_chunk is 0"):
        replace(config.train, loss_chunk=0)
