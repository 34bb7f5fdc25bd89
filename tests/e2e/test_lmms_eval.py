"""lmms-eval, unmodified, finds our models through their entry point and agrees with our own evaluation, item by item.

It needs an environment with lmms-eval and this package installed (``pip install -e '.[lmms]'``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from accessory.evaluate.run import run
from accessory.evaluate.tasks import read_tasks
from accessory.models import build
from tests.structure.source import ROOT
from tests.tiny import tiny_model_dir

HERE = find_spec("lmms_eval") is not None and bool(entry_points(group="lmms_eval.models", name="accessory"))
pytestmark = [
    pytest.mark.skipif(not HERE, reason="lmms-eval is not installed beside this package"),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]
OPTIONS = ("cat", "dog", "fish")
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function used.visual
doc_to_text: question
"""
WRITTEN = """task: written
output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 9, temperature: 0, do_sample: false, until: []}}
process_results: !function used.score
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
CHOSEN = """task: chosen
output_type: multiple_choice
doc_to_choice: !function used.choices
doc_to_target: !function used.target
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
USED = """from PIL import Image
def visual(doc): return [Image.open(doc["path"]).convert("RGB")]
def score(doc, results): return {"exact": float(results[0] == doc["answer"])}
def choices(doc): return ["cat", "dog", "fish"]
def target(doc): return doc["gold"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, six pictures, and the same test sets for both."""
    root = tmp_path_factory.mktemp("lmms")
    tiny_model_dir(root)
    rows = []
    for k in range(6):
        noise = np.random.default_rng(k).integers(0, 256, (48, 48 + 16 * (k % 2), 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{k}.png")
        rows.append({
            "image": f"{k}.png", "path": str(root / f"{k}.png"), "question": f"Where is {k}?", "answer": "there",
            "options": OPTIONS, "gold": k % 3,
        })  # fmt: skip
    (root / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "t.yaml").write_text(
        "tasks:\n"
        "  - {name: written, path: q.jsonl, score: text, prompt: question, max_new_tokens: 9}\n"
        "  - {name: chosen, path: q.jsonl, score: choice-likelihood, prompt: question, columns: {answer: gold}}\n"
    )
    (root / "tasks").mkdir()
    (root / "tasks" / "used.py").write_text(USED)
    for text in (WRITTEN, CHOSEN):
        name = text.split()[1]
        (root / "tasks" / f"{name}.yaml").write_text((text + COMMON).format(data=root / "q.jsonl"))
    return root


def harness(folder: Path, task: str, *more: str) -> list[dict[str, Any]]:
    """The items that lmms-eval writes of one task."""
    out = folder / f"out-{task}"
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "accessory",
        "--model_args", f"pretrained={folder / 'tiny'},device=cpu", "--tasks", task,
        "--include_path", str(folder / "tasks"), "--batch_size", "4", "--limit", "6", "--log_samples",
        "--output_path", str(out), *more,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["HF_HOME"] = str(folder / "hf")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stderr[-3000:]
    files = list(out.rglob("*samples*.jsonl"))
    assert len(files) == 1, done.stderr[-3000:]
    return [json.loads(line) for line in files[0].read_text().splitlines()]


def ours(folder: Path, name: str) -> list[dict[str, Any]]:
    tests = next(t for t in read_tasks(folder / "t.yaml") if t.config.name == name)
    run(build.load(folder / "tiny"), tests, folder / f"{name}.jsonl", model_id="m", batch_size=3)
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()][1:]


def test_written_answers_agree_to_the_item(folder: Path) -> None:
    own = [i["answer"] for i in ours(folder, "written")]
    theirs = harness(folder, "written")
    assert [i["filtered_resps"] for i in sorted(theirs, key=lambda i: i["doc_id"])] == own
    assert len(set(own)) > 1


def test_choices_by_likelihood_agree_to_the_item(folder: Path) -> None:
    own = ours(folder, "chosen")
    theirs = sorted(harness(folder, "chosen", "--force_simple"), key=lambda i: i["doc_id"])
    assert [i["acc"] for i in theirs] == [i["scores"]["accuracy"] for i in own]
    losses = [[float(r[0]) for r in i["filtered_resps"]] for i in theirs]
    assert losses == [pytest.approx([-v for v in i["log_likelihoods"]], abs=1e-3) for i in own]
