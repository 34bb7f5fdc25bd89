"""Test sets of one's own: equal scores in any batch and after any interruption, and files that explain themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from accessory.evaluate import run as running
from accessory.evaluate.run import Result, model_digest, run, write_scores
from accessory.evaluate.tasks import TestSet, read_tasks
from accessory.models.build import Model
from tests.structure.source import ROOT
from tests.tiny import tiny_model, tiny_model_dir

TASKS = """tasks:
  - {name: vqa, path: v.jsonl, score: vqa}
  - {name: letters, path: c.csv, score: choice-likelihood, columns: {question: q}}
  - {name: texts, path: c.csv, score: choice-likelihood, columns: {question: q}, prompt: "{question}"}
  - {name: boxes, path: g.json, score: box, columns: {box: bbox}, boxes: xywh, max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows of three tasks, as JSON lines, CSV and JSON, with pictures of several shapes."""
    root = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0)
    for k in range(7):
        noise = pixels.integers(0, 256, (48, 48 + 16 * (k % 3), 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{k}.png")
    many = [["What is this?", "How many birds are there?"][k % 2] for k in range(7)]
    (root / "v.jsonl").write_text("".join(
        json.dumps({"image": f"{k}.png", "question": q, "answers": ["red"] * 9 + ["blue"], "category": "ab"[k % 2]})
        + "\n"
        for k, q in enumerate(many)
    ))  # fmt: skip
    with (root / "c.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "q", "A", "B", "C", "answer"])
        writer.writerows([f"{k}.png", q, "cat", "small dog", "fish", "B"] for k, q in enumerate(many))
    (root / "g.json").write_text(json.dumps([
        {"image": f"{k}.png", "phrase": "the apple", "bbox": [4, 4, 20, 20]} for k in range(7)
    ]))  # fmt: skip
    (root / "t.yaml").write_text(TASKS)
    return root


def scores(made: Model, tests: TestSet, out: Path, **options: Any) -> tuple[Result, list[dict[str, Any]]]:
    """The result, and the items of its file."""
    file = out / f"{tests.config.name}.jsonl"
    result = run(made, tests, file, model_id="m", **options)
    return result, [json.loads(line) for line in file.read_text().splitlines()][1:]


def test_scores_do_not_depend_on_the_batch(made: Model, folder: Path, tmp_path: Path) -> None:
    for tests in read_tasks(folder / "t.yaml"):
        found = [scores(made, tests, tmp_path / str(n), batch_size=n) for n in (1, 3, 64)]
        said = [[(i["index"], i["answer"], i["scores"]) for i in items] for _, items in found]
        assert said[0] == said[1] == said[2]
        assert found[0][0].totals == found[1][0].totals == found[2][0].totals
        assert found[0][0].items == 7
        if tests.config.name == "vqa":
            assert len({a for _, a, _ in said[0]}) > 1  # it does not say the same to all
            assert set(found[0][0].by_category) == {"a", "b"}
        if tests.config.name == "texts":
            assert set(found[0][0].totals) == {"accuracy", "accuracy_by_length"}


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 7])
def test_a_run_that_was_cut_off_goes_on(cut: int, made: Model, folder: Path, tmp_path: Path) -> None:
    """Cut anywhere, in the middle of a line too: the file becomes what an uninterrupted run writes."""
    tests = read_tasks(folder / "t.yaml")[0]
    whole, _ = scores(made, tests, tmp_path / "whole", batch_size=2)
    text = (tmp_path / "whole" / "vqa.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    half = lines[cut + 1][: len(lines[cut + 1]) // 2] if cut < 7 else b""
    (tmp_path / "cut" / "vqa.jsonl").write_bytes(b"".join(lines[: cut + 1]) + half)
    again, _ = scores(made, tests, tmp_path / "cut", batch_size=2)
    assert (tmp_path / "cut" / "vqa.jsonl").read_bytes() == text
    assert again.totals == whole.totals
    assert (again.seconds == 0) == (cut == 7)


def test_what_is_there_is_not_asked_again(
    made: Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = read_tasks(folder / "t.yaml")[0]
    asked: list[int] = []
    answer = running.answers
    monkeypatch.setattr(running, "answers", lambda m, s, *r, **o: (asked.append(len(s)), answer(m, s, *r, **o))[1])
    scores(made, tests, tmp_path, batch_size=3)
    assert asked == [3, 3, 1]
    file = tmp_path / "vqa.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:5]))  # four items, so one whole batch
    scores(made, tests, tmp_path, batch_size=3)
    assert asked == [3, 3, 1, 3, 1]
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:6]))
    _, items = scores(made, tests, tmp_path, batch_size=4)  # other batches: all five that are there stay
    assert asked[5:] == [2]
    assert [i["index"] for i in items] == list(range(7))


def test_a_file_of_another_run_is_not_added_to(made: Model, folder: Path, tmp_path: Path) -> None:
    tests = read_tasks(folder / "t.yaml")[0]
    file = tmp_path / "vqa.jsonl"
    scores(made, tests, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"another run, changed: model \('m' then, 'other' now\)"):
        run(made, tests, file, model_id="other")
    with pytest.raises(ValueError, match="changed: control"):
        run(made, tests, file, model_id="m", control="blind")
    with pytest.raises(ValueError, match="changed: limit"):
        run(made, tests, file, model_id="m", limit=3)
    assert file.read_bytes() == before
    file.write_text('{"some": "file"}\n')
    with pytest.raises(ValueError, match="no file of items"):
        run(made, tests, file, model_id="m")


def test_digests_change_with_what_they_stand_for(folder: Path, tmp_path: Path) -> None:
    tests = read_tasks(folder / "t.yaml")[0]
    (folder / "other.yaml").write_text(TASKS.replace("score: vqa}", "score: vqa, max_new_tokens: 3}"))
    assert read_tasks(folder / "t.yaml")[0].digest() == tests.digest()
    assert read_tasks(folder / "other.yaml")[0].digest() != tests.digest()
    model = tiny_model_dir(tmp_path)
    before = model_digest(model)
    weights = model / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert model_digest(model) != before


def test_controls_take_the_picture_away(made: Model, folder: Path, tmp_path: Path) -> None:
    tests = read_tasks(folder / "t.yaml")[3]
    shown: list[list[Any]] = []

    def stub(model: Model, samples: list[Any], *rest: Any, **options: Any) -> list[str]:
        shown.append([Image.open(p.source).tobytes() for s in samples for p in s.turns[0].pictures])
        return ["[0,0,1,1]"] * len(samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "answers", stub)
        for control in ("none", "shuffled", "blind"):
            result, items = scores(made, tests, tmp_path / control, control=control)
            assert (result.control, len(items)) == (control, 7)
    own, other, none = shown
    assert all(a != b for a, b in zip(own, other, strict=True))
    assert sorted(own) == sorted(other)
    assert none == []


def test_items_and_scores_tell_everything(made: Model, folder: Path, tmp_path: Path) -> None:
    vqa, letters, texts, boxes = read_tasks(folder / "t.yaml")
    _, items = scores(made, vqa, tmp_path)
    assert items[1]["question"].startswith("How many birds are there?\nAnswer the question using")
    assert items[1]["answers"] == ["red"] * 9 + ["blue"]
    assert (items[1]["category"], items[1]["group"], items[1]["index"]) == ("b", "1.png", 1)
    result, items = scores(made, letters, tmp_path)
    assert (items[0]["answers"], len(items[0]["log_likelihoods"])) == (["B"], 3)
    assert items[0]["answer"] == "ABC"[int(np.argmax(items[0]["log_likelihoods"]))]
    assert "by_length" not in items[0]
    _, items = scores(made, texts, tmp_path)
    assert items[0]["question"] == "What is this?"
    assert items[0]["tokens"][1] > items[0]["tokens"][0]  # the texts themselves are scored, not their letters
    _, items = scores(made, boxes, tmp_path)
    assert items[0]["answers"] == ["[0.083,0.083,0.500,0.500]"]
    write_scores(tmp_path / "scores.json", [result])
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "letters": {"none": {"items": 7, "totals": dict(result.totals), "by_category": {}}}
    }


def test_limits_are_spread_and_checked(made: Model, folder: Path, tmp_path: Path) -> None:
    vqa = read_tasks(folder / "t.yaml")[0]
    _, items = scores(made, vqa, tmp_path, limit=3)
    assert [i["index"] for i in items] == [0, 2, 4]
    with pytest.raises(ValueError, match="limit is 1"):
        scores(made, vqa, tmp_path / "x", limit=1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{name: v, path: v.jsonl, score: vqaa}", "no scorer 'vqaa'"),
        ("{name: v, path: nothing.jsonl, score: vqa}", "no data file at"),
        ("{name: v/w, path: v.jsonl, score: vqa}", "must be letters, digits"),
        ("{name: v, path: v.jsonl, score: vqa, columns: {quest: q}}", "columns: 'quest' is none of"),
        ("{name: v, path: v.jsonl, score: vqa, columns: {question: q}}", r"v.jsonl, row 0: no column 'q'"),
        ("{name: v, path: v.jsonl, score: pope}", "must be yes or no, got 'red'"),
        ("{name: v, path: v.jsonl, score: choice, prompt: vqa}", "score: choice needs options"),
        ("{name: v, path: v.jsonl, score: vqa, prompt: nothing}", "no task prompt 'nothing'"),
        ("{name: v, path: v.jsonl, score: vqa, root: ..}", "no picture at"),
        ("{name: v, path: v.jsonl, skore: vqa}", "skore"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(entry: str, said: str, folder: Path) -> None:
    (folder / "bad.yaml").write_text(f"tasks:\n  - {entry}\n")
    with pytest.raises(ValueError, match=said):
        read_tasks(folder / "bad.yaml")


def test_the_examples_are_whole() -> None:
    sets = read_tasks(ROOT / "data_configs" / "examples" / "tasks.yaml")
    assert [t.config.score for t in sets] == ["exact", "vqa", "choice", "choice-likelihood", "box", "pope"]
    assert [len(t) for t in sets] == [2, 2, 2, 2, 2, 4]
    assert sets[4][0].turns[1].text == "[0.208,0.208,0.802,0.802]"
