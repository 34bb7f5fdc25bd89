"""The sampling benchmark draws the same pictures with every contender, and fills its table."""

from __future__ import annotations

import pytest

from benchmarks.flag_dit import measure, parse, show


def test_the_benchmark_compares_equals(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(["--quick", "--batch", "2"])
    result = measure(args)
    modes = [line.guidance for line in result.lines]
    assert modes.count("batched") == modes.count("two calls") == 6
    for line in result.lines:
        assert line.ms > 0
        if "cut" in line.contender:
            assert line.difference > 1e-4, line  # heads that are left out change the picture
        else:
            assert line.difference < 1e-4, line
    assert all(line.ratio == 1 for line in result.lines if line.contender == "diffusers")
    assert result.tokens == 16
    assert 0 < result.floor_ms < 1000
    show(args, result)
    out = capsys.readouterr().out
    assert out.count("\n| ours") == 10
    assert "| floor: " in out


def test_quick_sizes_can_be_changed() -> None:
    args = parse(["--quick", "--steps", "5"])
    assert (args.steps, args.dim, parse([]).dim) == (5, 48, 384)
