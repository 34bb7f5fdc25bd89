"""Documents packed into rows: nothing is lost, and training reads them."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from accessory.data import template
from accessory.data.encode import Encoder
from accessory.data.files import open_rows
from accessory.data.packing import documents, pack, write_packed
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, open_source
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import load
from accessory.schema import IDS, Sample
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
