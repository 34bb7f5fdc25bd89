"""Configuration: complete errors, unions, inheritance, overrides, and the way back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from accessory import config


@dataclass(frozen=True)
class Adam:
    lr: float
    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Sgd:
    lr: float
    momentum: float = 0.0
    kind: Literal["sgd"] = "sgd"

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr {self.lr} is negative")


@dataclass(frozen=True)
class Part:
    file: str
    weight: float = 1.0


@dataclass(frozen=True)
class Root:
    optimizer: Adam | Sgd
    steps: int
    parts: tuple[Part, ...] = ()
    limits: dict[str, Part] = field(default_factory=dict)
    where: Path | None = None
    note: str = "1e-4"
    first: Part = Part("default.json", 3.0)
    extra: Part | None = None
    patterns: tuple[str, ...] = ()
    fast: bool = False


GOOD = """
optimizer: {kind: sgd, lr: 1e-4, momentum: 0.5}
steps: 10
parts: [{file: a.json}, {file: b.json, weight: 2}]
limits: {small: {file: s.json}}
where: some/folder
patterns: ["*.a", "*.b"]
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def wrong(path: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    path.write_text(text)
    with pytest.raises(config.ConfigError) as caught:
        config.load(path, Root, overrides)
    return str(caught.value)


def test_fills_the_whole_tree(good: Path) -> None:
    found = config.load(good, Root)
    assert found == Root(
        Sgd(1e-4, 0.5), 10, (Part("a.json"), Part("b.json", 2.0)), {"small": Part("s.json")}, Path("some/folder"),
        patterns=("*.a", "*.b"),
    )  # fmt: skip
    assert isinstance(found.optimizer.lr, float)  # 1e-4 has no dot, which YAML 1.1 takes for text


def test_dump_loads_back_equal(good: Path, tmp_path: Path) -> None:
    found = config.load(good, Root, ["extra={file: x}", "note='2e5'", "optimizer={kind: adam, lr: 1e-9}"])
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(found))
    assert config.load(again, Root) == found
    assert config.load(again, Root, ["steps=11"]) != found


def test_every_mistake_at_once_with_its_path(tmp_path: Path) -> None:
    text = """
optimizer: {kind: adam, lr: fast, betas: [1, x]}
stpes: 3
parts: [{file: a}, {flie: b, weight: "2"}, 7]
limits: {small: {file: 3}}
fast: "yes"
first: [1]
"""
    message = wrong(tmp_path / "bad.yaml", text)
    expected = [
        "optimizer.lr: ", "optimizer.betas.1: ", "stpes: unknown name (did you mean steps?)", "steps: is missing",
        "parts.1.flie: unknown name (did you mean file?)", "parts.1.file: is missing", "parts.1.weight: ",
        "parts.2: wants the fields of Part, not 7", "limits.small.file: ", "fast: ", "first: wants the fields of Part",
    ]  # fmt: skip
    for line in expected:
        assert f"\n  {line}" in message
    assert message.count("\n  ") == len(expected)
    assert f"{len(expected)} mistakes in {tmp_path / 'bad.yaml'}" in message


def test_strict_types(tmp_path: Path) -> None:
    for line in ("steps: 3.5", 'steps: "3"', "steps: true", "steps: null", "note: 3", "fast: 1"):
        key = line.split(":")[0]
        rest = "optimizer: {kind: adam, lr: 1}\n" + ("" if key == "steps" else "steps: 1\n")
        assert f"  {key}: " in wrong(tmp_path / "bad.yaml", rest + line), line


def test_kind_chooses_and_is_checked(tmp_path: Path) -> None:
    assert "optimizer.kind: 'adma' is unknown (did you mean adam" in wrong(
        tmp_path / "a.yaml", "optimizer: {kind: adma, lr: 1}\nsteps: 1"
    )
    assert "optimizer.kind: is missing; it is one of adam, sgd" in wrong(
        tmp_path / "a.yaml", "optimizer: {lr: 1}\nsteps: 1"
    )
    assert "optimizer.momentum: unknown name" in wrong(
        tmp_path / "a.yaml", "optimizer: {kind: adam, lr: 1, momentum: 1}\nsteps: 1"
    )


def test_own_checks_carry_the_path(tmp_path: Path) -> None:
    assert "optimizer: lr -1.0 is negative" in wrong(tmp_path / "a.yaml", "optimizer: {kind: sgd, lr: -1}\nsteps: 1")


def test_overrides(good: Path) -> None:
    found = config.load(
        good, Root, ["optimizer.lr=3", "parts.1.weight=5", "extra.file=x", "where=null", "first.weight=9", "fast=true"]
    )
    assert found.optimizer == Sgd(3.0, 0.5)
    assert found.parts[1] == Part("b.json", 5.0)
    assert found.extra == Part("x")
    assert found.where is None
    assert found.fast is True
    assert found.first == Part("default.json", 9.0)  # the rest of a preset stays


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=3", r"optimizer\.lrr: unknown name \(did you mean lr\?\)"),
        ("parts.2.weight=3", "parts is a list of 2, it has no entry '2'"),
        ("parts.x=3", "parts is a list of 2, it has no entry 'x'"),
        ("steps.x=3", "steps is 10, which has no parts"),
        ("steps", r"is not of the form a\.b=value"),
        ("optimizer..lr=3", r"is not of the form a\.b=value"),
        ("steps=[1", "the value of steps is not valid YAML"),
    ],
)
def test_bad_overrides(good: Path, assignment: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(good, Root, [assignment])


def test_base_is_inherited_and_merged(good: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("base: ../good.yaml\noptimizer: {momentum: 0.1}\nparts: [{file: only.json}]")
    found = config.load(child, Root)
    assert found.optimizer == Sgd(1e-4, 0.1)  # merged
    assert found.parts == (Part("only.json"),)  # replaced
    child.write_text("base: ../good.yaml\noptimizer: {kind: adam, lr: 1}")
    assert config.load(child, Root).optimizer == Adam(1.0)  # another kind keeps nothing


def test_base_circle_and_missing_base(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("base: b.yaml")
    b.write_text("base: a.yaml")
    with pytest.raises(config.ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        config.load(a, Root)
    b.write_text("base: c.yaml")
    with pytest.raises(config.ConfigError, match=r"c\.yaml \(the base of .*b\.yaml\): No such file"):
        config.load(a, Root)


def test_text_that_is_no_mapping_or_gives_a_key_twice(tmp_path: Path) -> None:
    assert "must hold a mapping" in wrong(tmp_path / "a.yaml", "- 1")
    rows = '[{"conversations": []}, {"conversations": []}]'
    assert "holds rows of data" in wrong(tmp_path / "a.yaml", rows)
    assert "- {kind: llava, path: a.json}" in wrong(tmp_path / "a.json", rows)
    assert "holds rows of data" in wrong(tmp_path / "a.jsonl", "{}\n{}")
    (tmp_path / "b.parquet").write_bytes(b"PAR1\xff")
    with pytest.raises(config.ConfigError, match="holds rows of data"):
        config.read(tmp_path / "b.parquet")
    (tmp_path / "whole.json").write_text('{"name": "a"}')
    assert config.read(tmp_path / "whole.json") == {"name": "a"}  # JSON is YAML
    assert "given twice" in wrong(tmp_path / "a.yaml", "steps: 1\nsteps: 2")
    assert "not valid YAML" in wrong(tmp_path / "a.yaml", "steps: [1")


def test_versions_and_import_cost() -> None:
    found = config.versions()
    assert {"python", "torch", "transformers", "diffusers", "accessory"} <= found.keys()
    assert found["accessory"] == "0.1.0"
    if "git" in found:
        assert len(found["git"].removesuffix("+dirty")) == 40
    code = "import sys, accessory.config, accessory.__main__; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_a_list_of_kinds_shows_how_it_is_written() -> None:
    @dataclass(frozen=True)
    class Run:
        optimizers: tuple[Adam | Sgd, ...]

    for given, example in (("sgd", "sgd"), ("bread", "adam")):
        with pytest.raises(config.ConfigError, match=rf"wants a list, e\.g\. \[{{kind: {example}}}\], not '{given}'"):
            config.build({"optimizers": given}, Run)
