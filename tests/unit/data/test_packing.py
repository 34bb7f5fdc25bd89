"""Documents packed into rows, samples into packs: nothing is lost, and training reads them."""

import itertools
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.data import template
from accessory.data.encode import Encoder
from accessory.data.files import open_rows
from accessory.data.loader import Loader
from accessory.data.mixture import Ledger, Mixture
from accessory.data.packing import PackingConfig, documents, knapsack, pack, write_packed
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, open_source
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import load
from accessory.schema import IDS, Batch, Encoded, Sample
from tests.tiny import tiny_tokenizer
from tools.pack_text import main

TEXTS = ["The word is moon.", "", "A long text about birds, boats and two blue stars. " * 5, "The end"]


def texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t, "content": t.upper()}) + "\n" for t in TEXTS))
    return path


def test_nothing_is_lost_and_rows_are_full() -> None:
    given = [[1, 2, 3, 9], [9], list(range(10, 31)), [4, 9]]
    rows = list(pack(given, 8))
    assert list(chain(*rows)) == list(chain(*given))
    assert [len(r) for r in rows] == [8, 8, 8, 4]
    assert list(pack([], 8)) == []
    with pytest.raises(ValueError, match="rows of 1 positions"):
        list(pack(given, 1))


def test_packed_rows_are_learned_whole(tmp_path: Path) -> None:
    words = load(tiny_tokenizer(tmp_path))
    out = tmp_path / "packed.jsonl"
    count = write_packed([texts(tmp_path)], out, words, 16)
    source = open_source(FileConfig("packed", str(out)))
    assert len(source) == count > 3
    encode = Encoder(words, template.get("plain"), TilingConfig(size=8), 1, 16)
    rows = [encode.encode(source[i]) for i in range(count)]
    assert all(torch.equal(r.ids, r.labels) for r in rows)
    assert all(len(r.ids) == 16 for r in rows[:-1])
    whole = [i for r in rows for i in r.ids.tolist()]
    assert whole == [i for d in documents(texts(tmp_path), words) for i in d]
    assert words.decode(whole) == "".join(TEXTS)
    assert whole.count(words.special("eos")) == len(TEXTS)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    words = load(tiny_tokenizer(tmp_path))
    encode = Encoder(words, template.get("plain"), TilingConfig(size=8), 1, 4)
    with pytest.raises(RowRejected, match="the limit is 4"):
        encode.encode(Sample((), meta={IDS: [5, 6, 7, 8, 9]}))
    with pytest.raises(RowRejected, match="not in this vocabulary"):
        encode.encode(Sample((), meta={IDS: [5, words.vocab_size]}))
    path = tmp_path / "bad.jsonl"
    for bad in ([1, -2], [1], "text", [1.5, 2], None):
        path.write_text(json.dumps({"ids": bad}) + "\n")
        with pytest.raises(RowRejected, match="at least two ids"):
            _ = open_source(FileConfig("packed", str(path)))[0]


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = tiny_tokenizer(tmp_path).parent, tmp_path / "o.jsonl"
    given = [str(out), str(texts(tmp_path)), "--tokenizer", str(words), "--length", "32"]
    assert main([*given, "--column", "content"]) == 0
    assert f"{len(open_rows(out))} rows" in capsys.readouterr().out
    assert main(given) == 1
    assert "must be a new file" in capsys.readouterr().err
    out.unlink()
    assert main([*given, "--column", "words"]) == 1
    assert "no text in column 'words' (columns are: text, content)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if "o.jsonl" in p.name] == []


# --- samples in packs -------------------------------------------------------------------------------------------------

PACKS = PackingConfig(length=100, tiles=4)


class Sized:
    """Rows of text (their number, repeated) of 2 to 40 positions, some with up to three tiles."""

    weight, unbounded, name = 1.0, False, "sized"

    def __init__(self, n: int, long: tuple[int, ...] = ()) -> None:
        self.n, self.long = n, long

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        return Sample((), self.name, index)

    def encode(self, sample: Sample) -> Encoded:
        i = sample.index
        positions, tiles = 2 + i * 7 % 39 + 200 * (i in self.long), max(0, i % 7 - 3)
        ids = torch.full((positions,), i)
        return Encoded(ids, ids.clone(), torch.full((tiles, 3, 1, 1), float(i)), sample.source, i)

    tile_size, pad_id = 1, 0


def loader(rows: Sized, batch_size: int = 2, packing: PackingConfig | None = PACKS, **options: object) -> Loader:
    given = {"window": 3, "packing": packing, **options}
    return Loader(Mixture([rows], seed=4), rows, batch_size, **given)  # type: ignore[arg-type, list-item]


def drawn(batch: Batch) -> list[int]:
    return [int(ids[0]) for ids in batch.ids]


def take(made: Loader, n: int) -> list[Batch]:
    return list(itertools.islice(made, n))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.ids, y.ids) and torch.equal(x.tiles, y.tiles) for x, y in zip(a, b))


def test_knapsack_fills_packs_and_loses_nothing() -> None:
    sizes = [(int(n), int(t)) for n, t in np.random.default_rng(0).integers((2, 0), (41, 2), (300, 2))]
    for tiles in (None, 40, 3):
        config = PackingConfig(400, tiles)
        packs = knapsack(sizes, config)
        assert sorted(chain(*packs)) == list(range(300))
        used = [tuple(sum(sizes[i][k] for i in pack) for k in (0, 1)) for pack in packs]
        assert all(n <= 400 and (tiles is None or t <= tiles) for n, t in used)
        full = sorted(config.share(*u) for u in used)[1:]  # the last one holds what is left
        assert np.mean(full) > (0.95 if tiles == 3 else 0.99)
    early = [k for k, pack in enumerate(knapsack(sizes, PackingConfig(400), 20)) if min(pack) < 20]
    assert early == list(range(max(early) + 1))
    assert knapsack([], PackingConfig(4)) == []
    for wrong in ((1, None), (8, 0)):
        with pytest.raises(ValueError, match=r"data\.packing"):
            PackingConfig(*wrong)


def test_every_row_of_an_epoch_is_packed_once() -> None:
    made, rows = loader(Sized(500)), 0
    seen: Counter[int] = Counter()
    waits: list[set[int]] = []
    for batch in itertools.islice(made, 80):
        tiles = Counter(batch.tiles[:, 0, 0, 0].int().tolist())
        assert batch.packed
        assert int(batch.mask.sum()) <= 2 * PACKS.length
        assert all(tiles[i] == max(0, i % 7 - 3) * c for i, c in Counter(drawn(batch)).items())
        assert len(batch.tiles) <= 2 * 4
        seen += Counter(drawn(batch))
        rows += len(batch.ids)
        state = made.state_dict()
        if state["given"] == 0:
            waits.append(set(state["held"]))
            assert state["step"] == rows + len(state["held"])
            waiting = Counter(made.mixture.draw(k).row for k in state["held"])
            assert Counter(made.mixture.draw(k).row for k in range(state["step"])) == seen + waiting
    assert any(waits)
    assert not any(a & b for a, b in itertools.pairwise(waits))  # none waits twice
    assert rows > 500
    assert made.filled is not None
    assert made.filled > 0.75  # tiles are scarce here
    plenty = loader(Sized(500), packing=PackingConfig(100))
    take(plenty, 60)
    assert plenty.filled is not None
    assert plenty.filled > 0.98


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_packing_resumes_with_what_waits(at: int) -> None:
    expected = take(loader(Sized(90)), 30)
    first = loader(Sized(90), num_workers=at % 2)
    assert equal(take(first, at), expected[:at])
    state = json.loads(json.dumps(first.state_dict()))  # as a checkpoint keeps it
    second = loader(Sized(90))
    second.load_state_dict(state)
    assert equal(take(second, 30 - at), expected[at:])
    # And it matters: without what waits the packs are others.
    assert state["held"] or at < 3
    if state["held"]:
        third = loader(Sized(90))
        third.load_state_dict({**state, "held": []})
        assert not equal(take(third, 30 - at), expected[at:])
    for other in (PackingConfig(101, 4), None):
        with pytest.raises(ValueError, match="same packing"):
            loader(Sized(90), packing=other).load_state_dict(state)


def test_other_ranks_go_on_with_what_waits_in_these() -> None:
    """2 ranks in the middle of windows, then 1: every row of what was drawn is in one pack, or waits."""
    seen: Counter[int] = Counter()
    first = [loader(Sized(500), rank=rank, world=2) for rank in range(2)]
    for made, count in zip(first, (5, 3), strict=True):
        seen.update(i for batch in take(made, count) for i in drawn(batch))
    states = [made.state_dict() for made in first]
    assert any(state["held"] for state in states)
    assert any(state["taken"] for state in states)
    last = loader(Sized(500))
    last.load_state_dict(json.loads(json.dumps(last.dealt_anew(states))))
    for number, batch in enumerate(last):
        seen.update(drawn(batch))
        if number >= 20 and last.state_dict()["given"] == 0:
            break
    state = last.state_dict()
    left, start = state["deal"]
    assert left
    end = start + state["step"] - len(left)
    waiting = Counter(last.mixture.draw(k).row for k in state["held"])
    assert Counter(last.mixture.draw(k).row for k in range(end)) == seen + waiting
    assert last.ledger.seen == (seen + waiting).total()


def test_what_fits_no_pack_is_booked_and_not_cut(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rejected.jsonl", max_rate=1.0)
    long, tight = Sized(100, long=(17, 55)), PackingConfig(100, 2)
    batches = take(loader(long, ledger=ledger, packing=tight), 30)
    booked = {(b["row"], b["reason"]) for b in map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())}
    assert (17, f"{2 + 17 * 7 % 39 + 200} positions, a pack holds 100 (data.packing.length)") in booked
    assert (6, "3 tiles, a pack holds 2 (data.packing.tiles)") in booked
    assert {row for row, _ in booked} == {17, 55} | {i for i in range(100) if i % 7 == 6}
    seen = set(chain(*map(drawn, batches)))
    assert seen == set(range(100)) - {row for row, _ in booked}
    lengths = {int(m.sum()) for b in batches for m in b.mask}
    assert lengths <= {2 + i * 7 % 39 for i in range(100)}
    assert set(chain(*map(drawn, take(loader(long, 20, None), 20)))) >= {17, 55}


# --- buckets of equal length ------------------------------------------------------------------------------------------


def test_buckets_keep_tails_and_shuffle_every_epoch() -> None:
    """50 rows in batches of 3 over 2 ranks: no number divides another."""
    ranks = [loader(Sized(50), 3, None, window=4, rank=r, world=2) for r in range(2)]
    streams = [[i for b in take(made, 40) for i in drawn(b)] for made in ranks]
    mixture = ranks[0].mixture
    epochs = [[mixture.draw(k).row for k in range(e * 50, e * 50 + 50)] for e in range(4)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    drawn_by = [[mixture.draw(2 * k + r).row for k in range(len(streams[r]))] for r in range(2)]
    assert [Counter(s) for s in streams] == [Counter(d) for d in drawn_by]


def test_ranks_get_rows_of_similar_length() -> None:
    """Even where ranks rejected different rows, so that their draws are no longer in step."""

    class Rejecting(Sized):
        def encode(self, sample: Sample) -> Encoded:
            if sample.index in self.long:
                raise RowRejected("broken", self.name, sample.index)
            return super().encode(sample)

    def apart(window: int) -> float:
        rows = Rejecting(997, long=tuple(range(3, 997, 10)))
        ranks = [
            take(loader(rows, 4, None, window=window, rank=r, world=4, ledger=Ledger(max_rate=1.0)), 64)
            for r in range(4)
        ]
        longest = np.array([[b.ids.shape[1] for b in rank] for rank in ranks])
        return float((longest.max(0) - longest.min(0)).mean())

    assert apart(16) < 0.4 * apart(1)


def test_states_of_an_earlier_version_are_taken_where_they_say_enough() -> None:
    made = loader(Sized(90), 2, None, window=3)
    expected = take(made, 20)
    old = {"step": 12, "given": 1, "ledger": {"seen": 12, "bad": 0}, "batch_size": 2, "window": 3, "world": 1}
    old["fingerprint"] = made.mixture.fingerprint()
    again = loader(Sized(90), 2, None, window=3)
    again.load_state_dict(old)
    assert equal(take(again, 13), expected[7:])
    with pytest.raises(ValueError, match="dealt rows otherwise from draw 13"):
        again.load_state_dict({**old, "step": 13})
