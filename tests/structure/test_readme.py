"""Every command and every path of README and CONTRIBUTING is tried.

Commands that cost seconds run for real on a tiny model; the heavy ones have their arguments checked against the
command's own help. A command that fits neither list is an error, so nothing is left out silently.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accessory.__main__ import main
from accessory.data import assets
from accessory.evaluate import trigger
from accessory.evaluate.tally import LIKENESS_HEAD, RANKS_HEAD
from tests.structure.source import ROOT
from tests.tiny import tiny_model_dir

PAGES = ("README.md", "CONTRIBUTING.md")
NANO = "weights/nano-sphinx"
EXPECTED = 38  # commands in both pages: change it together with them
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
# Too long for a suite, or the suite itself: the script must exist, parse, and know its options.
HEAVY = (
    "bash exps/quickstart.sh", "bash exps/nano_sphinx.sh", "bash exps/nano_dit.sh", "bash exps/nano_dream.sh",
    "bash exps/train.sh", "NPROC=all bash exps/train.sh", "NNODES=4 NPROC=all MASTER_ADDR=node0 bash exps/train.sh",
    "sbatch --nodes 4 --time 12:00:00 exps/slurm.sh",
    "bash exps/setup.sh", "bash tests/run.sh", "bash .ci/run", "python -m accessory generate",
    "python -m accessory chat --model nano-sphinx --generator",
    "python demos/chat.py", "python -m accessory evaluate", "python -m accessory convert", "python -m accessory plan",
    "python -m tests.distributed.curves",
)  # fmt: skip
REAL = (
    "python -m accessory train", "python -m accessory doctor", "python -m accessory chat --model weights/",
    "python -m accessory chat --model runs/", "python -m accessory fetch --list",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in all pages."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    return [body for text in texts for kind, body in BLOCK.findall(text) if kind == language]


def commands() -> list[str]:
    """Every line of every bash block that is no comment."""
    lines = [line.strip() for body in blocks("bash") for line in body.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_every_command_is_in_one_list() -> None:
    found = commands()
    assert len(found) == EXPECTED
    for command in found:
        kinds = [prefix for prefix in (*HEAVY, *REAL) if command.startswith(prefix)]
        assert len(kinds) == 1, f"{command!r} is not tried by this test"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(HEAVY)])
def test_heavy_commands_know_their_arguments(command: str) -> None:
    words = shlex.split(re.sub(r"^([A-Z_]+=\w+ )*", "", command), comments=True)
    options = [w for w in words if w.startswith("--")]
    if words[0] in ("bash", "sbatch"):
        script = ROOT / next(w for w in words if w.endswith((".sh", "run")))
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert os.access(script, os.X_OK)
        assert not options or words[1] == "tests/run.sh" or words[0] == "sbatch"
        return
    program = words[1:4] if words[1] == "-m" else words[1:2]
    shown = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert shown.returncode == 0, shown.stderr
    assert [o for o in options if o not in shown.stdout] == []


def test_the_example_works_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of README in their order, the shipped model replaced by a tiny one, training cut to three steps."""
    tiny, own = str(tiny_model_dir(tmp_path)), str(tmp_path / "own")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("accessory.log.setup", lambda: None)
    ran = []
    for command in commands():
        if not command.startswith(REAL):
            continue
        words = shlex.split(command.replace(NANO, tiny).replace("runs/own", own))[3:]
        if words[0] == "train":
            steps = 4 if "--resume" in words else 3
            words += [f"model.base={tiny}", f"train.max_steps={steps}", "train.warmup_steps=1", "data.workers=0"]
        if words[0] == "doctor":
            words += [f"model.base={tiny}"]
        if words[0] == "chat":
            words += ["--max-new-tokens", "4"]
        monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115  (a terminal that ends at once)
        assert main(words) == 0, command
        ran.append(words[0])
    assert ran.count("train") == 3
    assert ran.count("chat") == 3
    assert (tmp_path / "own" / "final" / "trainable.safetensors").is_file()
    assert (tmp_path / "own" / "step-000004").is_dir()
    printed = capsys.readouterr().out
    assert all(name in printed for name in assets.ASSETS)
    [shown] = blocks("text")
    lines = {without_numbers(line) for line in printed.splitlines()}
    assert [line for line in shown.splitlines() if line != "..." and without_numbers(line) not in lines] == []
    assert shown.count("\n") > 15


def without_numbers(line: str) -> str:
    """A line of output, as far as it is the same for every model."""
    blanked = " ".join(re.sub(r"[\d.,-]+%?( [GM]B)?|█+", "#", line).split())
    return re.sub(r"#( #)+", "#", blanked)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    body, generator = blocks("python")
    assert "load_generator" in generator
    exec(compile(body.replace(NANO, str(tiny_model_dir(tmp_path))), "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 3


@pytest.mark.assets
def test_the_generator_draws_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), made)
    assert [picture.size for picture in made["pictures"]] == [(64, 64)] * 2
    assert made["pictures"][0].tobytes() != made["pictures"][1].tobytes()


def test_every_path_exists() -> None:
    made = (NANO, "runs/", "out/", "path/to/", ".venv", "weights/", "rejected.jsonl")  # by commands, or by the user
    seen = 0
    for page in PAGES:
        text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for word in re.findall(r"`([\w./-]+)`", text):
            if ("/" in word or re.search(r"\.(md|py|sh|yaml|txt)$", word)) and not word.startswith((*made, "config.y")):
                assert (ROOT / word).exists(), f"{page} names {word}"
                seen += 1
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / target).exists(), f"{page} links to {target}"
    assert seen >= 30


def test_every_column_of_a_generators_scores_is_explained() -> None:
    rows = [line.split("|")[1].strip() for line in (ROOT / "README.md").read_text().splitlines() if "| `" in line]
    heads = (RANKS_HEAD, LIKENESS_HEAD, trigger.HEAD, trigger.NAMES_HEAD)
    columns = {cell.strip() for head in heads for cell in head.splitlines()[0].strip("|").split("|")}
    assert len(columns) == 22
    assert {f"`{column}`" for column in columns} <= set(rows)


def test_the_first_screen() -> None:
    """One sentence, the drawing, the two commands, within what a terminal shows."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    top = "\n".join(lines[:32])
    assert "sees" in top
    assert "splice" in top
    assert top.count("bash ") == 2
    assert max(map(len, lines)) <= 122
