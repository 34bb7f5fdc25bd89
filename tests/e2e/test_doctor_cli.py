"""The verb ``doctor``: every kind of broken data is found and named, and what is healthy passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tests.tiny
from accessory import config as configuration
from accessory.__main__ import main
from accessory.data import template
from accessory.data.mixture import Mixture
from accessory.data.sources import load_sources
from accessory.data.survey import Place
from accessory.peft.attach import LoraSpec
from accessory.train.findings import CODES
from accessory.vision.projector import Projector
from tests.shards import write_tar
from tests.tiny import tiny_model_dir
from tests.tiny_generator import draw_config, write_captions
from tests.unit.train.squares import QUESTION, write_squares
from tests.unit.train.test_generator_run import experiment as generator_experiment

ROOT = Path(__file__).resolve().parents[2]
GOOD = 6  # rows before the broken one, which stands behind a blank line


@dataclass(frozen=True)
class Looked:
    """What a call gave."""

    code: int
    out: str
    facts: dict[str, Any]

    def text(self, code: str) -> str:
        """The findings of a code, with their rows."""
        found = [f for f in self.facts["findings"] if f["code"] == code]
        return "\n".join(line for f in found for line in (f["text"], *(str(Place(**e)) for e in f["examples"])))

    @property
    def codes(self) -> set[str]:
        return {f["code"] for f in self.facts["findings"]}


def look(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> Looked:
    out = path.parent / "found.json"
    code = main(["doctor", str(path), *arguments, "--json", str(out)])
    facts = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert facts["exit"] == code
    for f in facts["findings"]:
        assert CODES[f["code"]][0] == f["level"]
        assert f["text"] in shown
    return Looked(code, shown, facts)


def said(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant in turn; a text may name its role before a colon."""
    turns = []
    for i, text in enumerate(texts):
        role, colon, rest = text.partition(":")
        turns.append({"from": role, "value": rest} if colon else {"from": ("human", "gpt")[i % 2], "value": text})
    return turns


def broken(folder: Path, row: dict[str, Any]) -> Path:
    """The squares with one row more, on line 8; a picture of them is torn and one stands outside."""
    path = write_squares(folder, 8)
    lines = [json.dumps({"conversations": said(f"What is {word}?", f"It is {word}.")}) for word in "abcdef"[: GOOD - 4]]
    rows = folder / "squares.jsonl"
    rows.write_text(rows.read_text() + "\n".join([*lines, "", json.dumps(row)]) + "\n")
    whole = (folder / "red.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("no picture")
    return path


# row, code, what is said of it, whether it is an error
BROKEN: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "two users": ({"conversations": said("One?", "human:Two?", "gpt:Yes")}, "roles", "two turns of the user", False),
    "assistant first": ({"conversations": said("gpt:Hello", "human:Hi", "gpt:Yes")}, "roles", "speaks first", False),
    "no answer at the end": ({"conversations": said("Hi", "Yes", "And?")}, "roles", "nobody answers", False),
    "system in the middle": (
        {"conversations": said("Hi", "Yes", "system:Be good", "gpt:Yes")}, "unreadable", "must come first", True,
    ),
    "nobody answers": ({"conversations": said("Hi")}, "unreadable", "nobody answers", True),
    "unknown role": ({"conversations": said("alien:Hi", "Yes")}, "unreadable", "unknown role 'alien'", True),
    "empty answer": ({"conversations": said("Hi", "  ")}, "no-label", "the assistant says nothing", True),
    "one empty answer": ({"conversations": said("Hi", "Yes", "And?", "")}, "empty", "an empty answer", False),
    "empty question": ({"conversations": said("  ", "Yes")}, "empty", "an empty question", False),
    "missing picture": (
        {"image": "gone.png", "conversations": said("<image>?", "Yes")}, "unreadable", "no picture at", True,
    ),
    "torn picture": (
        {"image": "torn.png", "conversations": said("<image>?", "Yes")}, "unreadable", "cannot be read", True,
    ),
    "no picture": (
        {"image": "words.png", "conversations": said("<image>?", "Yes")}, "unreadable", "not a picture in one of", True,
    ),
    "one mark too many": (
        {"image": "red.png", "conversations": said("<image><image>?", "Yes")},
        "unreadable", "2 <image> marks for 1 pictures", True,
    ),
    "too many pictures": (
        {"image": ["red.png"] * 40, "conversations": said("<image>" * 40, "Yes")},
        "too-long", "the pictures alone take that: too many pictures", True,
    ),
    "too long": (
        {"conversations": said("Hi", "word " * 200)}, "too-long", "longer than max_length 128, the longest has", True,
    ),
    "twice": ({"conversations": said("What is a?", " It is  a.")}, "duplicate", "line 5", False),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_broken_row_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    row, code, text, error = BROKEN[name]
    found = look(capsys, broken(tmp_path, row), "data.max_bad_rate=0.5")
    assert found.codes == {code}
    assert text in found.text(code)
    assert f"{tmp_path / 'squares.jsonl'}, line 8: " in found.text(code)
    assert found.code == int(error)
    assert found.facts["sources"][0]["dropped"] == int(error)
    if not error:
        assert look(capsys, tmp_path / "experiment.yaml", "--strict").code == 1
    else:
        assert "bad-rows" in look(capsys, tmp_path / "experiment.yaml").codes  # one of seven, five in a hundred allowed


def test_what_is_healthy_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, {"image": "red.png", "conversations": said("<image>What is it?", "A red square.")})
    found = look(capsys, path, "model.tiling.grid=2", "--strict", "--show", "7")
    assert found.code == 0
    assert found.facts["findings"] == []
    assert "0 errors, 0 warnings" in found.out
    assert f"[image 1: 2x2 tiles and the whole, 20 positions]{QUESTION}<|im_end|>" in found.out
    assert "⟦red<|im_end|>⟧" in found.out
    assert "\x1b" not in found.out
    [source] = found.facts["sources"]
    assert (source["rows"], source["read"], source["tiles"]) == (7, 7, 25)
    assert sum(found.facts["picture_positions"].values()) == 5
    assert sum(found.facts["text_positions"].values()) == 7
    assert found.facts["updates"]["per_epoch"] == 2
    assert found.facts["updates"]["epochs"] == [round(8 * 4 / 7, 3)]
    assert 0.5 < found.facts["batches"]["real"] < 1
    assert found.facts["trains"]["projector"][0] > 0
    assert found.facts["memory"]["activations"] > 0
    assert not (tmp_path / "run").exists()  # nothing is written but what was asked for


def test_rows_are_limited_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, {"conversations": said("Hi", "Yes")})
    with (tmp_path / "squares.jsonl").open("a") as more:
        more.writelines(json.dumps({"conversations": said(f"Is {i} odd?", str(i % 2))}) + "\n" for i in range(60))
    found = look(capsys, path, "--rows", "3", "--show", "0", "train.batch_size=2", "train.max_steps=1")
    assert 3 <= found.facts["sources"][0]["read"] < 30
    assert found.facts["samples"] == []
    assert found.codes == {"unseen"}
    assert main(["doctor", str(path), "--rows", "-1"]) == 2
    assert "--rows must be at least 0" in capsys.readouterr().err


def test_a_template_that_leaves_no_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_squares(tmp_path, 4)
    (tmp_path / "squares.jsonl").write_text('{"text": "a"}\n' * 2)
    (tmp_path / "data.yaml").write_text("sources:\n  - {kind: text, path: squares.jsonl}\n")
    mute = template.Template(name="mute")  # what a row of one token teaches would be its first, which nothing precedes
    monkeypatch.setitem(template.TEMPLATES, "mute", mute)
    found = look(capsys, path, "model.template=mute")
    assert found.code == 1
    assert found.codes >= {"no-label", "nothing-learned"}
    assert "2 of 2 rows that were read teach nothing" in found.text("no-label")
    heard = look(capsys, path, "model.template=plain")
    assert heard.codes == {"duplicate"}


def test_pictures_that_only_a_generator_would_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    write_captions(tmp_path)
    (tmp_path / "data.yaml").write_text(
        "sources:\n  - {kind: captions, path: captions.jsonl, columns: {image: file, caption: text}}\n"
    )
    found = look(capsys, path)
    assert found.codes == {"no-label", "nothing-learned", "bad-rows"}
    assert "8 of 8 rows that were read are dropped: nothing to learn" in found.text("no-label")


def test_a_vocabulary_without_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.tiny, "CONTROL", ["<s>", "<pad>", "<|im_start|>", "<|im_end|>"])
    path = write_squares(tmp_path, 4)
    found = look(capsys, path, "model.template=vicuna_v1_1")
    assert found.codes == {"template", "unreadable", "bad-rows", "nothing-learned"}
    assert "vicuna_v1_1 writes eos and ends answers with it: this vocabulary has no eos token" in found.text("template")
    assert look(capsys, path).code == 0  # this template ends with another


def test_placeholders_of_a_spoiled_projector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_squares(tmp_path, 4)
    assert look(capsys, path, "model.projector.words=7").code == 0
    monkeypatch.setattr(Projector, "runs", lambda self, runs: tuple(runs))  # forgets the visual word
    found = look(capsys, path, "model.projector.words=7")
    assert found.codes == {"placeholders"}
    assert "4 <image> placeholders for 1 tiles, for which tower and projector give 5" in found.text("placeholders")
    assert "4 <image> placeholders stand in the batch, but there are 5 features" in found.text("placeholders")
    assert found.code == 1
    blind = look(capsys, path, "model.tower=null", "model.projector=null", "model.tuning=[{kind: norm}]")
    assert "this model splices no pictures" in blind.text("placeholders")


def test_what_does_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    found = look(capsys, path, "train.groups=[{pattern: nothing.*}, {pattern: nobody.*}, {pattern: tower.*}]")
    assert found.codes == {"unused-group"}
    assert "'nobody.*' matches no trainable parameter" in found.text("unused-group")
    assert "'nothing.*' matches no trainable parameter" in found.text("unused-group")
    still = look(capsys, path, "train.lr=0.0", "train.min_lr=0.0")
    assert still.codes == {"trainable"}
    assert still.code == 1
    divided = "objective.disjoint=[{name: a, sources: [other], parameters: ['*']}]"
    assert "no group of objective.disjoint takes rows of source" in look(capsys, path, divided).text("disjoint")
    assert "do not fit" in look(capsys, path, f"init={other_model(tmp_path)}").text("init")


def other_model(folder: Path) -> Path:
    """A model folder with tensors that the squares' model lacks."""
    return tiny_model_dir(folder / "other", tuning=(LoraSpec(rank=2),))


def test_a_data_configuration_of_nothing_but_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    (tmp_path / "squares.jsonl").write_text('{"conversations": []}\n{oops\n')
    found = look(capsys, path)
    assert found.codes == {"data", "unreadable", "nothing-learned"}
    assert "line 2: not valid JSON" in found.text("unreadable")
    assert main(["doctor", str(path), "train.max_stesp=3"]) == 2
    assert "did you mean max_steps" in capsys.readouterr().err


def test_rows_of_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    Image.open(tmp_path / "red.png").save(tmp_path / "fresh.bmp")
    copied = (tmp_path / "blue.png").read_bytes()
    (tmp_path / "copied.png").write_bytes(copied)
    first = (tmp_path / "squares.jsonl").read_text().splitlines()[0]
    rows = [
        {"image": "copied.png", "conversations": said("<image>\nAnything?", "No")},
        {"image": "fresh.bmp", "conversations": said("<image>\nAnything?", "No")},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join([first, *map(json.dumps, rows)]))
    (tmp_path / "test.yaml").write_text("- {kind: llava, path: test.jsonl}\n")
    found = look(capsys, path, "--test", str(tmp_path / "test.yaml"))
    assert (found.code, found.codes) == (0, {"leak"})
    assert "1 rows of the test are rows of the training" in found.text("leak")
    assert f"line 1: is {tmp_path / 'squares.jsonl'}, line 1: in training" in found.text("leak")
    assert "line 2: its picture is that of" in found.text("leak")
    assert "test.jsonl, line 3" not in found.text("leak")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": "red.png", "question": "Q?", "answer": "A"}) + "\n")
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: shapes, path: asked.jsonl, score: exact}\n")
    asked = look(capsys, path, "--test", str(tmp_path / "tasks.yaml"))
    assert "shapes, line 1: its picture is that of" in asked.text("leak")


def test_memory_and_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, {"conversations": said("Hi", "word " * 50)})
    small = look(capsys, path, "--memory", "0.0001")
    assert small.codes == {"memory"}
    standing = small.facts["memory"]["weights"] + small.facts["memory"]["gradients"] * 3
    tight = look(capsys, path, "--memory", str((standing + 1000) / 1e9))
    assert (tight.code, tight.codes) == (0, {"memory-tight"})
    rows = tmp_path / "squares.jsonl"
    rows.write_text(rows.read_text() + (json.dumps({"conversations": said("Hi", "A")}) + "\n") * 9)
    assert "padding" in look(capsys, path, "train.batch_size=16").codes


def test_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, {"conversations": said("Hi", "word " * 50)})
    packing = ("data.packing={length: 60, tiles: 3}", "data.max_bad_rate=0.5", "train.batch_size=2", "train.lr=0.01")
    found = look(capsys, path, *packing, "train.accumulation=3")
    assert (found.code, found.codes) == (1, {"misfit"})
    assert "1 of 7 rows that were read is dropped: " in found.text("misfit")
    assert f"{tmp_path / 'squares.jsonl'}, line 8: " in found.text("misfit")
    assert "a pack holds 60 (data.packing.length)" in found.text("misfit")
    updates, batches = found.facts["updates"], found.facts["batches"]
    assert updates["packs_per_update"] == 6
    assert 6 < updates["rows_per_update"] < 30
    assert updates["epochs"] == [round(8 * updates["rows_per_update"] / 7, 3)]
    assert 0.5 < batches["filled"] <= 1
    assert batches["longest"]["rows"] == 1
    assert 60 < batches["longest"]["positions"] <= 120
    assert f"packs are {batches['filled']:.1%} full" in found.out
    assert f"{updates['rows_per_update']} rows each in 6 packs" in found.out
    loose = look(capsys, path, "data.packing={length: 2000, tiles: 3}", "train.batch_size=1")
    assert loose.codes == {"packs"}
    assert "data.packing.tiles 3 is used up first" in loose.text("packs")


def test_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    whole = look(capsys, path, "train.global_batch=8")
    parted = look(capsys, path, "train.global_batch=8", "train.parallel={tensor: 2, data: fsdp}", "--ranks", "4")
    assert whole.facts["updates"] == parted.facts["updates"]
    one, four = whole.facts["memory"], parted.facts["memory"]
    assert (one["ranks"], four["ranks"]) == (1, 4)
    assert one["unknown"] == []
    assert 0.25 < four["optimizer"] / one["optimizer"] < 0.8  # tower and projector stay whole
    assert "memory on each of 4 ranks: " in parted.out
    assert "more while a block is gathered" in parted.out
    assert "share what layers keep that are cut" in parted.out
    uneven = look(capsys, path, "train.parallel.tensor=4")
    assert uneven.codes == {"parallel"}
    assert "parallel.tensor 4 does not divide n_kv_heads 2" in uneven.text("parallel")
    assert main(["doctor", str(path), "train.parallel.tensor=2", "--ranks", "3"]) == 2
    assert "--ranks 3 is no multiple of it" in capsys.readouterr().err


def test_rows_in_place_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_squares(tmp_path, 4)
    rows = tmp_path / "squares.jsonl"
    assert main(["doctor", str(rows)]) == 2
    assert "squares.jsonl holds rows of data; what belongs here is a YAML file" in capsys.readouterr().err
    found = look(capsys, path, f"data.sources={rows}")
    assert found.codes == {"data"}
    assert "holds rows of data" in found.text("data")


def test_generators_are_examined_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = generator_experiment(tmp_path)
    found = look(capsys, path)
    assert (found.code, found.codes) == (0, set())
    assert "16 x 16 of 'a red square'" in found.out
    assert found.facts["sources"][0]["targets"] == 8
    rows = tmp_path / "captions.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"file": "red.png", "text": "long " * 90}) + "\n")
    assert "lose their end" in look(capsys, path).text("prompt")
    rows.write_text(rows.read_text() + json.dumps({"file": "red.png", "text": " "}) + "\n")
    assert "a caption needs one picture and some text" in look(capsys, path).text("unreadable")


def test_the_example_of_own_data_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_model_dir(tmp_path)
    data = f"data.sources={ROOT / 'data_configs' / 'own_data.yaml'}"
    out = tmp_path / "own.json"
    code = main(
        ["doctor", str(ROOT / "exps" / "own.yaml"), data, f"model.base={tiny}", "--show", "9", "--json", str(out)]
    )
    facts = json.loads(out.read_text())
    assert (code, facts["findings"]) == (0, [])
    assert len(facts["sources"]) == 4
    assert "[image 2: 1 tile, 4 positions]" in capsys.readouterr().out


def test_dialogues_with_pictures_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = generator_experiment(tmp_path)
    tree = configuration.parse(path.read_text())
    tree |= {
        "generator": configuration.plain(draw_config(tmp_path, dream=True)),
        "objective": {"loss": {"language": 1.0, "picture": 1.0}},
        "cache_features": False,
    }
    path.write_text(configuration.dump(tree))
    found = look(capsys, path)
    assert (found.code, found.codes) == (0, set())
    assert "⟦<dream_start>⟧<dream>×3<dream_end>[image 1: 1 tile, 4 positions]" in found.out
    assert found.facts["learned"] == 8 * 3  # trigger, end of the turn, picture
    blind = look(capsys, path, "seen=false", "objective.loss.language=0.0")
    assert blind.facts["learned"] == 8
    assert "[image 1" not in blind.out


def test_the_rows_of_a_stream_are_those_that_the_run_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of any shard, and what is broken is named with shard and key."""
    path = write_squares(tmp_path, 8)
    picture = (tmp_path / "red.png").read_bytes()
    for shard in range(3):
        rows = [{"png": b"torn" if (shard, i) == (2, 7) else picture, "txt": b"red"} for i in range(40)]
        write_tar(tmp_path / f"s-{shard}.tar", rows)
    source = "- {kind: describe, format: webdataset, path: 's-{0..2}.tar', stream: {buffer: 8}}"
    (tmp_path / "data.yaml").write_text(f"sources:\n  {source}\n")
    mixture = Mixture(load_sources(tmp_path / "data.yaml", cache=tmp_path / "cache"), 0)  # as the experiment's seed
    options = ("data.max_bad_rate=0.5", f"cache={tmp_path / 'cache'}")
    found = look(capsys, path, *options)
    assert f"{tmp_path / 's-2.tar'}: 000007" in found.text("unreadable")
    assert found.facts["sources"][0]["read"] == 120
    few = look(capsys, path, *options, "--rows", "30")
    drawn = mixture.first(0, few.facts["sources"][0]["read"])
    assert min(drawn) >= 40, "of another shard than the first"
    assert (87 in drawn) == ("unreadable" in few.codes)
