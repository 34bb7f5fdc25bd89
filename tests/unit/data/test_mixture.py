"""Draw k depends on the seed and k alone; batches do not depend on workers; resuming is exact."""

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from accessory.data.encode import Encoder
from accessory.data.loader import Loader
from accessory.data.mixture import BLOCK, Ledger, Mixture
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, open_source
from accessory.data.template import get
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer
from accessory.schema import Batch, Sample, Turn


class Rows:
    """Text rows of varied length; those in ``bad`` are rejected."""

    def __init__(self, name: str, n: int, weight: float = 1.0, bad: tuple[int, ...] = (), unbounded: bool = False):
        self.name, self.n, self.weight, self.bad, self.unbounded = name, n, weight, bad, unbounded

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise RowRejected("broken", self.name, index)
        said = Turn("user", (f"{self.name} {index} " + "x" * (index % 13),))
        return Sample((said, Turn("assistant", (str(index),))), self.name, index)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture([Rows("a", 50, 3.0, bad=(7,)), Rows("b", 9, 1.0, unbounded=True)], seed=5)


@pytest.fixture
def encoder(tokenizers: dict[str, Tokenizer]) -> Encoder:
    return Encoder(tokenizers["json"], get("chatml_plain"), TilingConfig(8), 2, 500)


def batches(made: Loader, n: int) -> list[Batch]:
    return list(itertools.islice(iter(made), n))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.ids.shape == b.ids.shape and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right)
    )


def test_draws_are_a_function_of_their_number(mixture: Mixture) -> None:
    forward = [mixture.draw(k) for k in range(3000)]
    again = Mixture(mixture.sources, seed=5)
    assert [again.draw(k) for k in reversed(range(3000))] == forward[::-1]
    other = Mixture(mixture.sources, seed=6)
    assert [other.draw(k) for k in range(3000)] != forward


def test_weights_hold_in_every_block() -> None:
    made = Mixture([Rows("a", 5, 0.7), Rows("b", 5, 0.2), Rows("c", 5, 0.1), Rows("d", 5, 1e-9)])
    for block in range(3):
        seen = Counter(made.draw(k).source for k in range(block * BLOCK, (block + 1) * BLOCK))
        for source, share in enumerate((0.7, 0.2, 0.1, 1 / BLOCK)):
            assert abs(seen[source] - share * BLOCK) <= 1.1


def test_each_source_walks_whole_epochs(mixture: Mixture) -> None:
    rows = [d.row for d in (mixture.draw(k) for k in range(2000)) if d.source == 0]
    epochs = [rows[i : i + 50] for i in range(0, len(rows) - 50, 50)]
    assert len(epochs) > 20
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1]


def test_unbounded_sources_get_the_epoch_in_the_row(mixture: Mixture) -> None:
    rows = [d.row for d in (mixture.draw(k) for k in range(500)) if d.source == 1]
    assert [r // 9 for r in rows] == [i // 9 for i in range(len(rows))]
    assert len(set(rows)) == len(rows) > 100


def test_bad_rows_are_skipped_and_booked(mixture: Mixture, encoder: Encoder, tmp_path: Path) -> None:
    made = Loader(mixture, encoder, 5, ledger=Ledger(tmp_path / "ledger.jsonl"))
    got = [encoder.tokenizer.decode(i[m].tolist()) for b in batches(made, 60) for i, m in zip(b.ids, b.mask)]
    assert len(got) == 300
    assert not any("a 7 " in row for row in got)
    assert any("a 8 " in row for row in got)
    assert made.ledger.bad >= 3
    assert made.state_dict()["step"] == made.ledger.seen == 300 + made.ledger.bad
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 1  # of the same row in every epoch
    assert '"source": "a", "row": 7, "reason": "broken"' in lines[0]


def test_an_entry_that_was_torn_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"draw": 1, "source": "a", "row": 3, "reason": "broken"}\n{"draw": 2, "source": "a", "ro')
    for _ in range(2):  # two ranks
        book = Ledger(path, max_rate=1.0)
        for row in (3, 5, 5):
            book.reject(RowRejected("broken", "a", row), 9)
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["row"] for line in whole] == [3, 5]


def test_changed_data_is_refused_on_resume(mixture: Mixture, encoder: Encoder) -> None:
    state = Loader(mixture, encoder, 4).state_dict()
    for other in (Mixture(mixture.sources, seed=6), Mixture([Rows("a", 51, 3.0), *mixture.sources[1:]], seed=5)):
        with pytest.raises(ValueError, match="data changed"):
            Loader(other, encoder, 4).load_state_dict(state)


def test_files_are_known_by_name_and_size(tmp_path: Path, encoder: Encoder) -> None:
    def over(folder: Path, answer: str) -> Loader:
        folder.mkdir(exist_ok=True)
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return Loader(Mixture([open_source(FileConfig("messages", path=str(folder / "rows.jsonl")))]), encoder, 4)

    state = over(tmp_path / "a", "one").state_dict()
    over(tmp_path / "moved", "one").load_state_dict(state)
    with pytest.raises(ValueError, match="data changed"):
        over(tmp_path / "a", "eleven").load_state_dict(state)


def test_batches_do_not_depend_on_the_number_of_workers(mixture: Mixture, encoder: Encoder) -> None:
    alone = batches(Loader(mixture, encoder, 5), 30)
    assert same(alone, batches(Loader(mixture, encoder, 5, num_workers=2), 30))
    other = Mixture(mixture.sources, seed=6)
    assert not same(alone, batches(Loader(other, encoder, 5), 30))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("at", [1, 6, 8])
def test_loader_resumes_at_the_batch_consumed(mixture: Mixture, encoder: Encoder, window: int, at: int) -> None:
    whole = Loader(mixture, encoder, 4, window=window)
    expected = batches(whole, 20)
    first = Loader(mixture, encoder, 4, num_workers=1 if at == 6 else 0, window=window)
    assert same(batches(first, at), expected[:at])
    second = Loader(Mixture(mixture.sources, seed=5), encoder, 4, window=window)
    second.load_state_dict(first.state_dict())
    assert same(batches(second, 20 - at), expected[at:])
    assert second.ledger.state_dict() == whole.ledger.state_dict()


def test_a_resume_into_another_stream_is_refused(mixture: Mixture, encoder: Encoder) -> None:
    state = Loader(mixture, encoder, 4).state_dict()
    with pytest.raises(ValueError, match="same batch_size: 4 then, 5 now"):
        Loader(mixture, encoder, 5).load_state_dict(state)


def test_window_groups_by_length_and_keeps_every_row(mixture: Mixture, encoder: Encoder) -> None:
    plain, grouped = batches(Loader(mixture, encoder, 4), 40), batches(Loader(mixture, encoder, 4, window=8), 40)

    def padding(found: list[Batch]) -> int:
        return sum(int((~b.mask).sum()) for b in found)

    def rows(found: list[Batch]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(i[m].tolist()) for b in found for i, m in zip(b.ids, b.mask))

    assert rows(plain) == rows(grouped)
    assert padding(grouped) < 0.5 * padding(plain)


def test_ranks_share_the_stream(mixture: Mixture, encoder: Encoder) -> None:
    seen = [Counter(tuple(i[m].tolist()) for b in batches(Loader(mixture, encoder, 8, rank=r, world=2), 10)
                    for i, m in zip(b.ids, b.mask)) for r in range(2)]  # fmt: skip
    alone = Counter(tuple(i[m].tolist()) for b in batches(Loader(mixture, encoder, 8), 18)
                    for i, m in zip(b.ids, b.mask))  # fmt: skip
    assert not alone - (seen[0] + seen[1])


@pytest.mark.parametrize("window", [1, 3])
def test_other_ranks_go_on_and_no_row_comes_twice_or_never(mixture: Mixture, encoder: Encoder, window: int) -> None:
    """2 ranks, then 3, then 1, wherever each of them stood."""
    seen: Counter[tuple[int, ...]] = Counter()
    states: list[dict[str, Any]] = []
    for counts in ((7, 4), (1, 0, 5), (21,)):  # the last has read all that was left
        loaders = [Loader(mixture, encoder, 4, window=window, rank=r, world=len(counts)) for r in range(len(counts))]
        for made, count in zip(loaders, counts, strict=True):
            if states:
                made.load_state_dict(made.dealt_anew(states))
                assert made.state_dict()["deal"][0]  # without them rows would be lost
            seen.update(tuple(i[m].tolist()) for b in batches(made, count) for i, m in zip(b.ids, b.mask))
        states = [made.state_dict() for made in loaders]
    rows: Counter[tuple[int, ...]] = Counter()
    for k in itertools.count():
        if rows.total() == seen.total():
            break
        with contextlib.suppress(RowRejected):
            rows[tuple(encoder.encode(mixture.sample(k)).ids.tolist())] += 1
    assert seen == rows
    assert sum(state["ledger"]["seen"] for state in states) == k


def test_a_rank_goes_on_in_the_middle_of_what_was_dealt_anew(mixture: Mixture, encoder: Encoder) -> None:
    first = [Loader(mixture, encoder, 4, window=2, rank=r, world=2) for r in range(2)]
    for made, count in zip(first, (5, 2), strict=True):
        batches(made, count)
    whole, half, rest = (Loader(mixture, encoder, 4, window=2) for _ in range(3))
    for made in (whole, half):
        made.load_state_dict(made.dealt_anew([m.state_dict() for m in first]))
    expected = batches(whole, 9)
    assert same(batches(half, 3), expected[:3])
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert same(batches(rest, 6), expected[3:])


def test_bad_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="without rows: a"):
        Mixture([Rows("a", 0)])
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([])
    with pytest.raises(ValueError, match="weights"):
        Mixture([Rows("a", 1, -1.0)])
