"""Every task of the mixture, from a row of a file to a question, its answer and what a scorer needs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from accessory.data.grounding import parse_boxes, parse_located, parse_points
from accessory.data.rows import RowRejected
from accessory.data.sources import load_sources
from accessory.data.task_prompts import TASKS, TaskPrompt, get, letters, write_options
from accessory.data.task_rows import TaskLayout
from accessory.schema import Sample

BOXES = [[8, 8, 40, 24], [40, 0, 64, 32]]
ROWS: dict[str, dict[str, Any]] = {
    "question": {"question": "Why?", "answer": "because"},
    "vqa": {"question": "Why?", "answers": [{"answer": "so"}, {"answer": "thus"}]},
    "vizwiz": {"question": "Why?", "answer": "so"},
    "yes-no": {"question": "Is it?", "answer": "yes"},
    "choice": {"question": "Which?", "options": ["a cat", "a dog"], "answer": "a dog"},
    "science": {"question": "Which?", "hint": "It barks.", "options": ["a cat", "a dog"], "answer": 1},
    "caption": {"answers": ["a dog", "one dog"]},
    "description": {"answer": "a dog"},
    "region": {"box": BOXES[0], "answer": "a dog"},
    "grounding": {"phrase": "the dog", "box": BOXES[0]},
    "detection": {"phrase": "dog", "boxes": BOXES},
    "caption-grounding": {"answer": "a dog here", "objects": [{"name": "a dog", "box": BOXES[0]}]},
    "layout": {"objects": [{"name": "title", "box": BOXES[0]}, {"name": "text", "boxes": BOXES}]},
    "pose": {"box": BOXES[0], "points": {"nose": [10, 10], "left eye": [9, 8]}},
    "ocr": {"answer": "STOP"},
    "ocr-region": {"box": BOXES[0], "answer": "STOP"},
    "text-spotting": {"objects": [{"name": "STOP", "box": BOXES[0]}]},
    "set-of-mark": {"mark": 2, "boxes": BOXES, "answer": "a dog"},
    "set-of-mark-find": {"phrase": "a dog", "boxes": BOXES, "answer": "2"},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 32), (200, 20, 20)).save(tmp_path / "a.png")
    return tmp_path.resolve()


def read(root: Path, row: dict[str, Any], task: str = "", which: int = 0, **options: Any) -> Sample:
    return TaskLayout({}, root, task, **options).sample({"image": "a.png", **row}, which)


def test_every_task_has_a_row_here() -> None:
    assert ROWS.keys() == TASKS.keys()
    assert len({w for t in TASKS.values() for w in t.wordings}) == sum(len(t.wordings) for t in TASKS.values())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_asked_and_answered(task: str, root: Path) -> None:
    sample = read(root, ROWS[task], task)
    asked, said = sample.turns
    assert (asked.role, said.role, len(asked.pictures)) == ("user", "assistant", 1)
    assert "{" not in asked.text
    assert asked.text.strip() == asked.text != ""
    assert said.text == sample.meta["answers"][0] != ""
    for needed in TASKS[task].fields:  # a row without what the prompt names is refused
        if needed != "options":
            with pytest.raises(ValueError, match=r"no column|no box|four numbers"):
                read(root, {k: v for k, v in ROWS[task].items() if k != needed}, task)


def test_the_published_wordings(root: Path) -> None:
    """Interfaces of released weights and of the benchmarks they were scored with."""
    assert read(root, ROWS["vqa"], "vqa").turns[0].text == "Why?\nAnswer the question using a single word or phrase."
    assert read(root, ROWS["grounding"], "grounding").turns[0].text == (
        "Please provide the bounding box coordinate of the region this sentence describes: the dog."
    )
    assert {n for n, t in TASKS.items() if t.published} == {"vqa", "yes-no", "choice", "caption", "grounding"}


def test_answers_with_places(root: Path) -> None:
    x1, y1, x2, y2 = parse_boxes(read(root, ROWS["grounding"], "grounding").turns[1].text)[0]
    assert (x1, y1, x2, y2) == (0.125, 0.375, 0.625, 0.625)  # 64 x 32: 16 pixels of padding above
    assert len(parse_boxes(read(root, ROWS["detection"], "detection").turns[1].text)) == 2
    plain, found = parse_located(read(root, ROWS["caption-grounding"], "caption-grounding").turns[1].text)
    assert (plain, found[0].name) == ("a dog here", "a dog")
    assert [f.name for f in parse_located(read(root, ROWS["layout"], "layout").turns[1].text)[1]] == ["title", "text"]
    assert list(parse_points(read(root, ROWS["pose"], "pose").turns[1].text)) == ["nose", "left eye"]
    assert "[0.12,0.38,0.62,0.62]" in read(root, ROWS["region"], "region", decimals=2).turns[0].text
    relative = {"phrase": "x", "box": [0.1, 0.2, 0.3, 0.4]}
    assert read(root, relative, "grounding", boxes="square").turns[1].text == "[0.100,0.200,0.300,0.400]"


def test_marks_are_drawn_unless_the_picture_has_them(root: Path) -> None:
    drawn = read(root, ROWS["set-of-mark"], "set-of-mark").turns[0].pictures[0].source
    given = read(root, {"mark": 2, "answer": "a dog"}, "set-of-mark").turns[0].pictures[0].source
    assert isinstance(drawn, Image.Image)
    assert drawn.tobytes() != Image.open(root / "a.png").tobytes()
    assert given == str(root / "a.png")


def test_wordings_are_taken_in_turn(root: Path) -> None:
    asked = [read(root, ROWS["ocr"], "ocr", which=k).turns[0].text for k in range(3)]
    assert asked[0] == asked[2] != asked[1]


@pytest.mark.parametrize("answer", ["B", "b", "a dog", "1", 1])
def test_a_right_option_has_many_names(answer: object, root: Path) -> None:
    row = {"question": "Which?", "options": '["a cat", "a dog"]', "answer": answer}
    assert read(root, row, "choice").meta["answers"] == ("B",)


def test_options_in_columns_of_letters(root: Path) -> None:
    row = {"question": "Which?", "A": "a cat", "B": "a dog", "C": "nan", "D": "", "answer": "A"}
    sample = read(root, row, "choice")
    assert sample.meta["options"] == ("a cat", "a dog")
    assert "A. a cat\nB. a dog\nAnswer with" in sample.turns[0].text
    with pytest.raises(ValueError, match="no letter, number"):
        read(root, {**row, "answer": "C"}, "choice")


def test_own_wordings_and_unknown_names(root: Path) -> None:
    assert read(root, ROWS["question"], "Tell me: {question}").turns[0].text == "Tell me: Why?"
    assert read(root, {**ROWS["question"], "task": "ocr"}, "question").turns[0].text == TASKS["ocr"].wordings[0]
    for name, said in (("vqaa", "no task prompt 'vqaa'"), ("{nothing}", "names 'nothing'"), ("{", "no template")):
        with pytest.raises(ValueError, match=said):
            get(name)
    with pytest.raises(ValueError, match="no task: name it"):
        read(root, ROWS["question"])
    with pytest.raises(ValueError, match="1 options"):
        letters(1)
    assert write_options(("x", "y")) == "A. x\nB. y"
    assert TaskPrompt(("{question} {question}",)).fields == ("question",)


def test_training_reads_the_same_rows(root: Path) -> None:
    """A data configuration of kind ``task``, from CSV (where lists are JSON text) and JSON lines."""
    with (root / "g.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "what", "box"])
        writer.writeheader()
        writer.writerows({"image": "a.png", "what": f"dog {k}", "box": "[8, 8, 32, 16]"} for k in range(3))
    (root / "v.jsonl").write_text("\n".join(json.dumps({"image": "a.png", **ROWS["vqa"]}) for _ in range(3)))
    (root / "mix.yaml").write_text(
        "sources:\n"
        "  - {kind: task, path: g.csv, columns: {phrase: what}, options: {task: grounding, boxes: xywh}}\n"
        "  - {kind: task, path: v.jsonl, options: {task: vqa}, weight: 2}\n"
    )
    boxes, questions = load_sources(root / "mix.yaml")
    assert (boxes[1].turns[1].text, boxes[1].index) == ("[0.125,0.375,0.625,0.625]", 1)
    assert "dog 1" in boxes[1].turns[0].text
    assert questions[2].turns[1].text == "so"
    (root / "mix.yaml").write_text("sources:\n  - {kind: task, path: v.jsonl, options: {task: grounding}}\n")
    with pytest.raises(ValueError, match="no column 'phrase'"):
        load_sources(root / "mix.yaml")


def test_a_row_without_its_picture_is_rejected_with_its_number(root: Path) -> None:
    rows = [{"image": "a.png", **ROWS["ocr"]}] * 25 + [{"image": "b.png", **ROWS["ocr"]}]
    (root / "o.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "o.yaml").write_text("sources:\n  - {kind: task, path: o.jsonl, options: {task: ocr}}\n")
    source = load_sources(root / "o.yaml")[0]
    with pytest.raises(RowRejected, match=r"row 25: no picture at"):
        source[25]
