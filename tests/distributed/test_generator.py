"""A denoiser whose blocks are cut over data ranks trains what one process trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from accessory import config as configuration
from accessory.parallel.layout import Layout
from accessory.parallel.shard import parallelize
from accessory.train import generator_run
from accessory.train.generator_run import GeneratorRunConfig, run
from tests.distributed.curves import TOLERANCE, difference
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import apart
from tests.unit.train.test_generator_run import experiment

STEPS = 6
MORE = (
    "cache_features=false",
    "train.batch_size=2",
    "train.global_batch=4",
    f"train.max_steps={STEPS}",
    "train.eps=1e-5",
)


def trained(path: Path, name: str, *more: str) -> list[dict[str, float]]:
    """The rows of a run."""
    options = (*MORE, f"train.output_dir={path.parent}/{name}", *more)
    run(configuration.load(path, GeneratorRunConfig, options), folder=path.parent)
    return [json.loads(line) for line in (path.parent / name / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    path = experiment(tmp_path)

    def work(rank: int) -> Any:
        layouts: list[Layout] = []

        def seen(*args: Any) -> Layout:
            layouts.append(parallelize(*args))
            return layouts[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator_run, "parallelize", seen)
            rows = trained(path, "cut", "train.parallel.data=fsdp")
        assert [len(layout.places) > 10 for layout in layouts] == [True]
        return rows, trained(path, "whole")

    one = trained(path, "one")
    for ours in run_ranks(work)[0]:
        assert len(ours) == STEPS
        for value in ("loss", "grad_norm"):
            assert difference(one, ours, value) < TOLERANCE, value
    weights = [load_file(tmp_path / n / "final" / "trainable.safetensors") for n in ("one", "cut")]
    moved = [n for n, w in weights[0].items() if w.abs().max() > 1e-6]  # a bias of keys has no gradient but rounding
    assert len(moved) > len(weights[0]) - 5
    alone, cut = ({n: w[n] for n in moved} for w in weights)
    assert apart(alone, cut) < 1e-3
    assert abs(one[0]["loss"] - one[-1]["loss"]) > 0.01 * one[0]["loss"]


def test_what_cannot_be_spread_is_refused(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    with pytest.raises(ValueError, match=r"ParallelConfig\(tensor=2.*of a generator, data: fsdp cuts the denoiser's"):
        trained(path, "two", "train.parallel.tensor=2", "train.global_batch=null")
    with pytest.raises(ValueError, match="where every row asks for a picture"):
        trained(path, "two", "train.parallel.data=fsdp", "objective.loss={}", "objective.norms_every=0")
