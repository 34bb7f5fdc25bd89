"""Plans of training runs against what real updates count, keep, send and take at their peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from accessory import config as configuration
from accessory.__main__ import main
from accessory.parallel.layout import ParallelConfig
from accessory.train.config import EmaConfig, TrainConfig
from accessory.train.hardware import KINDS, MEASURED, Machine, find_machine, with_rates
from accessory.train.layouts import Choice, choices
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.planning import planned
from accessory.train.run import RunConfig
from tests.distributed.helpers import run_ranks
from tests.structure.source import ROOT
from tests.unit.train import steps

SIZES = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 120}
TINY: dict[str, Any] = {"sizes": SIZES, "length": 24, "batch": 2, "method": "full"}
CPU = Machine("x", 1 << 34, 4e11, 8e10, 1e10, 1e9, 1e9, 2, cpu=True, efficiency=MEASURED)
# Large enough that what lives is far more than what libraries keep.
LARGE: dict[str, Any] = {
    **TINY,
    "sizes": {"dim": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 1024, "vocab_size": 6000},
    "length": 256,
}
PEAKS: tuple[dict[str, Any], ...] = (
    {**LARGE, "autocast": True, "checkpointing": True, "accumulation": 2},
    {**LARGE, "batch": 6, "method": "lora"},
    {**LARGE, "ranks": 2, "data": "fsdp", "checkpointing": True},
    {**LARGE, "batch": 6, "ranks": 2, "tensor": 2, "method": "lora"},
)
EXPERIMENT = """
model:
  backbone: {source: null, llama: {dim: 64, n_layers: 3, n_heads: 4, n_kv_heads: 2, ffn_dim: 96, vocab_size: 120}}
  tower: null
  projector: null
  tuning: [{kind: train, patterns: ["backbone.*"]}]
  max_length: 64
data: {sources: nowhere.yaml}
train: {output_dir: out, max_steps: 10, lr: 1.0e-3, batch_size: 4, global_batch: 32}
"""


@pytest.mark.parametrize(("method", "pairs"), [("full", False), ("lora", True), ("prefix", True)])
def test_flops_are_those_of_the_step(method: str, pairs: bool) -> None:
    """``pairs``: attention in bf16 is spelled as products, which the counter of real calls knows too."""
    case = {**TINY, "method": method}
    planner, choice = steps.planned(case, CPU)
    ops = [op for p, n in planner.stages(choice).parts for op in (*p.forward, *p.backward) * n]
    assert any(op.attention for op in ops) is not pairs
    torch.manual_seed(0)
    net = steps.net(case).train()
    objective = DialogueObjective(ObjectiveConfig(), steps._Words())  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        objective(net, steps._Source(case).batch)[0].backward()
    kinds = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    real = sum(v for k, v in kinds.items() if "attention" not in k)
    assert sum(op.flops for op in ops if not op.attention) == pytest.approx(real, rel=0.01)
    heads, pairs_of = 2 * 4 * 16 * 24 * 24, sum(op.flops for op in ops if op.attention)
    assert pairs or pairs_of == 3 * heads * 2 * (2 + 5)  # layers, multiply and add, products forward and back


@pytest.mark.parametrize("more", [{}, {"method": "lora"}, {"autocast": True}])
def test_moments_are_the_optimizers(more: dict[str, Any]) -> None:
    case = {**TINY, **more}
    planner, choice = steps.planned(case, CPU)
    found = steps.run({**case, "updates": 2})
    assert planner.shares(choice).moments == found["moments"] > 0
    averaged = replace(planner.train, ema=EmaConfig())
    planner.train = averaged
    assert planner.shares(choice).average == planner.shares(choice).gradients


def _sent(case: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of collectives of an update, as counted and as planned."""
    planner, choice = steps.planned(case, CPU)
    plan = planner.budget(choice).sent
    real = run_ranks(lambda _: steps.run({**case, "updates": 1}), 2)[0]["sent"]
    wanted = {
        "allreduce": plan.tensor_reduced + plan.data_reduced,
        "allgather": plan.tensor_gathered + plan.data_gathered,
        "reduce_scatter": plan.data_scattered,
        "broadcast": plan.tensor_broadcast,
    }
    return real, {k: v for k, v in wanted.items() if v > steps.LEAST}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "more", [{"data": "ddp"}, {"data": "fsdp", "checkpointing": True}, {"tensor": 2, "accumulation": 2}]
)
def test_collectives_are_those_of_two_ranks(method: str, more: dict[str, Any]) -> None:
    real, wanted = _sent({**TINY, "method": method, "ranks": 2, **more})
    assert wanted.keys() == real.keys()
    for name, size in wanted.items():
        assert size == pytest.approx(real[name], rel=0.01), (name, real, wanted)


def test_checkpointing_and_fewer_rows_take_less() -> None:
    planner, choice = steps.planned({**LARGE, "batch": 4}, CPU)
    plain, again = (planner.budget(replace(choice, checkpointing=c)) for c in (False, True))
    fewer = planner.budget(replace(choice, batch=2, accumulation=2))
    assert again.activations < 0.5 * plain.activations
    assert fewer.activations < plain.activations
    assert again.compute > 1.2 * plain.compute
    assert again.flops == plain.flops == pytest.approx(fewer.flops, rel=0.01)
    assert fewer.tokens == plain.tokens


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs on this machine")
def test_totals_are_the_peaks_of_processes() -> None:
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.train.steps"], input=json.dumps([{**c, "updates": 2} for c in PEAKS]),
        capture_output=True, text=True, env=env, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [json.loads(line)["peak"] for line in done.stdout.splitlines()]
    assert len(peaks) == len(PEAKS)
    plans = [planner.budget(choice) for planner, choice in (steps.planned(c, CPU) for c in PEAKS)]
    report = [(round(p / 1e6), round(b.total / 1e6), round(b.total / p, 3)) for p, b in zip(peaks, plans, strict=True)]
    print(*report, sep="\n")
    assert all(0.9 < ratio < 1.1 for _, _, ratio in report), report
    # The parts matter: without what a step computes the plan would be off by more than that.
    assert plans[1].activations > 0.5 * peaks[1]
    assert max(b.buffers for b in plans) > 0


def test_kinds() -> None:
    assert find_machine("h100") is find_machine("H100 SXM") is KINDS["H100"]
    assert find_machine("RTX 4090") is KINDS["RTX4090"]
    with pytest.raises(ValueError, match="--kind H10 is not known; did you mean H100"):
        find_machine("H10")
    with pytest.raises(ValueError, match=r"kinds are H100, .* and this"):
        find_machine("zzz")
    reached = with_rates(KINDS["A100-80"], 156, 2039)
    assert reached.efficiency.product == pytest.approx(0.5)
    assert reached.seconds(int(1e12), 0, 2, False) == pytest.approx(1e12 / 156e12)
    assert reached.seconds(0, int(2.039e9), 4, False) == pytest.approx(1e-3)
    assert reached.between(9) < reached.between(8)


def test_choices() -> None:
    train = TrainConfig("out", 10, 1e-3, 4, global_batch=32)
    backbone = steps.planned(TINY, CPU)[0].net.backbone.config
    found = choices(train, backbone, 4, KINDS["H100"], False, None)
    assert {c.parallel.tensor for c in found} == {1, 2}  # of four key/value heads there are two
    assert all(c.batch * c.accumulation * c.copies == 32 for c in found)
    assert {(c.parallel.data, c.checkpointing) for c in found if c.copies > 1} == {
        ("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)
    }  # fmt: skip
    assert all(c.parallel.data == "ddp" and not c.checkpointing for c in choices(train, backbone, 4, CPU, True, None))
    alone = {c.parallel for c in choices(replace(train, optimizer="muon"), backbone, 4, CPU, False, None)}
    assert alone == {ParallelConfig()}
    with pytest.raises(ValueError, match=r"train.global_batch 32 is not a multiple .* --gpus 3"):
        choices(train, backbone, 3, KINDS["H100"], False, None)


def test_the_best_fits_and_what_does_not_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(EXPERIMENT, encoding="utf-8")
    config = configuration.load(tmp_path / "x.yaml", RunConfig)
    large = planned(config, 2, KINDS["H100"], {})
    assert large.best is not None
    assert large.best.tokens_per_second == max(b.tokens_per_second for b in large.budgets)
    machine, planner = KINDS["H100"], large.planner
    found = choices(config.train, planner.net.backbone.config, 2, machine, False, None)
    needs = sorted(planner.budget(c).total for c in found)
    tight = replace(machine, memory=int((needs[0] + 1) / (1 - machine.efficiency.waste)) + 2)
    one = planned(config, 2, tight, {})
    assert one.best is not None
    assert one.best.total == needs[0] < needs[-1]
    assert any("GB too much; " in b.lack for b in one.budgets)
    assert planned(config, 2, replace(machine, memory=machine.efficiency.reserve), {}).best is None
    for ranks, said, match in (
        (0, {}, "--gpus must be at least 1, got 0"),
        (12, {}, "--gpus 12: beyond one node"),
        (2, {"length": 1}, "--length 1"),
        (2, {"learned": 0.0}, "--learned 0"),
        (2, {"pictures": 1}, "does not see"),
    ):
        with pytest.raises(ValueError, match=match):
            planned(config, ranks, KINDS["H100"], said)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    assert main(["plan", str(file), "model.max_length=32", "--gpus", "4", "--kind", "H100", "train.ema={}"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "on 4 x H100: rows of 32 positions; all others learned" in lines[0]
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + (2 + 2) + 4 - 2 + 2  # tensor 1 and 2, ddp and fsdp, with and without checkpointing
    assert sum("**best**" in line for line in table) == 1
    assert "Not measured on a GPU." in text
    assert "Assumed: attention 45%" in text
    snippet = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "best.yaml").write_text("base: x.yaml\n" + snippet, encoding="utf-8")
    best = configuration.load(tmp_path / "best.yaml", RunConfig).train
    assert best.on(4 // best.parallel.tensor).accumulation * best.batch_size * 4 // best.parallel.tensor == 32
    for wrong, said in (
        ([str(file)], "--kind is missing"),
        ([str(file), "--kind", "H1000"], "did you mean H100"),
        ([str(file), "--kind", "H100", "--prompt", "5"], "--prompt is for a model"),
        (["llama2-7b", "--gpus", "2"], "--gpus is for an experiment"),
        (["llama2-7b", "a.b=1"], "a.b=1 replaces a value"),
    ):
        assert main(["plan", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_chunked_scores_take_less() -> None:
    planner, choice = steps.planned({**LARGE, "batch": 4}, CPU)
    whole = planner.budget(choice)
    planner._stages.chunk = 128
    planner._stages._traced.clear()
    chunked = planner.budget(choice)
    assert chunked.activations < whole.activations
    assert chunked.compute > whole.compute
    assert chunked.flops == pytest.approx(whole.flops, rel=0.01)
    assert isinstance(choice, Choice)
