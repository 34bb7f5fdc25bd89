"""Grids of time: the published points, both conventions, parts of a grid."""

from __future__ import annotations

from itertools import pairwise

import pytest

from accessory.diffusion.time_grid import Grid


def test_the_published_points_of_shift_four() -> None:
    expected = [0, 0.0303, 0.0667, 0.1111, 0.1667, 0.2381, 0.3333, 0.4667, 0.6667, 1]
    assert Grid(10, shift=4.0).times() == pytest.approx(expected, abs=5e-5)
    assert Grid(10).times() == pytest.approx([i / 9 for i in range(10)])


def test_both_conventions_name_the_same_points() -> None:
    grid = Grid(7, shift=3.0)
    plain = [1 - i / 6 for i in range(7)]
    assert grid.sigmas() == pytest.approx([3 * s / (1 + 2 * s) for s in plain])
    assert grid.sigmas() == pytest.approx([1 - t for t in grid.times()])
    assert grid.times()[3] < 0.5  # more of the points lie near the noise


@pytest.mark.parametrize(
    "grid", [Grid(12), Grid(12, shift=6.0), Grid(12, shift=0.3), Grid(12, "sigmoid"), Grid(9, "sigmoid", alpha=2.0)]
)
def test_grids_rise_from_end_to_end(grid: Grid) -> None:
    times = grid.times()
    assert len(times) == grid.points
    assert times[0] == 0
    assert times[-1] == 1
    assert all(a < b for a, b in pairwise(times))
    low = grid.times((0.1, 0.9))
    assert all(a < b for a, b in pairwise(low))
    assert 0 < low[0] < low[-1] < 1


def test_the_sigmoid_takes_small_steps_at_both_ends() -> None:
    steps = [b - a for a, b in pairwise(Grid(21, "sigmoid").times())]
    assert max(steps) > 3 * steps[0]
    assert max(steps) > 100 * steps[-1]
    assert steps.index(max(steps)) == 12  # just behind mu
    assert Grid(5, "sigmoid", mu=0.4).times() != Grid(5, "sigmoid").times()


def test_parts_of_a_grid() -> None:
    whole = Grid(10, shift=4.0).times()
    assert Grid(10, shift=4.0, strength=0.6).times() == whole[4:]
    assert Grid(10, strength=0.9).times() == Grid(10).times()[1:]
    assert Grid(10, strength=0.0).times() == []
    assert Grid(10, shift=4.0, start=0.2).times() == [0.2, *whole[5:]]
    assert [Grid().whole, Grid(strength=0.5).whole, Grid(start=0.1).whole] == [True, False, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 1}, "1 points"),
        ({"shift": 0.0}, "above 0"),
        ({"kind": "sigmoid", "shift": 2.0}, "no shift, 2.0"),
        ({"mu": 1.0}, "mu 1.0"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"start": 1.0}, "start 1.0"),
        ({"start": 0.5, "strength": 0.5}, "say the same"),
    ],
)
def test_grids_that_cannot_be(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Grid(**options)  # type: ignore[arg-type]
