"""Damaged shards and 500 generated bad rows: each is booked with its place or is an error, and the good rows arrive."""

import io
import itertools
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from accessory.data.encode import Encoder
from accessory.data.loader import Loader
from accessory.data.mixture import Ledger, Mixture
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, load_sources, open_source
from tests.shards import write_tar


def said(i: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>q{i}"}, {"from": "gpt", "value": f"answer {i}."}]


def verdicts(path: Path, kind: Any) -> list[str]:
    """Of every row of a text stream its text, or the place and the reason why not."""
    source = open_source(FileConfig("text", str(path), format=kind), cache=path.parent)
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].turns[0].text)
        except RowRejected as rejected:
            found.append(str(rejected))
    return found


TEXTS = [f"row {i}" for i in range(6)]


def texts(path: Path) -> bytes:
    write_tar(path, [{"txt": t.encode()} for t in TEXTS])
    return path.read_bytes()


def test_a_tar_that_was_cut_anywhere(tmp_path: Path) -> None:
    """A member is a header and a block, so that row i ends at byte 1024 (i + 1); the mark of the end follows."""
    whole = texts(tmp_path / "whole.tar")
    assert verdicts(tmp_path / "whole.tar", "webdataset") == TEXTS
    for cut in (*range(0, 6 * 1024 + 1, 256), 5 * 1024 + 515, 5 * 1024 + 517):
        path = tmp_path / f"cut-{cut}.tar"
        path.write_bytes(whole[:cut])
        found = verdicts(path, "webdataset")
        # The last block needs only as much as the text has.
        kept = next((i for i in range(6) if cut < 1024 * i + 512 + len(TEXTS[i])), 6)
        assert found[:kept] == TEXTS[:kept]
        assert len(found) == kept + 1
        assert found[kept].startswith(str(path))
        assert "lost" in found[kept]


def test_what_a_damaged_header_hits_is_one_row(tmp_path: Path) -> None:
    whole = bytearray(texts(tmp_path / "shard.tar"))
    whole[2 * 1024 : 2 * 1024 + 512] = random.Random(0).randbytes(512)
    (tmp_path / "shard.tar").write_bytes(whole)
    found = verdicts(tmp_path / "shard.tar", "webdataset")
    assert found[:2] + found[3:] == TEXTS[:2] + TEXTS[3:]
    assert "shard.tar, row 2: no tar header at byte 2048" in found[2]
    with tarfile.open(tmp_path / "shard.tar") as tar:  # which ends there without a word
        assert len(tar.getnames()) == 2


def test_tars_behind_each_other_are_one(tmp_path: Path) -> None:
    once = texts(tmp_path / "once.tar")
    (tmp_path / "twice.tar").write_bytes(once * 2)
    assert verdicts(tmp_path / "twice.tar", "webdataset") == TEXTS * 2
    with tarfile.open(tmp_path / "twice.tar") as tar:
        assert len(tar.getnames()) == 6


def test_a_member_of_random_bytes(tmp_path: Path) -> None:
    samples = [
        {"txt": b"fine"},
        {"txt": b"\xff\xfe"},
        {"json": b"{"},
        {"json": b"[" * 90_000},
        {"png": b""},
        {"a.b": b""},
    ]
    write_tar(tmp_path / "x.tar", samples)
    found = verdicts(tmp_path / "x.tar", "webdataset")
    assert found[0] == "fine"
    for i, reason in enumerate(("txt is not valid UTF-8", "valid JSON", "valid JSON", "column 'text'", "column"), 1):
        assert f"x.tar: {i:06}, row {i}: " in found[i]
        assert reason in found[i]


def test_a_row_group_of_garbage(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=2, use_dictionary=False, compression="snappy")
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    at, size = column.data_page_offset, column.total_compressed_size
    data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    found = verdicts(path, "parquet")
    assert found[:2] + found[4:] == TEXTS[:2] + TEXTS[4:]
    for row in (2, 3):
        assert f"x.parquet: row group 1, row {row}: row group 1 cannot be read from its row 0 on" in found[row]


def test_a_parquet_without_its_end_among_others(tmp_path: Path) -> None:
    for i in range(3):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / f"{i}.parquet")
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-20])
    found = verdicts(tmp_path / "*.parquet", "parquet")
    assert found[:6] + found[7:] == TEXTS * 2
    assert "1.parquet, row 0: the shard of" in found[6]
    (tmp_path / "data.yaml").write_text("- {kind: text, format: parquet, path: 1.parquet}\n")
    with pytest.raises(ValueError, match=r"cannot be used:\n.*not a parquet file"):
        load_sources(tmp_path / "data.yaml", cache=tmp_path)


def test_a_shard_that_went_away_is_booked(tmp_path: Path) -> None:
    texts(tmp_path / "x.tar")
    source = open_source(FileConfig("text", str(tmp_path / "x.tar"), format="webdataset"), cache=tmp_path)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(RowRejected, match=r"x.tar, row 4: the shard cannot be read"):
        source[4]


# --- 500 bad rows -----------------------------------------------------------------------------------------------------


def png(i: int) -> bytes:
    made = io.BytesIO()
    Image.effect_noise((24, 16 + i % 5), 60).convert("RGB").save(made, "PNG")
    return made.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that claims to be large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def tiff(value: int) -> bytes:
    """Few bytes whose directory says anything."""
    tags = ((256, value), (257, value), (258, 8), (262, 1), (273, 8), (277, 1), (278, value), (279, value))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 8) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)


MEDIA: list[Callable[[random.Random], bytes]] = [
    lambda r: png(0)[: r.randrange(1, 400)],
    lambda r: r.randbytes(r.randrange(1, 300)),
    lambda r: b"\x89PNG\r\n\x1a\n" + r.randbytes(200),
    lambda r: b"\xff\xd8\xff\xe0" + r.randbytes(200),
    lambda r: b"GIF89a" + struct.pack("<HH", 65535, 65535) + r.randbytes(60),
    lambda r: b"BM" + r.randbytes(80),
    lambda r: b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8 " + r.randbytes(100),
    lambda r: tiff(r.choice((0, 2**31, 2**32 - 1))),
    lambda r: header(r.randrange(9000, 2**31), r.randrange(9000, 2**31)),
    lambda r: header(1, r.randrange(20_000, 49_000_000)),
    lambda r: header(0, 5),
    lambda r: header(40, 40),  # of few pixels, and fewer than it says
    lambda r: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
]
DIALOGUES: list[Callable[[random.Random], Any]] = [
    lambda r: [],
    lambda r: r.choice((None, 5, 2.5, True, "text", "", {}, [[]], [None], [3], "[[", '{"a": 1}')),
    lambda r: said(1)[:1],
    lambda r: [{"from": r.choice(("alien", "", "\0")), "value": "x"}],
    lambda r: [{"from": "human"}, {"value": "x"}],
    lambda r: [said(1)[0], {"from": "gpt", "value": r.choice((None, [], {}, True))}],
    lambda r: [said(1)[0], {"from": "gpt", "value": r.choice(("", " ", "\n\t"))}],
    lambda r: [said(1)[0], {"from": "gpt", "value": "half \ud83d"}],
    lambda r: [{"from": "human", "value": "\udcff<image>"}, said(1)[1]],
    lambda r: [
        said(1)[0],
        {"from": "gpt", "value": "".join(map(chr, (r.randrange(0x4E00, 0x9FFF) for _ in range(400))))},
    ],
    lambda r: [{"from": "human", "value": r.choice(("no mark", "<image><image>"))}, said(1)[1]],
    lambda r: [*said(1), {"from": "system", "value": "late"}],
]
PLACES: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice(("gone.png", "../x.png", "/etc/passwd", ".", "a\0b.png", "\udc80.png", "loop", "ü" * 4000)),
    lambda r: r.choice((3, True, [], [[]], {"path": 5}, {"bytes": None}, ["gone.png"], {"bytes": "x", "path": None})),
    lambda r: r.choice(("http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,@@", "data:,x")),
    lambda r: "".join(chr(r.randrange(1, 0x300)) for _ in range(r.randrange(1, 300))),
]


def bad_rows(kind: str, n: int) -> list[Any]:
    """``n`` rows of which none can be used: dialogue and picture, or what stands instead of a row."""
    r = random.Random(n)
    rows: list[Any] = []
    for i in range(n):
        which = i % (4 if kind == "jsonl" else 2)
        if which == 0:
            rows.append((r.choice(DIALOGUES)(r), png(i)))
        elif which == 1:
            rows.append((said(i), r.choice(MEDIA)(r)))
        elif which == 2:
            rows.append((said(i), r.choice(PLACES)(r)))
        else:
            rows.append(r.choice((b"{", b"[" * 60_000, b"[1, 2]", b"null", b"7" * 5000, b'{"x": NaN}', b"\xff\xfe{}",
                                  r.randbytes(200).replace(b"\n", b"") + b"\xff")))  # fmt: skip
    return rows


def write(folder: Path, kind: str, rows: list[Any]) -> None:
    """Three shards of rows, as a configuration names them."""
    (folder / "loop").symlink_to("loop")
    for s in range(3):
        part = rows[s::3]
        if kind == "webdataset":
            write_tar(
                folder / f"{s}.tar", [{"json": json.dumps({"conversations": d}).encode(), "png": p} for d, p in part]
            )
        elif kind == "parquet":
            # Any bytes as text, as a writer that checks nothing leaves them.
            dialogues = [json.dumps(d, ensure_ascii=False).encode("utf-8", "surrogatepass") for d, _ in part]
            table = {"conversations": pa.array(dialogues, pa.binary()).view(pa.string()), "image": [p for _, p in part]}
            pq.write_table(pa.table(table), folder / f"{s}.parquet", row_group_size=17)
        else:
            lines = []
            for i, row in enumerate(part):
                if not isinstance(row, bytes):
                    dialogue, place = row
                    if isinstance(place, bytes):
                        (folder / f"{s}-{i}.png").write_bytes(place)
                        place = f"{s}-{i}.png"
                    row = json.dumps({"conversations": dialogue, "image": place}).encode()
                lines.append(row.replace(b"\n", b" "))
            (folder / f"{s}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    format = "file" if kind == "jsonl" else kind
    ending = {"webdataset": "tar"}.get(kind, kind)
    (folder / "data.yaml").write_text(f"- {{kind: llava, format: {format}, path: '*.{ending}'}}\n")


def epoch(mixture: Mixture, encoder: Encoder, folder: Path, rank: int, world: int, rows: int) -> tuple[Any, Any]:
    """What rank ``rank`` reads of the first epoch, and what it books."""
    ledger = Ledger(folder / f"rejected-{rank}-{world}.jsonl", max_rate=1.0)
    found = []
    for batch in Loader(mixture, encoder, 1, rank=rank, world=world, ledger=ledger):
        if ledger.seen > rows // world:
            break  # the row is one of the next epoch
        text = encoder.tokenizer.decode(batch.ids[0][batch.mask[0]].tolist())
        found.append(int(text.rsplit("answer ", 1)[1].split(".")[0]))
    assert ledger.path is not None
    booked = [json.loads(line) for line in ledger.path.read_text("utf-8").split("\n") if line]
    return found, {(b["source"].split(": ")[0], b["row"]): b["reason"] for b in booked if b["draw"] < rows}


@pytest.mark.parametrize(("kind", "n"), [("jsonl", 168), ("webdataset", 168), ("parquet", 164)])
def test_bad_rows_and_media_are_booked_and_good_rows_arrive(
    tmp_path: Path, encoder: Encoder, kind: str, n: int
) -> None:
    """168 + 168 + 164 = 500. Every other row is good. Two ranks book and read what one does, each row once."""
    rows = [row for i, bad in enumerate(bad_rows(kind, n)) for row in ((said(i), png(i)), bad)]
    write(tmp_path, kind, rows)
    mixture = Mixture(load_sources(tmp_path / "data.yaml", cache=tmp_path / "cache"), 0)
    assert len(mixture.sources[0]) == 2 * n
    alone, book = epoch(mixture, encoder, tmp_path, 0, 1, 2 * n)
    assert sorted(alone) == list(range(n))
    assert len(book) == n
    assert all(reason for reason in book.values())
    if kind != "jsonl":  # of files side by side the ledger numbers all rows, of shards each
        names = [f"{tmp_path}/{s}.{'tar' if kind == 'webdataset' else kind}" for s in range(3)]
        assert set(book) == {(names[i % 3], i // 3) for i in range(1, 2 * n, 2)}
    both = [epoch(mixture, encoder, tmp_path, rank, 2, 2 * n) for rank in range(2)]
    assert sorted(itertools.chain(*(read for read, _ in both))) == sorted(alone)
    assert both[0][1] | both[1][1] == book
    assert both[0][1].keys().isdisjoint(both[1][1])
    assert min(len(own) for _, own in both) > 10
