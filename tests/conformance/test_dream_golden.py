"""The dream bridge against numbers of DreamLLM."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import DIFFUSION as GOLDEN
from tests.golden import needs_golden
from tools.conform.comparison import Comparison
from tools.conform.dream import HANDLERS, assembly_case, projectors_case
from tools.conformance import HANDLERS as KNOWN
from tools.conformance import main


def test_the_tool_knows_the_family() -> None:
    assert HANDLERS.items() <= KNOWN.items()


@needs_golden
@pytest.mark.parametrize(
    ("case", "count"), [("dreamllm_assembly", 51), ("dreamllm_assembly_vpred", 33), ("dreamllm_projectors", 8)]
)
def test_cases_pass(case: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / case)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{case}: passed ({count} compared")


@needs_golden
@pytest.mark.parametrize(
    ("file", "name", "problem"),
    [
        ("weights", "model.dream_embedding.dream_queries", "condition differs"),
        ("weights", "stable_diffusion_head.projector.projector.weight", "base.vm_loss differs"),
        ("io", "base.out.grad.model.dream_embedding.dream_queries", "dream_queries differs"),
        ("io", "in.drop_mask", "drop.vm_loss differs"),
        ("io", "encode.out.states_null", "encode.states_null"),
    ],
)
def test_a_spoilt_case_fails(file: str, name: str, problem: str, tmp_path: Path) -> None:
    source = GOLDEN / "dreamllm_assembly_vpred"
    for part in ("weights", "io"):
        tensors = load_file(source / f"{part}.safetensors")
        if part == file:
            tensors[name] = 1 - tensors[name]
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{part}.safetensors")
    c = Comparison()
    assembly_case(tmp_path, json.loads((source / "config.json").read_text()), c)
    assert any(problem in p for p in c.problems), c.problems


@needs_golden
def test_a_spoilt_projector_fails(tmp_path: Path) -> None:
    source = GOLDEN / "dreamllm_projectors"
    tensors = load_file(source / "weights.safetensors")
    tensors["mlp2_bias/projector.2.weight"] = torch.flip(tensors["mlp2_bias/projector.2.weight"], (0,)).contiguous()
    save_file(tensors, tmp_path / "weights.safetensors")
    save_file(load_file(source / "io.safetensors"), tmp_path / "io.safetensors")
    c = Comparison()
    projectors_case(tmp_path, {"in_dim": 6, "out_dim": 8}, c)
    assert len(c.problems) == 1
    assert "mlp2_bias differs" in c.problems[0]
