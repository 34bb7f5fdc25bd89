"""Imports point down only. The table is that of the design; a sibling may be named only where it is written here."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.structure.source import ROOT, Source, sources

# Layer of every package; a module may import lower layers and itself. 6 is everything outside the package.
LAYER = {
    "config": 0, "tokens": 0, "schema": 0, "log": 0,
    "nn": 1, "parallel": 2, "peft": 3,
    "backbone": 4, "vision": 4, "diffusion": 4,
    "data": 5, "models": 6,
    "train": 7, "serve": 7, "evaluate": 7,
    "cli": 8, "__main__": 8,
}  # fmt: skip
# data stands beside the models, not below: it knows layer 0 alone.
ONLY = {"data": {"config", "tokens", "schema", "log"}}
# Third-party libraries that enter through few files.
ENTRANCES = {
    "fairscale": ("accessory/parallel/",),
    "diffusers": ("accessory/diffusion/", "benchmarks/flag_dit.py"),
    "bitsandbytes": ("accessory/peft/quantize.py",),
    "gradio": ("demos/",),
    "pydantic": ("accessory/config.py",),
}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"


def package(dotted: str) -> str | None:
    """``nn`` of ``accessory.nn.rope.Rope``; None for what is not ours or is the top itself."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "accessory" and len(parts) > 1 and parts[1] in LAYER else None


def upward(source: Source) -> list[str]:
    """Every import of a file that does not point down."""
    own = source.path.removesuffix(".py").split("/")
    if own[0] != "accessory" or len(own) < 2 or own[1] == "__init__":
        return []
    assert own[1] in LAYER, f"{source.path}: package {own[1]} has no layer in this test"
    bad = []
    for line, name in imported(source.tree):
        other = package(name)
        if other is None or other == own[1]:
            continue
        allowed = ONLY.get(own[1])
        if LAYER[other] >= LAYER[own[1]] or (allowed is not None and other not in allowed):
            bad.append(f"{source.path}:{line} imports {name}: {own[1]} stands below or beside {other}")
    return bad


def parsed(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


def test_imports_point_down() -> None:
    checked = sources("accessory")
    assert len(checked) > 60
    assert [line for source in checked for line in upward(source)] == []


def test_an_upward_import_is_seen() -> None:
    inner = "def f():\n    from accessory.models import build\n"
    assert upward(parsed("accessory/nn/x.py", inner)) == [
        "accessory/nn/x.py:2 imports accessory.models.build: nn stands below or beside models"
    ]
    assert upward(parsed("accessory/vision/x.py", "import accessory.backbone.llama")) != []
    assert upward(parsed("accessory/data/x.py", "from accessory.nn import rope")) != []
    assert upward(parsed("accessory/serve/x.py", "from accessory.train import loop")) != []
    assert upward(parsed("accessory/models/x.py", "from accessory.data import tiling")) == []


def test_every_package_has_a_layer() -> None:
    found = {p.stem for p in (ROOT / "accessory").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__"} <= LAYER.keys()


def test_libraries_enter_through_few_files() -> None:
    bad = [
        f"{source.path}:{line} imports {name}"
        for source in sources()
        for line, name in imported(source.tree)
        for allowed in [ENTRANCES.get(name.split(".")[0])]
        if allowed is not None and not source.path.startswith(allowed)
    ]
    assert bad == []


def test_relative_imports_are_not_used() -> None:
    bad = [
        f"{s.path}:{n.lineno}" for s in sources() for n in ast.walk(s.tree) if isinstance(n, ast.ImportFrom) and n.level
    ]
    assert bad == []
