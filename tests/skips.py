"""A skip needs a reason that is known here, and each reason may come up only so often; otherwise the run fails."""

from __future__ import annotations

import re
from collections import Counter

import pytest

# Reason (a pattern) and the most tests that may be skipped for it. A machine with network, chromium and the golden
# data beside the checkout skips only what needs a GPU.
ALLOWED = (
    (r"no CUDA device|needs? a GPU", 20),
    (r"not in (the cache|/|~|[\w.-]+/)|assets are not", 80),
    (r"chromium|playwright", 10),
    (r"the golden data is not beside this checkout", 400),
    (r"not a git checkout", 2),
    (r"no C\+\+ compiler", 10),
    (r"bitsandbytes is not installed", 20),
    (r"no /proc on this machine", 5),
    (r"flock is not installed", 1),
    (r"lmms-eval is not installed", 10),
    (r"no Java", 1),
)


def verdict(reasons: Counter[str]) -> list[str]:
    """What is wrong with the reasons and their numbers; empty when nothing is."""
    bad = []
    counts: Counter[str] = Counter()
    for reason, number in reasons.items():
        known = [pattern for pattern, _ in ALLOWED if re.search(pattern, reason, re.I)]
        if not known:
            bad.append(f"{number} skipped for a reason that tests/skips.py does not know: {reason}")
        else:
            counts[known[0]] += number
    bad += [f"{counts[p]} skipped for {p!r}, at most {most} may be" for p, most in ALLOWED if counts[p] > most]
    return bad


class SkipLedger:
    """Counts skips of a run by reason and turns a run with wrong ones red."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Book a skip; an expected failure is none."""
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[text.removeprefix("Skipped: ") or "no reason given"] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After every phase of a test."""
        self.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """After every file: one that skips as a whole counts once."""
        self.add(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a run that passed but skipped too much."""
        if exitstatus == pytest.ExitCode.OK and verdict(self.reasons):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say aloud what was skipped, and what is wrong with that."""
        for reason, number in self.reasons.most_common():
            terminalreporter.write_line(f"skipped {number}: {reason}", yellow=True)
        for line in verdict(self.reasons):
            terminalreporter.write_line(f"SKIPS: {line}", red=True)
