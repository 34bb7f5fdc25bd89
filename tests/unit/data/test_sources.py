"""Every layout and file type is read alike; what is wrong is said with file and row."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from accessory.data.files import open_rows
from accessory.data.mixture import Mixture
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, FileOptions, FileSource, Source, load_sources, open_source
from accessory.schema import Picture, Turn

CONFIGS = Path(__file__).resolve().parents[3] / "data_configs"
Make = Callable[..., Source]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A source of rows written to a file, its pictures in ``root``."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(root / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root-twin").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "root-twin" / "a.png")

    def build(kind: str, rows: list[Any], **entry: Any) -> Source:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return open_source(FileConfig(kind, path=str(file), root=str(root), **entry))  # type: ignore[arg-type]

    return build


def shape(turns: tuple[Turn, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Turns with a picture written as its file's name."""
    return [
        (t.role[0], tuple(p if isinstance(p, str) else f"<{Path(str(p.source)).name}>" for p in t.parts)) for t in turns
    ]


def llava(*said: str, **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": [{"from": ("human", "gpt")[i % 2], "value": s} for i, s in enumerate(said)]}


def asks(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}


def test_llava_pictures_stand_at_their_marks(make: Make) -> None:
    rows = [
        llava("<image>\nWhat?", "A", image="a.png"),
        llava("<image> or\n<image>?", "A", "Both <image>", "B", image=["a.png", "b.png", "a.png"]),
        llava("Hi", "<image>", image=None),
        llava("Hi", "Yo"),
    ]
    source = make("llava", rows)
    assert len(source) == 4
    assert [shape(source[i].turns) for i in range(4)] == [
        [("u", ("<a.png>", "What?")), ("a", ("A",))],
        [("u", ("<a.png>", "or\n", "<b.png>", "?")), ("a", ("A",)), ("u", ("Both", "<a.png>")), ("a", ("B",))],
        [("u", ("Hi",)), ("a", ("<image>",))],
        [("u", ("Hi",)), ("a", ("Yo",))],
    ]
    assert (source[1].index, source[1].source) == (1, source.name)


def test_image_first_puts_unmarked_pictures_at_the_start(make: Make) -> None:
    rows = [llava("What?", "A", image="a.png")]
    assert shape(make("llava", rows, options=FileOptions(image_first=True))[0].turns)[0] == ("u", ("<a.png>", "What?"))
    with pytest.raises(RowRejected, match=r"0 <image> marks for 1 pictures; options: \{image_first: true\}"):
        make("llava", rows)[0]


BAD: list[tuple[str, Any, str]] = [
    ("llava", llava("<image> <image>", "A", image="a.png"), "2 <image> marks for 1 pictures"),
    ("llava", llava("<image>", "A"), "1 <image> marks for 0 pictures"),
    ("llava", llava("<image>", "A", image="../secret.png"), "outside of the root"),
    ("llava", llava("<image>", "A", image="../root-twin/a.png"), "outside of the root"),
    ("llava", llava("<image>", "A", image="link.png"), "outside of the root"),
    ("llava", llava("<image>", "A", image="/etc/hostname"), "outside of the root"),
    ("llava", llava("<image>", "A", image="gone.png"), "no picture at .*is root: "),
    ("llava", llava("<image>", "A", image="https://x.org/a.png"), "not fetched from the network"),
    ("llava", llava("<image>", "A", image=3), "a path or a data: URL"),
    ("llava", {"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
    ("llava", {"conversations": [{"from": "human", "value": None}]}, "expected text"),
    ("llava", {"conversations": []}, "not empty"),
    ("llava", {"conversations": ["x"]}, "must be an object"),
    ("llava", {"conversation": []}, "no column 'conversations' .the row has: conversation"),
    ("llava", llava("only a question"), "nobody answers"),
    ("llava", [1], "must be an object, got list"),
    ("alpaca", {"instruction": "x"}, r"no column 'output' .*columns: \{output: NAME\}"),
    ("messages", asks([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]), "not fetched"),
    ("messages", asks([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), "not fetched"),
    ("messages", asks([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}]), "base64"),
    ("messages", asks([{"type": "image_url", "image_url": {"url": "data:text/html,hi"}}]), "data:image"),
    ("messages", asks([{"type": "video", "video": "x"}]), "type text or image_url, got 'video'"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), BAD)
def test_bad_rows_say_why_and_where(make: Make, kind: str, row: Any, reason: str) -> None:
    with pytest.raises(RowRejected, match=reason) as caught:
        make(kind, [row])[0]
    assert caught.value.source.endswith("rows.jsonl")
    assert caught.value.index == 0


def test_sharegpt_alpaca_and_messages(make: Make) -> None:
    sharegpt = make("sharegpt", [{"system": "S", **llava("Q", "A")}])
    assert shape(sharegpt[0].turns) == [("s", ("S",)), ("u", ("Q",)), ("a", ("A",))]
    rows = [{"instruction": "Do", "input": "it", "out": "A"}, {"instruction": "Do", "input": " ", "out": 7}]
    alpaca = make("alpaca", rows, columns={"output": "out"})
    assert shape(alpaca[0].turns) == [("u", ("Do\n", "it")), ("a", ("A",))]
    assert shape(alpaca[1].turns) == [("u", ("Do",)), ("a", ("7",))]
    part = {"type": "image_url", "image_url": {"url": "b.png"}}
    messages = make("messages", [asks([{"type": "text", "text": "See <image>"}, part, {"type": "text", "text": "?"}])])
    assert shape(messages[0].turns) == [("u", ("See <image>", "<b.png>", "?")), ("a", ("A",))]


def test_data_urls_are_decoded(make: Make) -> None:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    part = make("messages", [asks([{"type": "image_url", "image_url": {"url": url}}])])[0].turns[0].parts[0]
    assert isinstance(part, Picture)
    assert isinstance(part.source, Image.Image)
    assert part.source.getpixel((0, 0)) == (9, 8, 7)


def test_all_file_types_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"q{i}", "input": "", "output": f"a{i}\nb"} for i in range(7)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    for name, mark in (("r.csv", ","), ("r.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet", row_group_size=3)
    entries = [f"- {{kind: alpaca, path: r.{e}}}" for e in ("json", "jsonl", "csv", "tsv", "parquet")]
    (tmp_path / "c.yaml").write_text("\n".join(entries))
    sources = load_sources(tmp_path / "c.yaml")
    assert len(sources) == 5
    for source in sources:
        assert [source[i].turns for i in (6, 0, 3)] == [sources[0][i].turns for i in (6, 0, 3)]
        assert [len(source), source[3].turns[0].text] == [7, "q3"]


def test_a_quotation_mark_takes_no_rows_with_it(tmp_path: Path) -> None:
    path = tmp_path / "r.tsv"
    path.write_text('url\tcaption\na.png\t"Cat" by the sea\nb.png\ta dog\nc.png\ta "cow"\n')
    assert len(open_rows(path)) == 3
    path.write_text('url\tcaption\na.png\t"Cat by the sea\nb.png\ta dog\nc.png\ta "cow"\n')
    with pytest.raises(ValueError, match=r"r\.tsv: row 0 holds line breaks and tabs between quotation marks"):
        open_rows(path)


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n{oops\n')
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "c.yaml").write_text(
        "sources:\n- {kind: llava, path: gone.json}\n- {kind: odd, path: x}\n"
        "- {kind: alpaca, path: bad.jsonl}\n- {kind: alpaca, path: text.json, weight: -1, columns: {foo: bar}}\n"
        "- {kind: alpaca, path: text.json}\n- {kind: builtin}\n- 3\n"
        "- {kind: llava, pth: 3, root: 4, weight: true, spilt: test, options: {image_frist: true}}\n"
        "- {kind: builtin, name: nothing}\n- {kind: messages, path: '', weight: .inf}\n- {path: x}\n"
        "- {kind: builtin, name: words-ocr, columns: {}, options: {turns: many}}\ncolour: red\n"
    )
    with pytest.raises(ValueError, match=r"c\.yaml cannot be used") as caught:
        load_sources(tmp_path / "c.yaml")
    lines = str(caught.value).splitlines()[1:]
    wanted = (
        "sources.0: no data file at",
        "sources.1.kind: 'odd' is unknown; it is one of llava, ",
        "sources.2: .*bad.jsonl, row 0: no column 'instruction'",
        "sources.2: .*bad.jsonl, row 1: not valid JSON",
        "sources.3: columns: 'foo' is none of instruction, .*; weight: -1.0 is not a positive number",
        "sources.4: .*not valid JSON",
        "sources.5.name: is missing",
        "sources.6: wants a mapping with a kind .llava, .*builtin., not 3",
        "sources.7.path: is missing",
        "sources.7.pth: unknown name .did you mean path.",
        "sources.7.root: .*not 4",
        "sources.7.weight: .*not True",
        "sources.7.spilt: unknown name",
        "sources.7.options.image_frist: unknown name",
        "sources.8: built-in set 'nothing' is unknown",
        "sources.9: path: '' names no file; weight: inf is not",
        "sources.10.kind: is missing",
        "sources.11.columns: unknown name",
        "sources.11.options.turns: .*not 'many'",
        "colour: unknown name",
    )
    for pattern in wanted:
        assert any(re.match(f"  {pattern}", line) for line in lines), f"{pattern} in {lines}"
    assert len(lines) == len(wanted)


def test_files_that_are_not_there_say_where_they_come_from(tmp_path: Path) -> None:
    entry = "{kind: llava, path: down/rows.json, root: pictures, get: the page of the set}"
    (tmp_path / "c.yaml").write_text(f"sources: [{entry}]")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_sources(tmp_path / "c.yaml")
    assert re.search(
        r"no data file at .*down/rows.json and no folder of pictures \(root\) at .*pictures; put it there, it comes "
        "from: the page of the set$", str(caught.value),
    )  # fmt: skip
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "rows.json").write_text(json.dumps([llava("What?", "A")]))
    with pytest.raises(ValueError, match=r"0: no folder of pictures \(root\) at"):
        load_sources(tmp_path / "c.yaml")
    (tmp_path / "pictures").mkdir()
    assert len(load_sources(tmp_path / "c.yaml")) == 1


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    """In the order of their names, empty ones too; the mixture's state knows all of them."""
    for name, answers in {"part-0.jsonl": "ab", "part-1.jsonl": "", "part-2.jsonl": "cde", "other.jsonl": "x"}.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in answers))
    (tmp_path / "c.yaml").write_text("sources: [{kind: text, path: part-*.jsonl}]")
    (source,) = load_sources(tmp_path / "c.yaml")
    assert len(source) == 5
    assert [source[i].turns[0].text for i in range(5)] == list("abcde")
    before = Mixture([source]).fingerprint()
    (tmp_path / "part-1.jsonl").write_text(json.dumps({"text": "z"}) + "\n")
    (again,) = load_sources(tmp_path / "c.yaml")
    assert again[2].turns[0].text == "z"
    assert Mixture([again]).fingerprint() != before
    (tmp_path / "c.yaml").write_text("sources: [{kind: text, path: piece-*.jsonl}]")
    with pytest.raises(ValueError, match=r"no data file at .*piece-\*.jsonl"):
        load_sources(tmp_path / "c.yaml")


def test_a_file_includes_others(tmp_path: Path) -> None:
    """Their sources come first, their paths count from their own folder, and what is wrong in them names them."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "in" / "b.yaml").write_text("- {kind: text, path: b.jsonl}")
    (tmp_path / "in" / "more.yaml").write_text("include: [b.yaml]")
    (tmp_path / "c.yaml").write_text("include: [in/more.yaml]\nsources: [{kind: text, path: in/a.jsonl}]")
    assert [s[0].turns[0].text for s in load_sources(tmp_path / "c.yaml")] == ["b", "a"]
    (tmp_path / "in" / "b.yaml").write_text("- {kind: text, path: gone.jsonl}\n- {kind: odd, path: x}")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_sources(tmp_path / "c.yaml")
    assert "in/more.yaml: b.yaml: sources.1.kind: 'odd' is unknown" in str(caught.value)
    assert "in/more.yaml: b.yaml: sources.0: no data file at" in str(caught.value)
    (tmp_path / "in" / "b.yaml").write_text("include: [more.yaml]")
    with pytest.raises(ValueError, match=r"more\.yaml includes itself: .*c\.yaml -> .*more\.yaml -> .*b\.yaml -> "):
        load_sources(tmp_path / "c.yaml")
    (tmp_path / "in" / "b.yaml").write_text("include: [none.yaml]")
    with pytest.raises(ValueError, match=r"b\.yaml includes no file of sources at .*none\.yaml"):
        load_sources(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["", "sources: {}", "include: 3", "include: []", "{a: [", "3"])
def test_a_file_that_lists_no_sources(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        load_sources(tmp_path / "c.yaml")


def test_the_shipped_example_of_own_data() -> None:
    sources = load_sources(CONFIGS / "own_data.yaml")
    assert [len(s) for s in sources] == [3, 2, 2, 1]
    assert [s.weight for s in sources] == [2, 1, 1, 1]
    assert sum(len(t.pictures) for s in sources for i in range(len(s)) for t in s[i].turns) == 4


@pytest.mark.assets
def test_the_default_mixture_names_built_in_sets() -> None:
    from accessory.data.assets import AssetError

    try:
        sources = load_sources(CONFIGS / "default.yaml", size=64)
    except AssetError as error:
        pytest.skip(f"assets are not in the cache: {error}")
    assert len(sources) == 11
    for source in sources:
        far = source[len(source) + 3]
        assert far.source == source.name
        assert far.turns[0].pictures


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n\n \n{"text": "b"}\n{"text": "c"}')
    (tmp_path / "r.csv").write_text('text\n"a\nstill a"\nb\n')
    (tmp_path / "r.json").write_text('[{"text": "a"},\n{"text": "b"}]')
    lines = {}
    for kind in ("jsonl", "csv", "json"):
        source = open_source(FileConfig("text", path=str(tmp_path / f"r.{kind}")))
        assert isinstance(source, FileSource)
        lines[kind] = [source.line(i) for i in range(len(source))]
    assert lines == {"jsonl": [1, 4, 5], "csv": [3, 4], "json": [None, None]}
