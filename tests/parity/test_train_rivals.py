"""What benchmarks/train.py compares computes the same thing: one model, one loss, one update, whoever computes it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from accessory import config as configuration
from accessory.train.run import RunConfig
from benchmarks.rivals import CONTENDERS, KINDS, Contender, Setting, Tally
from benchmarks.train import least_gflop, reached
from tests.structure.source import ROOT
from tests.unit.train.squares import write_squares

pytest.importorskip("peft", reason="the rival of transformers is tuned by peft")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("squares")
    model = configuration.load(write_squares(folder, steps=1), RunConfig).model
    return Setting("full", folder / "data.yaml", model, rows=4, pad=96, workers=0, autocast=False)


def made(setting: Setting, kind: str) -> dict[str, Contender]:
    return {
        name: contender(Setting(kind, **{k: v for k, v in vars(setting).items() if k != "kind"}))
        for name, (_, contender) in CONTENDERS.items()
    }


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_begin_and_go_on_alike(setting: Setting, kind: str) -> None:
    """Packs and sorted windows deal the rows otherwise, so only the two at random take the same steps."""
    contenders = made(setting, kind)
    rows = next(iter(contenders.values())).held_out(8)
    before = {name: c.test(rows) for name, c in contenders.items()}
    assert max(before.values()) - min(before.values()) < 1e-4
    for contender in contenders.values():
        for _ in range(6):
            contender.update()
    after = {name: c.test(rows) for name, c in contenders.items()}
    assert all(after[name] < before[name] - 0.005 for name in after), (before, after)
    if kind == "full":  # adapters begin with random numbers of their own
        assert abs(after["transformers"] - after["adapter"]) < 1e-3
    tallies = {name: c.tally for name, c in contenders.items()}
    assert tallies["adapter"].computed == 6 * 4 * 96 > tallies["transformers"].computed
    assert tallies["adapter"].learned == tallies["transformers"].learned > 0
    trained = {name: sum(p.numel() for p in c.net.parameters() if p.requires_grad) for name, c in contenders.items()}
    assert trained["ours"] == trained["adapter"] == trained["accessory"] > 0


def test_the_seed_matters(setting: Setting) -> None:
    one, other = (
        CONTENDERS["adapter"][1](Setting(**{**vars(setting), "seed": seed, "rows": 4})) for seed in (0, 1)
    )  # fmt: skip
    rows = one.held_out(4)
    assert abs(one.test(rows) - other.test(rows)) > 1e-4


def test_a_row_that_is_longer_than_the_padding_is_refused(setting: Setting) -> None:
    contender = CONTENDERS["adapter"][1](Setting(**{**vars(setting), "pad": 8}))
    with pytest.raises(ValueError, match="is longer than --pad 8"):
        contender.update()


def test_the_least_work(setting: Setting) -> None:
    """Two blocks of width 32, kv width 16 and inner width 48, and a table of 360 ids; 2 of 10 positions are learned."""
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    for kind, passes in (("full", 3), ("lora", 2)):
        contender = CONTENDERS["accessory"][1](Setting(**{**vars(setting), "kind": kind}))
        least = 2 * passes * (10 * 2 * block + 2 * 360 * 32) / 2 / 1e9
        assert least_gflop(contender, Tally(positions=10, learned=2)) == pytest.approx(least)


ALONE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from accessory import config
from accessory.train.run import RunConfig
from benchmarks.rivals import Setting
from benchmarks.train import parse, work
folder = Path(sys.argv[1])
model = config.load(folder / "experiment.yaml", RunConfig).model
args = parse(["--seconds", "0.1", "--tested", "4", "--threads", "1"])
for name in ("ours", "accessory"):
    setting = Setting("full", folder / "data.yaml", model, rows=4, autocast=False)
    print(json.dumps(asdict(work(name, setting, args))))
"""


def test_a_worker_tells_and_ends(setting: Setting) -> None:
    """With processes that load ahead and outlive signals: unless they are told, the program never ends."""
    command = [sys.executable, "-c", ALONE, str(setting.sources.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    ours, accessory = (json.loads(line) for line in done.stdout.splitlines())
    for outcome in (ours, accessory):
        assert outcome["speed"] > 0
        assert outcome["peak_mb"] > 50
        assert len(outcome["curve"]) >= 2
    assert ours["real"] is None
    assert 0 < accessory["real"] <= 1
    assert ours["filled"] > 0.5
    assert accessory["filled"] is None


def test_when_a_loss_is_reached() -> None:
    curve = [(0.0, 4.0), (2.0, 3.0), (4.0, 2.0)]
    assert reached(curve, 2.5) == pytest.approx(3.0)
    assert reached(curve, 4.0) == 0.0
    assert reached(curve, 1.0) is None
    assert torch.get_num_threads() == 1  # each contender sets the threads of its process
