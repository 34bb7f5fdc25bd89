"""The ledger of skips turns a run red when something is skipped that nobody allowed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.skips import ALLOWED, verdict
from tests.structure.source import ROOT

CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tests.skips import SkipLedger
def pytest_configure(config):
    config.pluginmanager.register(SkipLedger())
"""


def outcome(folder: Path, reason: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (folder / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.skip(reason={reason!r})\ndef test_a(): pass\ndef test_b(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_known_reasons_pass(tmp_path: Path) -> None:
    done = outcome(tmp_path, "no CUDA device")
    assert done.returncode == 0, done.stdout
    assert "skipped 1: no CUDA device" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]


def test_unknown_reasons_fail(tmp_path: Path) -> None:
    done = outcome(tmp_path, "did not feel like it")
    assert done.returncode == 1
    assert "SKIPS: 1 skipped for a reason that tests/skips.py does not know: did not feel like it" in done.stdout


def test_every_reason_has_its_limit() -> None:
    assert len(ALLOWED) >= 4
    assert verdict(Counter({"no CUDA device": 20})) == []
    too_many = verdict(Counter({"no CUDA device": 21}))
    assert too_many == ["21 skipped for 'no CUDA device|needs? a GPU', at most 20 may be"]
