"""Numbers of the published diffusion transformers, through the conformance tool."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import DIFFUSION as GOLDEN
from tests.golden import needs_golden
from tools.conformance import main

# Case, and how many of its outputs and intermediates are compared.
CASES = {
    "flag_dit_t2i": 30,
    "flag_dit_t2i_noqknorm": 29,
    "next_dit_t2i_gqa": 35,
    "next_dit_t2i_mha": 35,
    "large_dit_t2i": 10,
    "flag_dit_imagenet": 13,
    "large_dit_imagenet": 13,
    "next_dit_imagenet": 16,
    "next_dit_moe_time": 17,
    "next_dit_moe_space": 17,
    "next_dit_moe_both": 22,
    "next_dit_compositional": 24,
    "diffusers_lumina_next": 74,
    "diffusers_lumina_next_gqa": 47,
    "rope_tables": 60,
    "train_step_flag_t2i": 62,
    "train_step_next_t2i": 65,
    "audio_flag_dit_qknorm": 18,
    "audio_flag_dit_v2": 18,
    "full_size_counts": 84,
}


@needs_golden
def test_cases_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / case) for case in CASES]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (case, number) in zip(lines, CASES.items()):
        assert line.startswith(f"{case}: passed ({number} compared: "), line
    assert lines[-1] == f"{len(CASES)} passed, 0 failed, 0 unsupported"


@needs_golden
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("flag_dit_t2i", "layers.1.attention.gate"),
        ("next_dit_moe_both", "layers.1.feed_forward_time.gate.weight"),
        ("next_dit_imagenet", "layers.0.ffn_norm.weight"),
        ("train_step_next_t2i", "layers.0.attention.ky_norm.weight"),
    ],
)
def test_an_altered_weight_fails(case: str, name: str, tmp_path: Path) -> None:
    weights = load_file(GOLDEN / case / "weights.safetensors")
    weights[name] = weights[name].flip(0) + 0.1
    folder = tmp_path / case
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    for file in ("config.json", "io.safetensors"):
        (folder / file).write_bytes((GOLDEN / case / file).read_bytes())
    assert main([str(folder)]) == 1


@needs_golden
def test_an_output_that_nothing_computes_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "extra"
    folder.mkdir()
    for file in ("config.json", "weights.safetensors"):
        (folder / file).write_bytes((GOLDEN / "flag_dit_imagenet" / file).read_bytes())
    io = load_file(GOLDEN / "flag_dit_imagenet" / "io.safetensors")
    save_file(io | {"cfg.out.surprise": io["out"].clone()}, folder / "io.safetensors")
    assert main([str(folder)]) == 1
    assert "nothing computes cfg.out.surprise" in capsys.readouterr().out
