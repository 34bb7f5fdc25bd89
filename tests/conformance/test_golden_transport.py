"""Numbers of the published transports, samplers, DDPM process and buckets, and that the comparison can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import DIFFUSION as GOLDEN
from tests.golden import copied, needs_golden
from tools import conformance

COMPARED = {
    "transport_losses": 130,
    "transport_samplers": 142,
    "ddpm_process": 14,
    "crop_buckets": 33,
    "sample_flag_t2i": 14,
    "sample_next_t2i": 12,
    "sample_large_dit_ddpm": 2,
}
pytestmark = needs_golden


@pytest.mark.parametrize("case", COMPARED)
def test_case_passes(case: str) -> None:
    verdict, line = conformance.run_case(GOLDEN / case)
    assert verdict == "passed", line
    assert f"({COMPARED[case]} compared" in line


SPOILT = {
    "transport_losses": ("VP.score.likelihood.out.loss_per_sample", "time.out.shift_3.0", "GVP.noise_from_velocity"),
    "transport_samplers": (
        "ode.shift4.0.rk4.out.trajectory",
        "sde.GVP.velocity.SBDM.Heun.Mean.out.trajectory",
        "likelihood.euler.out.logp",
    ),
    "ddpm_process": ("train.out.vb", "sample.out.trajectory"),
    "sample_next_t2i": ("rk4.extrapolate.out.latents",),
    "sample_flag_t2i": ("dopri5.plain.out.latents",),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_altered_number_fails(case: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN / case, tmp_path)
    table = load_file(folder / "io.safetensors")
    for name in SPOILT[case]:
        table[name].view(-1)[-1] += 0.05 * (1 + table[name].abs().max())
    save_file(table, folder / "io.safetensors")
    verdict, line = conformance.run_case(folder)
    assert verdict == "failed"
    assert line.count(" differs by ") == len(SPOILT[case])


def test_an_output_that_nothing_computes_fails(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "ddpm_process", tmp_path)
    table = load_file(folder / "io.safetensors")
    save_file(table | {"train.out.surprise": torch.zeros(1)}, folder / "io.safetensors")
    assert "nothing computes train.out.surprise" in conformance.run_case(folder)[1]


def test_an_altered_bucket_fails(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "crop_buckets" / "config.json").read_text())
    config["lists"]["512"][3][0] += 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert conformance.run_case(tmp_path)[0] == "failed"
