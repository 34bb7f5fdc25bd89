"""Runs of two ranks that are killed at random moments end as if nothing had happened (a hundred: see kills.py)."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults import kills


def test_kills_leave_no_trace(tmp_path: Path) -> None:
    found = kills.campaign(tmp_path, 6, seed=1)
    assert sum(found["kinds"].values()) == sum(found["phases"].values()) == 6
    assert len(found["kinds"]) >= 3


def test_and_what_is_forgotten_would_show(tmp_path: Path) -> None:
    wanted = kills.in_peace(tmp_path, "ddp")
    chance = random.Random(4)
    folder = tmp_path / "killed"
    while not list(folder.glob("step-*")):
        kills.strike(folder, "ddp", "kill", chance)
    assert kills.in_peace(tmp_path, "ddp", spoil=True, name="killed") != wanted
