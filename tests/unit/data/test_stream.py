"""Streamed rows are the rows of the files, each once an epoch whoever reads them, and a run goes on in mid-shard."""

import io
import itertools
import json
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from accessory.data.encode import Encoder
from accessory.data.loader import Loader
from accessory.data.mixture import BLOCK, Mixture
from accessory.data.packing import PackingConfig
from accessory.data.parquet_stream import PIECE, Parquet
from accessory.data.shards import expand
from accessory.data.sources import FileConfig, FileSource, StreamOptions, load_sources, missing, open_source
from accessory.data.stream import Streamed
from accessory.data.template import get
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import Tokenizer
from accessory.data.walk import Walk
from accessory.data.webdataset import Tar
from accessory.schema import Picture, Sample, Turn
from tests.shards import write_tar


@pytest.fixture
def encoder(tokenizers: dict[str, Tokenizer]) -> Encoder:
    return Encoder(tokenizers["json"], get("chatml_plain"), TilingConfig(8), 2, 500)


def said(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{i}" + "x" * (i % 7)},
                         {"role": "assistant", "content": f"answer {i}."}]}  # fmt: skip


def write(folder: Path, kind: str, counts: Sequence[int], group: int = 7) -> str:
    """Shards with rows 0, 1, ... of :func:`said`, so many in each; their path."""
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count()
    for s, count in enumerate(counts):
        rows = [said(next(number)) for _ in range(count)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{s:02}.parquet", row_group_size=group)
        else:
            write_tar(folder / f"part-{s:02}.tar", [{"json": json.dumps(r).encode()} for r in rows])
    return str(folder / ("part-*.parquet" if kind == "parquet" else f"part-{{00..{len(counts) - 1:02}}}.tar"))


def stream(path: str, kind: Any, cache: Path, buffer: int = 16, lanes: int = 1, **more: Any) -> FileSource:
    config = FileConfig("messages", path, format=kind, stream=StreamOptions(buffer, lanes), **more)
    made = open_source(config, cache=cache)
    assert isinstance(made, FileSource)
    return made


def answers(encoder: Encoder, batches: Sequence[Any]) -> list[int]:
    texts = [encoder.tokenizer.decode(ids[mask].tolist()) for b in batches for ids, mask in zip(b.ids, b.mask)]
    return [int(t.rsplit("answer ", 1)[1].split(".")[0]) for t in texts]


def test_braces_are_names() -> None:
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand("{x,{y,z}}") == ["x", "y", "z"]
    for wrong in ("{x}", "{3..1}", "{a..c}"):
        with pytest.raises(ValueError, match="path: "):
            expand(wrong)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_streamed_rows_are_those_of_a_file(tmp_path: Path, kind: str) -> None:
    lines = "\n".join(json.dumps(said(i)) for i in range(20))
    (tmp_path / "rows.jsonl").write_text(lines)
    listed = open_source(FileConfig("messages", str(tmp_path / "rows.jsonl")))
    streamed = stream(write(tmp_path, kind, [9, 1, 10]), kind, tmp_path)
    assert [listed[i].turns for i in range(20)] == [streamed[i].turns for i in range(len(streamed))]
    assert listed[0].turns != streamed[1].turns
    shard, row = streamed.where(9)
    assert "part-01." in shard
    assert row == 0


def test_pictures_come_as_bytes(tmp_path: Path) -> None:
    data = []
    for colour in ("red", "blue"):
        made = io.BytesIO()
        Image.new("RGB", (6, 4), colour).save(made, "PNG")
        data.append(made.getvalue())
    longest = "long/" * 30 + "name"  # needs an extended header
    samples: list[Mapping[str, bytes]] = [{"png": d, "txt": c.encode()} for d, c in zip(data, ("rot", "größe"))]
    write_tar(tmp_path / "t.tar", samples, ("a", longest), format=tarfile.PAX_FORMAT)
    write_tar(tmp_path / "g.tar", samples, ("a", longest), format=tarfile.GNU_FORMAT)
    table = pa.table({"picture": [{"bytes": d, "path": "x.png"} for d in data], "caption": ["rot", "größe"]})
    pq.write_table(table, tmp_path / "t.parquet")
    for name, kind, columns in (("t.tar", "webdataset", {}), ("g.tar", "webdataset", {"caption": "txt"}),
                                ("t.parquet", "parquet", {"image": "picture"})):  # fmt: skip
        kinds: Any = kind
        source = open_source(
            FileConfig("describe", str(tmp_path / name), format=kinds, columns=columns), cache=tmp_path
        )
        for i, (colour, caption) in enumerate(((255, 0, 0), "rot") if j == 0 else ((0, 0, 255), "größe")
                                              for j in range(2)):  # fmt: skip
            asked, answer = source[i].turns
            picture = asked.parts[0]
            assert isinstance(picture, Picture)
            assert isinstance(picture.source, Image.Image)
            assert (picture.source.getpixel((0, 0)), answer.text) == (colour, caption)


@pytest.mark.parametrize(("kind", "lanes"), [("webdataset", 1), ("webdataset", 3), ("parquet", 1), ("parquet", 2)])
def test_ranks_and_workers_share_an_epoch(tmp_path: Path, encoder: Encoder, kind: str, lanes: int) -> None:
    """Two shards of unequal length, as few as one shard for two ranks; and the order is nobody's number of ranks."""
    source = stream(write(tmp_path, kind, [41, 19]), kind, tmp_path, lanes=lanes)
    mixture = Mixture([source], seed=3)
    orders = []
    for world, workers in itertools.product((1, 2, 3), (0, 2)):
        read = []
        for rank in range(world):
            made = Loader(mixture, encoder, 5, num_workers=workers, rank=rank, world=world)
            read.append(answers(encoder, list(itertools.islice(made, 60 // 5 // world))))
        orders.append([row for together in zip(*read, strict=True) for row in together])
    assert sorted(orders[0]) == list(range(60))
    assert orders[0] != sorted(orders[0])
    assert all(order == orders[0] for order in orders)
    epochs = answers(encoder, list(itertools.islice(Loader(mixture, encoder, 5), 24)))
    assert sorted(epochs[60:]) == list(range(60))
    assert epochs[60:] != epochs[:60]
    assert answers(encoder, list(itertools.islice(Loader(Mixture([source], seed=4), encoder, 5), 12))) != orders[0]


@pytest.mark.parametrize(("kind", "packs"), [("webdataset", None), ("parquet", None), ("parquet", 100)])
def test_every_cut_goes_on_with_the_next_row(tmp_path: Path, encoder: Encoder, kind: str, packs: int | None) -> None:
    path = write(tmp_path, kind, [7, 5, 8])
    packing = None if packs is None else PackingConfig(length=packs)

    def loader(workers: int = 0) -> Loader:
        mixture = Mixture([stream(path, kind, tmp_path, 6)], 1)
        return Loader(mixture, encoder, 2, window=3, num_workers=workers, packing=packing)

    expected = answers(encoder, list(itertools.islice(loader(), 16)))
    for cut in range(1, 16):
        first, second = loader(), loader(workers=1 if cut == 7 else 0)
        before = answers(encoder, list(itertools.islice(first, cut)))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + answers(encoder, list(itertools.islice(second, 16 - cut))) == expected
    other = Loader(Mixture([stream(path, kind, tmp_path, 7)], 1), encoder, 2, window=3, packing=packing)
    with pytest.raises(ValueError, match="data changed"):
        other.load_state_dict(loader().state_dict())


def test_shares_hold_between_streams_and_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(said(0)) + "\n")
    (tmp_path / "data.yaml").write_text(f"""sources:
  - {{kind: messages, path: rows.jsonl, weight: 3}}
  - {{kind: messages, path: "{Path(write(tmp_path, "webdataset", [5, 6])).name}", format: webdataset, weight: 5}}
  - kind: messages
    path: "{write(tmp_path / "b", "parquet", [9])}"
    format: parquet
    stream: {{buffer: 4}}
    weight: 2
""")
    mixture = Mixture(load_sources(tmp_path / "data.yaml", cache=tmp_path), 0)
    seen = Counter(mixture.draw(k).source for k in range(2 * BLOCK))
    assert all(abs(seen[s] / (2 * BLOCK) - share) < 2 / BLOCK for s, share in enumerate((0.3, 0.5, 0.2)))
    rows = [d.row for d in map(mixture.draw, range(2 * BLOCK)) if d.source == 1]
    assert all(sorted(rows[i : i + 11]) == list(range(11)) for i in range(0, len(rows) - 11, 11))


def test_a_lane_is_a_run_of_neighbours() -> None:
    """Of four ranks each reads a part of its own; without lanes all read everywhere."""

    class Rows:
        name, weight, unbounded = "rows", 1.0, False

        def __init__(self, lanes: int) -> None:
            self.walk = Walk(["a", "b", "c"], [400, 300, 100], 200, lanes)

        def __len__(self) -> int:
            return self.walk.rows

        def __getitem__(self, index: int) -> Any:
            raise AssertionError

    for lanes, widest in ((4, 60), (1, 190)):
        mixture = Mixture([Rows(lanes), Rows(1)], 0)
        draws = [(k, mixture.draw(k).row) for k in range(3 * BLOCK) if mixture.draw(k).source == 0]
        assert sorted(row for _, row in draws[:800]) == list(range(800))
        spans = []
        for start in range(0, 800, 200):
            for lane in range(4):
                of = [row for k, row in draws[start : start + 200] if k % 4 == lane]
                spans.append(max(of) - min(of))
        assert (np.median(spans) < widest) == (lanes == 4)
        assert (np.median(spans) >= 190) == (lanes == 1)


def test_no_more_rows_are_held_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of 2000 rows is passed once and never held."""
    source = stream(write(tmp_path, "parquet", [2000], group=2000), "parquet", tmp_path, buffer=256)
    assert isinstance(source._rows, Streamed)
    reader = source._rows._reader
    assert isinstance(reader, Parquet)
    passes: list[int] = []
    tables = Parquet._tables
    monkeypatch.setattr(Parquet, "_tables", lambda self, *place: passes.append(1) or tables(self, *place))
    mixture, most = Mixture([source], 0), 0
    for k in range(2000):
        mixture.sample(k)
        most = max(most, sum(len(piece) for piece in reader.held.values()))
    assert most <= 256 + 2 * PIECE
    assert len(passes) == 1
    mixture.sample(0)  # behind where the reader stands
    assert len(passes) == 2


def test_a_window_is_ready_when_it_is_asked_for(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 3 ms and steps of 8 ms for two rows: none need wait, but a queue shorter than a window would run dry."""

    class Slow:
        name, weight, unbounded = "slow", 1.0, False

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Sample:
            time.sleep(0.003)
            return Sample((Turn("user", ("q",)), Turn("assistant", ("a",))), self.name, index)

    def waited() -> float:
        batches = iter(Loader(Mixture([Slow()]), encoder, 2, num_workers=1, window=64))
        next(batches)
        total = 0.0
        for _ in range(190):
            time.sleep(0.008)
            begin = time.monotonic()
            next(batches)
            total += time.monotonic() - begin
        return total

    ready = waited()
    monkeypatch.setattr(Loader, "_ahead", lambda self: 2)
    assert ready < 0.5 * waited()


def test_an_index_is_made_once_for_a_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "webdataset", [4, 3])
    scanned: list[str] = []
    scan = Tar.scan
    monkeypatch.setattr(Tar, "scan", lambda self, shard: scanned.append(Path(shard.url).name) or scan(self, shard))
    assert [len(stream(path, "webdataset", tmp_path)) for _ in range(2)] == [7, 7]
    assert sorted(scanned) == ["part-00.tar", "part-01.tar"]
    write_tar(tmp_path / "part-01.tar", [{"json": b"{}"}] * 5)
    assert len(stream(path, "webdataset", tmp_path)) == 9
    assert scanned[2:] == ["part-01.tar"]


def test_what_fsspec_carries_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "webdataset", [4, 3])
    fs = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.tar"):
        fs.pipe(f"/bucket/{file.name}", file.read_bytes())
    far = stream("memory://bucket/part-*.tar", "webdataset", tmp_path)
    near = stream(path, "webdataset", tmp_path)
    assert [far[i].turns for i in range(7)] == [near[i].turns for i in range(7)]
    assert far.where(5)[0] == "memory:///bucket/part-01.tar: 000001"
    (tmp_path / "data.yaml").write_text("- {kind: messages, path: memory://bucket/part-00.tar, format: webdataset}\n")
    assert len(load_sources(tmp_path / "data.yaml", cache=tmp_path)[0]) == 4


def test_what_is_wrong_is_said_before_training(tmp_path: Path) -> None:
    write(tmp_path, "webdataset", [2, 2])
    packed = tmp_path / "x.tar.gz"
    with tarfile.open(packed, "w:gz"):
        pass
    config: Any
    for config, message in (
        ({"path": str(tmp_path / "part-{00..02}.tar")}, "no shard at .*part-02.tar"),
        ({"path": str(packed)}, "x.tar.gz is compressed"),
        ({"path": "memory://nowhere/*.tar"}, "no shard at memory://nowhere"),
        ({"path": "nosuch://a/*.tar"}, "cannot be listed"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(FileConfig("text", format="webdataset", **config), cache=tmp_path)
    gone = FileConfig("text", str(tmp_path / "part-{01..02}.tar"), format="webdataset", get="the attic")
    assert missing(gone) == f"no shard at {tmp_path}/part-02.tar; put it there, it comes from: the attic"
    assert missing(FileConfig("text", "memory://nowhere/*.tar", format="webdataset")) is None  # nobody looks there yet
    with pytest.raises(ValueError, match="format: 'file' reads local files"):
        FileConfig("text", path="s3://a/b.parquet")
    with pytest.raises(ValueError, match="buffer is 0"):
        StreamOptions(0)


def test_the_library_reads_the_same_rows(tmp_path: Path) -> None:
    """``datasets`` tells the shards of a split. It streams the same rows, but goes on from a shuffle with others: that
    is why rows are found by an index here."""
    datasets = pytest.importorskip("datasets")
    for split, counts in (("train", [9, 4]), ("test", [3])):
        rows = iter(range(100))
        (tmp_path / split).mkdir()
        for s, count in enumerate(counts):
            table = pa.Table.from_pylist([said(next(rows)) for _ in range(count)])
            pq.write_table(table, tmp_path / split / f"{s}.parquet")
    ours = stream(str(tmp_path), "parquet", tmp_path / "cache", split="train")
    theirs = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert isinstance(ours._rows, Streamed)
    assert [ours._rows[i] for i in range(len(ours))] == list(theirs)
    assert len(stream(str(tmp_path), "parquet", tmp_path / "cache", split="test")) == 3
    with pytest.raises(ValueError, match="has no 'dev', it has"):
        stream(str(tmp_path), "parquet", tmp_path / "cache", split="dev")
    mixed = theirs.shuffle(seed=0, buffer_size=6)
    walked = iter(mixed)
    before = [next(walked)["messages"][1]["content"] for _ in range(5)]
    again = theirs.shuffle(seed=0, buffer_size=6)
    again.load_state_dict(mixed.state_dict())
    assert sorted([*before, *(r["messages"][1]["content"] for r in again)]) != sorted(f"answer {i}." for i in range(13))
