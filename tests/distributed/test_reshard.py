"""Checkpoints and exports do not depend on how many ranks wrote them: tensor 2 -> 1 -> 2 goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accessory import config as configuration
from accessory.__main__ import main
from accessory.data.loader import Loader
from accessory.data.mixture import Mixture
from accessory.models import build
from accessory.parallel.layout import Layout, ParallelConfig, Place
from accessory.parallel.shard import parallelize
from accessory.peft.attach import LoraSpec, load_trainable, trainable_state
from accessory.train import checkpoint
from accessory.train.config import EmaConfig, TrainConfig
from accessory.train.loop import Hooks, train
from accessory.train.run import RunConfig, run
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import EVERYTHING, Mixed, apart, column, config, made, trained
from tests.toy import ToyEncoder, ToyRows, toy_model, toy_objective
from tests.unit.train.squares import write_squares

SPECS = (LoraSpec(rank=3, alpha=6.0), *EVERYTHING[1:])  # data ranks drop other things


def settings(folder: Path, steps: int, plan: ParallelConfig, **options: Any) -> TrainConfig:
    return config(folder, steps, plan, min_lr=0.01, checkpoint_every=2, keep_last=9, ema=EmaConfig(0.5), **options)


def further(home: Path, steps: int, plan: ParallelConfig, **options: Any) -> Callable[[int], Any]:
    """Up to ``steps`` updates, from wherever the folder stands."""

    def work(rank: int) -> Any:
        model = made(home / f"own{rank}", specs=SPECS)
        # As many micro-batches of an update as this copy of the model draws.
        parts = options.get("parts", 1)
        source = Mixed(rank // plan.tensor if parts > 1 else None)
        own = settings(home / "run", steps, plan, accumulation=2 // parts)
        return trained(model, source, own, resume="auto")

    return work


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """Six steps of one process, without a break."""
    home = tmp_path_factory.mktemp("straight")
    return home / "run", further(home, 6, ParallelConfig())(0)


def folder(path: Path, step: int) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    found = checkpoint.load(path / f"step-{step:06d}")
    return {f"{f}:{n}": t for f in checkpoint.KINDS for n, t in getattr(found, f).items()}


def test_two_ranks_then_one_then_two(straight: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    plan = ParallelConfig(tensor=2)
    run_ranks(further(tmp_path, 2, plan))
    further(tmp_path, 4, ParallelConfig())(0)
    rows = run_ranks(further(tmp_path, 6, plan))[0]
    wanted, run = straight[1], tmp_path / "run"
    assert [r["step"] for r in rows] == [r["step"] for r in wanted] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        assert torch.allclose(column(rows, name), column(wanted, name), rtol=1e-5), name
    assert float((column(rows, "loss")[:-1] - column(rows, "loss")[1:]).abs().min()) > 1e-4  # a step lost would show
    for step in (2, 4, 6):
        ours, theirs = folder(run, step), folder(straight[0], step)
        assert [*ours] == [*theirs]
        assert apart(theirs, ours) < 2e-2, step  # moments of tiny gradients; the rows above say how near it is
    # The export is that of one process, and loads into one.
    final = load_file(run / "final" / "trainable.safetensors")
    model = made(tmp_path / "loaded", specs=SPECS)
    load_trainable(model.net, final)
    assert all(torch.equal(final[n], t) for n, t in trainable_state(model.net).items())
    assert apart(load_file(straight[0] / "final" / "trainable.safetensors"), final) < 1e-3


def test_the_product_goes_on_too(straight: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    plan = ParallelConfig(tensor=2, data="fsdp")
    run_ranks(further(tmp_path, 2, plan, parts=2), 4)
    rows = run_ranks(further(tmp_path, 4, ParallelConfig(data="fsdp"), parts=2), 2)[0]
    assert torch.allclose(column(rows, "loss"), column(straight[1], "loss")[:4], rtol=1e-5)
    assert apart(folder(straight[0], 4), folder(tmp_path / "run", 4)) < 2e-2


def test_an_experiment_ends_in_the_folder_of_one_process(tmp_path: Path) -> None:
    whole = configuration.load(write_squares(tmp_path, 2), RunConfig)

    def final(name: str, plan: ParallelConfig) -> tuple[Path, float]:
        train = replace(whole.train, output_dir=str(tmp_path / name), parallel=plan)
        result = run(replace(whole, train=train), folder=tmp_path)
        assert result is not None
        assert result.final is not None
        return result.final, result.row["loss"]

    (two, loss), (_, same) = run_ranks(lambda rank: final("two", ParallelConfig(tensor=2)))
    one, alone = final("one", ParallelConfig())
    assert loss == same == pytest.approx(alone, rel=1e-5)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    # What two ranks saved, in parts, becomes that folder too, and what convert makes of it is the same.
    saved = checkpoint.latest(two.parent)
    assert saved is not None
    assert not (saved / "trainable.safetensors").exists()
    made = [tmp_path / "made", tmp_path / "from-final"]
    for source, folder in zip((saved, two), made, strict=True):
        assert main(["convert", str(source), str(folder), "--skip-gate"]) == 0
    assert [{p.name: p.read_bytes() for p in f.iterdir()} for f in made[:1]] == [
        {p.name: p.read_bytes() for p in f.iterdir()} for f in made[1:]
    ]
    weights = [dict(build.load(f).net.named_parameters()) for f in (one, two)]
    assert apart(*({n: p.detach() for n, p in w.items()} for w in weights)) < 1e-2


def test_other_numbers_of_copies_read_on_where_these_stopped(tmp_path: Path) -> None:
    """2 copies, 1, 4 that cut the parameters, 2: every update sees the rows of one process that never stopped."""

    def further(home: Path, steps: int, world: int = 1, data: Any = "ddp") -> Callable[[int], Any]:
        def work(rank: int) -> list[dict[str, float]]:
            plan = ParallelConfig(data=data)
            own = settings(home, steps, plan, accumulation=1, batch_size=1, global_batch=4).on(world)
            model = toy_model()
            layout = parallelize(model, plan, [model.embed, model.output])
            source = Loader(Mixture([ToyRows()], 3), ToyEncoder(), 1, rank=rank, world=world)
            train(model, source, toy_objective, own, resume="auto", hooks=Hooks(layout=layout))
            return [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]

        return work

    wanted = further(tmp_path / "straight", 9)(0)
    home = tmp_path / "run"
    run_ranks(further(home, 3, 2), 2)
    further(home, 5)(0)
    run_ranks(further(home, 7, 4, "fsdp"), 4)
    rows = run_ranks(further(home, 9, 2), 2)[0]
    for name in ("loss", "grad_norm"):
        assert torch.allclose(column(rows, name), column(wanted, name), rtol=1e-5), name
    assert float((column(rows, "loss")[:-1] - column(rows, "loss")[1:]).abs().min()) > 1e-4  # other rows would show
    assert apart(folder(tmp_path / "straight", 9), folder(home, 9)) < 1e-3


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_parts_of_any_number_of_rows_are_the_whole(rows: int) -> None:
    def work(rank: int) -> Any:
        places = {"a": Place(None, rows)}
        layout, whole = Layout(ParallelConfig(data="fsdp"), places), {"a": torch.arange(rows * 2.0).view(rows, 2)}
        part = layout.own({**whole, "exp_avg/a": whole["a"], "step/a": torch.tensor(3.0)})
        assert part["step/a"] == 3
        return {n: t.tolist() for n, t in layout.whole(part).items()}, len(part["a"])

    (joined, first), (nothing, second) = run_ranks(work)
    assert nothing == {}
    assert first + second == rows
    assert joined == {
        "a": torch.arange(rows * 2.0).view(rows, 2).tolist(),
        "exp_avg/a": joined["a"],
        "step/a": 3.0,
    }
