"""A run meets broken files: bad rows are skipped and booked, too many of them stop it, none is replaced in silence."""

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from accessory.data.encode import Encoder
from accessory.data.loader import Loader
from accessory.data.mixture import Ledger, Mixture
from accessory.data.rows import RowRejected
from accessory.data.sources import load_sources
from accessory.train.config import TrainConfig
from accessory.train.run import DataConfig, open_loader, report_rejected, reported


def mixture(folder: Path, n: int, broken: set[int]) -> Mixture:
    """LLaVA rows with a picture each; those in ``broken`` fail in one of five ways."""
    Image.effect_noise((32, 32), 60).convert("RGB").save(folder / "ok.jpg")
    whole = (folder / "ok.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    lines = []
    for i in range(n):
        row = {"image": "ok.jpg", "conversations": [{"from": "human", "value": f"<image>q{i}"},
                                                    {"from": "gpt", "value": f"a{i}"}]}  # fmt: skip
        ways = ({"image": "cut.jpg"}, {"image": "gone.jpg"}, {"image": "/etc/passwd"}, {"image": []}, None)
        way = ways[i % 5] if i in broken else {}
        lines.append("{broken json" if way is None else json.dumps({**row, **way}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("sources:\n  - {kind: llava, path: rows.jsonl}\n")
    return Mixture(load_sources(folder / "data.yaml"), seed=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_booked(tmp_path: Path, encoder: Encoder, workers: int) -> None:
    broken = {3, 46, 102, 150, 199}
    ledger = Ledger(tmp_path / "out" / "ledger.jsonl")
    made = Loader(mixture(tmp_path, 200, broken), encoder, 5, num_workers=workers, ledger=ledger)
    rows = [encoder.tokenizer.decode(i[m].tolist()) for b in itertools.islice(made, 39) for i, m in zip(b.ids, b.mask)]
    answers = [r.split("\na")[-1].strip() for r in rows]
    assert len(answers) == len(set(answers)) == 195
    assert set(answers).isdisjoint(map(str, broken))
    booked = [json.loads(line) for line in ledger.path.read_text().splitlines()] if ledger.path else []
    assert {b["row"] for b in booked} <= broken
    assert len(booked) >= 4
    assert all(b["source"].endswith("rows.jsonl") and b["reason"] for b in booked)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_stop_the_run(tmp_path: Path, encoder: Encoder, workers: int) -> None:
    made = Loader(mixture(tmp_path, 300, set(range(0, 300, 10))), encoder, 5, num_workers=workers)
    with pytest.raises(ValueError, match=r"\d+ of 2\d\d draws were of rows that are rejected, data.max_bad_rate is 5%"):
        list(itertools.islice(made, 1000))


def test_a_rate_below_the_limit_goes_on(tmp_path: Path, encoder: Encoder) -> None:
    made = Loader(mixture(tmp_path, 300, set(range(0, 300, 30))), encoder, 5)
    assert len(list(itertools.islice(made, 200))) == 200
    assert made.ledger.bad > 20


def test_a_programming_error_is_not_booked_as_a_bad_row(tmp_path: Path, encoder: Encoder) -> None:
    made = mixture(tmp_path, 20, set())
    encoder.runs = 5  # type: ignore[assignment]
    with pytest.raises(TypeError):
        next(iter(Loader(made, encoder, 2)))


def test_the_first_rejected_row_is_said(tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "rejected.jsonl")
    list(itertools.islice(Loader(mixture(tmp_path, 100, {3, 46, 70}), encoder, 5, ledger=ledger), 20))
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert ledger.bad >= 2
    assert len(said) == 1
    assert str(tmp_path / "rejected.jsonl") in said[0]


def test_a_row_is_listed_once(tmp_path: Path) -> None:
    """Whatever rank meets it, in whatever epoch, before or after a cut; another fault of it is another line."""
    path = tmp_path / "rejected.jsonl"

    def rows() -> list[tuple[int, str]]:
        return [(e["row"], e["reason"]) for e in map(json.loads, path.read_text().splitlines())]

    first, second = (Ledger(path, max_rate=1.0) for _ in range(2))
    for ledger, row in ((first, 3), (second, 3), (second, 4), (first, 4), (first, 3)):
        ledger.reject(RowRejected("torn \u00e4", "a", row), 9)
    assert rows() == [(3, "torn \u00e4"), (4, "torn \u00e4")]
    assert first.bad + second.bad == 5
    with path.open("a") as file:
        file.write("not of a book\n")
    resumed = Ledger(path, max_rate=1.0)
    for reason, source in (("torn \u00e4", "a"), ("gone", "a"), ("torn \u00e4", "b")):
        resumed.reject(RowRejected(reason, source, 4), 1)
    assert path.read_text().count("\n") == 5


def test_a_small_set_stops_too(tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    mixture(tmp_path, 8, {2, 5})
    train = TrainConfig(output_dir=str(tmp_path), max_steps=1, lr=1.0, batch_size=2)
    made = open_loader(DataConfig("data.yaml", workers=0), train, encoder, 8, tmp_path, None)
    with pytest.raises(ValueError, match="2 of 8 draws were of rows that are rejected"):
        list(itertools.islice(made, 20))
    report_rejected(made.ledger)
    assert f"2 of 8 rows rejected, see {tmp_path / 'rejected.jsonl'}" in caplog.text


def test_the_ranks_report_together(
    tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger()
    made = Loader(mixture(tmp_path, 8, set()), encoder, 2, ledger=ledger)
    ledger.load_state_dict({"seen": 10, "bad": 0})  # this rank met none
    monkeypatch.setattr("accessory.parallel.groups.gather_objects", lambda own, over: [own, {"seen": 12, "bad": 3}])
    with reported(made):
        pass
    assert "3 of 22 rows rejected" in caplog.text
    caplog.clear()
    with pytest.raises(KeyError), reported(made):  # a rank that fails does not wait for the others
        raise KeyError
    assert "rejected" not in caplog.text
