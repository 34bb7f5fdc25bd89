"""The verb ``train`` and the way errors look, through the real entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from accessory.__main__ import VERBS, main, misspelt
from tests.unit.train.squares import COLOURS, QUESTION, write_squares

TESTS = Path(__file__).parents[1]

# The real command line over a toy experiment: run.py stands for what reads the file and builds model and data.
DRIVER = """
import sys, types
from dataclasses import dataclass
from accessory import config
from accessory.train.config import TrainConfig
@dataclass(frozen=True)
class Experiment:
    train: TrainConfig
def main_config(path, overrides, resume, dry_run=False):
    from accessory.parallel import groups
    world = groups.setup("cpu")
    from toy import ToySource, toy_model, toy_objective
    from accessory.train.loop import Hooks, train
    found = config.load(path, Experiment, overrides)
    if dry_run:
        print(config.dump(found))
        return None
    hooks = Hooks(resolved=config.dump(found))
    source = ToySource(2, world.rank, world.size)
    result = train(toy_model(dropout=0.1), source, toy_objective, found.train, resume=resume, hooks=hooks)
    groups.shutdown()
    return result
stand_in = types.ModuleType("accessory.train.run")
stand_in.main_config = main_config
sys.modules["accessory.train.run"] = stand_in
import accessory.train
accessory.train.run = stand_in
from accessory.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, env=env, timeout=280
    )


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(
        f"train: {{output_dir: {tmp_path / 'run'}, max_steps: 4, lr: 1e-2, checkpoint_every: 2, log_every: 2}}\n"
    )
    return path


def test_train_override_resume(experiment: Path, tmp_path: Path) -> None:
    first = call("train", str(experiment), "train.max_steps=2", "train.lr=0.02")
    assert first.returncode == 0, first.stderr
    assert "step 2/2 loss " in first.stderr
    assert "tokens/s" in first.stderr
    assert "left" in first.stderr
    saved = (tmp_path / "run" / "step-000002" / "config.yaml").read_text()
    assert "lr: 0.02" in saved
    assert "max_steps: 2" in saved
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    refused = call("train", str(experiment))
    assert refused.returncode == 2
    assert "--resume auto" in refused.stderr
    assert "Traceback" not in refused.stderr
    second = call(
        "train", str(experiment), "--resume", "auto", "train.tensorboard=false"
    )  # an override after an option
    assert second.returncode == 0, second.stderr
    assert "done (steps): step 4" in second.stderr
    assert (tmp_path / "run" / "final" / "trainable.safetensors").is_file()


def test_under_torchrun(experiment: Path, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), "train", str(experiment), "train.tensorboard=false"],
        capture_output=True, text=True, env=env, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 4/4 loss") == 1  # one rank speaks
    assert len(json.loads((tmp_path / "run" / "step-000004" / "state.json").read_text())["ranks"]) == 2


def test_mistakes_are_one_message_and_debug_has_the_traceback(experiment: Path) -> None:
    bad = call("train", str(experiment), "train.max_stesp=2", "train.lr=x", "--dry-run")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: 2 mistakes in ")
    assert "train.max_stesp: unknown name (did you mean max_steps" in bad.stderr
    assert "train.lr: " in bad.stderr
    assert "Traceback" not in bad.stderr
    debug = call("train", str(experiment), "train.lr=x", "--debug")
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr


def test_dry_run_shows_the_plan_and_finds_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accessory.log.setup", lambda: None)  # it would cut other tests off the log
    dry = ["train", str(write_squares(tmp_path, 4)), "--dry-run"]
    assert main(dry) == 0
    out = capsys.readouterr().out
    assert "max_steps: 4" in out
    assert f"{QUESTION}" in out
    assert any(f"⟦{colour}" in out for colour in COLOURS)
    for more, said in (
        (["train.groups=[{pattern: nothing.*}]"], "matches no trainable parameter"),
        (["data.sources=nosuch"], f"data.sources: no file nosuch and no file {tmp_path / 'nosuch'}"),
        (["--resume", str(tmp_path / "nowhere")], "neither a complete checkpoint"),
    ):
        assert main([*dry, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_system_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr("accessory.cli.train.main", refused)
    assert main(["train", "x.yaml"]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/there'\n"


def test_an_interrupt_before_the_run_listens_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("accessory.cli.train.main", interrupted)
    try:
        assert main(["train", "x.yaml"]) == 130
    except KeyboardInterrupt:  # which would end the whole suite
        pytest.fail("the interrupt came through")


def test_help_and_unknown_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert len(VERBS) >= 5
    assert all(f"  {name} " in out for name, _ in VERBS)
    assert main(["trian", "x"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["train", "x.yaml", "--nonsense"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --nonsense\n" in capsys.readouterr().err


MISSPELT = {
    "train x.yaml --dry-rum": "--dry-run", "chat --modle x": "--model", "evaluate --model x --taks y": "--tasks",
    "generate --promt=x": "--prompt", "fetch -lits": "--list", "convert a b --quantise=int4": "--quantize",
    "plan x --bacth 2": "--batch", "doctor x.yaml --strickt": "--strict",
}  # fmt: skip


def test_every_verb_suggests_the_option_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert {line.split()[0] for line in MISSPELT} == {name for name, _ in VERBS}
    for line, meant in MISSPELT.items():
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert f"python -m accessory {line.split()[0]}: error: unrecognized arguments: -" in said
        assert f"(did you mean {meant}?)" in said


def test_values_and_beginnings_are_no_misspelt_options() -> None:
    known = ["--seed", "--prompt", "-h"]
    right = ["x", "--see", "-1", "-.5", "--prompt=-x", "--prompt", "-x with -a blank", "--", "--anything"]
    assert misspelt(right, known) == []
    assert misspelt(["--sed", "--anything", "-x"], known) == ["--sed (did you mean --seed?)", "--anything", "-x"]


def test_ctrl_c_is_told_to_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accessory.train

    monkeypatch.setattr("accessory.log.setup", lambda: None)  # it would cut other tests off the log

    for reason, code in (("SIGINT", 130), ("SIGTERM", 143), ("steps", 0)):
        stand_in = SimpleNamespace(main_config=lambda *_, r=reason, **__: SimpleNamespace(reason=r))
        monkeypatch.setattr(accessory.train, "run", stand_in, raising=False)
        monkeypatch.setitem(sys.modules, "accessory.train.run", stand_in)
        (tmp_path / "x.yaml").write_text("train: {}\n")
        assert main(["train", str(tmp_path / "x.yaml")]) == code


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom accessory.__main__ import main\nmain(['--help'])\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
