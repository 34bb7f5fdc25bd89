"""Cases of the conformance data, and ways to spoil a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
LLM = ROOT.parent / "shared" / "golden" / "llm"
DIFFUSION = LLM.parent / "diffusion"
needs_golden = pytest.mark.skipif(not LLM.is_dir(), reason="the golden data is not beside this checkout")


def copied(case: Path, folder: Path) -> Path:
    """A copy of a case that may be written to."""
    made = folder / case.name
    shutil.copytree(case, made, copy_function=shutil.copyfile)
    for path in (made, *(p for p in made.rglob("*") if p.is_dir())):
        path.chmod(0o755)
    return made


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change what a JSON file of a case holds."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def bump(name: str) -> Callable[[Path], None]:
    """Move the last number of a tensor."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "io.safetensors")
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] += 1e-2
        save_file(tensors, folder / "io.safetensors")

    return apply
