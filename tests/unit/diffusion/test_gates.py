"""Gate truncation: what is measured, what is cut, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accessory.diffusion.denoiser import Steering
from accessory.diffusion.dit_config import FlagDiTConfig
from accessory.diffusion.gates import GateTable, compare_truncation, measure_gates, psnr, truncate
from accessory.diffusion.guidance import Guidance
from accessory.diffusion.sampler import Ode, SamplerSettings
from accessory.diffusion.time_grid import Grid
from tests.unit.diffusion.dits import FLAG, LABEL, NEXT, far, noise, randomised, told

T = torch.tensor([0.2, 0.7])
SETTINGS = SamplerSettings(solver=Ode(method="euler"), grid=Grid(points=4), guidance=Guidance(2.0))


def test_the_table_counts_what_a_threshold_cuts() -> None:
    table = GateTable(torch.tensor([[0.0, -0.1, 0.2, 1.0], [0.01, 0.02, -0.03, 0.04]]))
    assert (table.share(0.0), table.silent(0.0)) == (0.0, 0)
    assert (table.share(0.05), table.silent(0.05)) == (5 / 8, 1)
    assert (table.share(1.0), table.silent(1.0)) == (1.0, 2)  # even the head that is wide open
    for share in (0.0, 0.1, 0.5, 0.8, 1.0):
        threshold = table.threshold(share)
        assert table.share(threshold) == math.ceil(share * 8) / 8
    assert GateTable(torch.zeros(2, 4)).share(GateTable(torch.zeros(2, 4)).threshold(0.5)) == 1.0  # all are shut
    assert "| 1 | 0.0100 | 0.0200 | 0.0400 | 4 of 4 |" in table.markdown(0.05)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 1\.2"):
        table.threshold(1.2)
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        truncate(-0.1)
    with pytest.raises(ValueError, match="reads no text"):
        measure_gates(randomised(LABEL))


@pytest.mark.parametrize("config", [FLAG, NEXT], ids=["flag", "next"])
def test_threshold_0_is_the_model_and_1_removes_the_text_path(config: FlagDiTConfig) -> None:
    model, x = randomised(config), noise(2, 4, 4, 8)
    with torch.no_grad():
        model.layers[0].get_parameter("attention.gate")[0] = 30.0  # wide open
        # The pooled vector is no part of the path that gates rule.
        pooled = noise(2, 20)
        one, other = (replace(told(config, 2, seed=s), pooled=pooled) for s in (1, 8))
        plain = model(x, T, one)
        assert torch.equal(model(x, T, one, steering=truncate(0.0)), plain)
        none = model(x, T, one, steering=truncate(1.0))
        assert torch.equal(model(x, T, other, steering=truncate(1.0)), none)
        assert far(none, plain) > 1e-3
        assert far(model(x, T, other), plain) > 1e-3
    kept = truncate(0.3, Steering(shared_attention=True))
    assert (kept.shared_attention, kept.gate_threshold) == (True, 0.3)


def test_the_report_compares_with_the_untouched_model() -> None:
    model, condition, null = randomised(NEXT), told(NEXT, 2), told(NEXT, 1, seed=9)
    table = measure_gates(model)
    half = table.threshold(0.5)
    rows = compare_truncation(
        model, condition, null, thresholds=[half, 1.0], shape=(4, 4, 4), seeds=[1, 2], settings=SETTINGS, repeats=2
    )
    assert [row.threshold for row in rows] == [0.0, half, 1.0]
    assert [row.share for row in rows] == [0.0, 0.5, 1.0]
    assert (rows[0].output_max, rows[0].output_mean, rows[0].psnr, rows[0].speedup) == (0.0, 0.0, math.inf, 1.0)
    assert rows[2].silent == 2
    assert all(row.seconds > 0 for row in rows)
    assert rows[2].output_mean > rows[1].output_mean > 0
    assert all(row.output_max > row.output_mean for row in rows[1:])
    assert math.inf > rows[1].psnr > rows[2].psnr


def test_psnr() -> None:
    wanted = torch.tensor([0.0, 2.0])
    assert psnr(wanted, wanted) == math.inf
    assert psnr(wanted + 0.2, wanted) == pytest.approx(20.0, abs=1e-4)
