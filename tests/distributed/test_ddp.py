"""Two ranks train what one process with the double batch trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accessory.parallel import groups
from accessory.train import checkpoint
from accessory.train.config import TrainConfig
from accessory.train.loop import TrainingDiverged, train
from accessory.train.signals import Interrupts
from tests.distributed.helpers import run_ranks
from tests.toy import ToySource, toy_model, toy_objective, weights


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, lr=0.05, weight_decay=0.1, checkpoint_every=2, log_every=2,
        precision="fp32", tensorboard=False,
    )  # fmt: skip


class Rank(ToySource):
    """Every rank's share of a batch; odd ranks have no picture."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(2, rank, world, pictures=rank % 2 == 0)


class Both:
    """One process that sees the micro-batches of both ranks, in turn."""

    def __init__(self) -> None:
        self.parts = [Rank(0, 2), Rank(1, 2)]

    def __iter__(self) -> Any:
        for pair in zip(*self.parts, strict=True):
            yield from pair

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("not resumed")


def numbers(model: torch.nn.Module) -> dict[str, Any]:
    return {n: v.numpy() for n, v in weights(model).items()}


def test_two_ranks_equal_one_process(config: TrainConfig, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        model = toy_model(seed=rank)  # rank 0's weights are spread
        torch.manual_seed(0)
        model.frozen.load_state_dict(toy_model(seed=0).frozen.state_dict())
        result = train(model, Rank(rank, 2), toy_objective, config)
        return numbers(model), dict(result.row), result.step

    (a, row, step), (b, other_row, _) = run_ranks(work, 2)
    assert step == 4
    for name in a:
        assert np.array_equal(a[name], b[name]), name
    assert row["loss"] == other_row["loss"]
    single = toy_model(seed=0)
    before = numbers(single)
    result = train(single, Both(), toy_objective, replace(config, output_dir=str(tmp_path / "one"), accumulation=2))
    for name, value in numbers(single).items():
        assert np.allclose(value, a[name], atol=1e-6), name
        assert not np.allclose(value, before[name], atol=1e-3), name
    for name in ("loss", "grad_norm", "accuracy"):
        assert row[name] == pytest.approx(result.row[name], rel=1e-5), name
    # And it matters: rank 0's half alone ends elsewhere.
    half = toy_model(seed=0)
    train(half, Rank(0, 2), toy_objective, replace(config, output_dir=str(tmp_path / "half")))
    assert max(np.abs(v - a[n]).max() for n, v in numbers(half).items()) > 1e-3


def test_resume_keeps_every_ranks_state(config: TrainConfig, tmp_path: Path) -> None:
    def work(output_dir: str, stops: tuple[int, ...]) -> Any:
        def inner(rank: int) -> Any:
            model = toy_model(dropout=0.3)
            for stop in stops:
                own = replace(config, output_dir=output_dir, max_steps=4, checkpoint_every=2)
                model = toy_model(dropout=0.3)
                source = Rank(rank, 2)
                with Stop(source, stop):
                    train(model, source, toy_objective, own, resume="auto")
            return numbers(model)

        return inner

    whole = run_ranks(work(str(tmp_path / "whole"), (4,)))
    parts = run_ranks(work(str(tmp_path / "parts"), (2, 4)))
    state = checkpoint.load(tmp_path / "parts" / "step-000002").state
    assert len(state["ranks"]) == 2
    assert state["ranks"][0]["rng"] != state["ranks"][1]["rng"]
    for name in whole[0]:
        assert np.array_equal(whole[0][name], parts[0][name]), name
    with pytest.raises(checkpoint.CheckpointError, match="made by 2 data ranks, this run has 1"):
        train(
            toy_model(), Rank(0, 2), toy_objective, replace(config, output_dir=str(tmp_path / "parts")), resume="auto"
        )


class Stop:
    """Signal arrives on one rank only, while it prepares the batch of a step: every rank ends after that step."""

    def __init__(self, source: ToySource, step: int) -> None:
        self.source, self.step = source, step

    def __enter__(self) -> None:
        source, step = self.source, self.step
        Interrupts.received = property(  # type: ignore[assignment]
            lambda _: 15 if source.rank == 1 and source.given >= step < 4 else 0, lambda _, value: None
        )

    def __exit__(self, *_: object) -> None:
        del Interrupts.received


def test_all_ranks_diverge_together_and_name_the_other_ranks_file(config: TrainConfig) -> None:
    def work(rank: int) -> Any:
        def bad(model: Any, batch: Any) -> Any:
            loss, count, others = toy_objective(model, batch)
            return loss * (float("inf") if rank == 1 else 1.0), count, others

        try:
            train(toy_model(), Rank(rank, 2), bad, config)
        except TrainingDiverged as error:
            return str(error)
        return "went on"

    messages = run_ranks(work)
    assert messages[0] == messages[1]
    assert "toy.json:2, toy.json:3" in messages[0]
    assert "toy.json:0" not in messages[0]


def test_one_process_needs_no_group() -> None:
    world = groups.setup("cpu")
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert groups.all_reduce(x) is x
    assert groups.gather_objects("a") == ["a"]
    groups.shutdown()


def test_flat_all_reduce_of_mixed_tensors() -> None:
    def work(rank: int) -> Any:
        groups.BUCKET = 5
        made = [torch.full((3,), float(rank + 1)), torch.ones(2, 4).t() * rank, torch.ones(2, dtype=torch.float64)]
        groups.all_reduce_many(made)
        return [m.tolist() for m in made]

    for found in run_ranks(work, 3):
        assert found == [[6.0] * 3, [[3.0, 3.0]] * 4, [3.0, 3.0]]
