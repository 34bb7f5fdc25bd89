"""What harnesses ask: messages, generation arguments, and the same answers as our own evaluation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from accessory.evaluate.harness import Asked, parts_of, sampling_of, turns_of
from accessory.evaluate.run import run
from accessory.evaluate.tasks import read_tasks
from accessory.evaluate.vlmeval import AccessoryVLM
from accessory.schema import Picture
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, five pictures and a test set over them."""
    root = tmp_path_factory.mktemp("harness")
    tiny_model_dir(root)
    for k in range(5):
        noise = np.random.default_rng(k).integers(0, 256, (48, 48 + 16 * (k % 2), 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{k}.png")
    (root / "q.csv").write_text("image,question,answer\n" + "".join(f"{k}.png,Where is {k}?,{k}\n" for k in range(5)))
    (root / "t.yaml").write_text("tasks: [{name: q, path: q.csv, score: exact, prompt: question, max_new_tokens: 9}]")
    return root


def test_greedy_unless_sampling_is_wanted() -> None:
    greedy = sampling_of({"max_new_tokens": 5, "temperature": 0, "top_p": 0.9, "num_beams": 1, "until": ["\n", ""]})
    assert (greedy.max_new_tokens, greedy.temperature, greedy.top_p, greedy.stop) == (5, 0, None, ("\n",))
    assert sampling_of({"temperature": 0.7, "do_sample": False}).temperature == 0
    hot = sampling_of({"temperature": 0.7, "top_p": 0.9, "top_k": 3, "until": "##"})
    assert (hot.temperature, hot.top_p, hot.top_k, hot.stop, hot.seed) == (0.7, 0.9, 3, ("##",), 0)
    assert sampling_of({}, default=7).max_new_tokens == 7
    for strange in ({"num_beams": 4}, {"length_penalty": 2.0}):
        with pytest.raises(ValueError, match="is not supported"):
            sampling_of(strange)


def test_parts_of_both_harnesses(folder: Path) -> None:
    path = str(folder / "1.png")
    lmms = [{"type": "image", "url": Image.open(path)}, {"type": "text", "text": "What?"}]
    kit = [{"type": "image", "value": path}, {"type": "text", "value": "What?"}]
    read = [parts_of(lmms), parts_of(kit)]
    for parts in read:
        assert isinstance(parts[0], Picture)
        assert parts[1] == "What?"
    assert read[0][0].source.tobytes() == read[1][0].source.tobytes()  # type: ignore[union-attr]
    told = turns_of([{"role": "system", "content": "Be kind."}, {"role": "user", "content": lmms}])
    assert [t.role for t in told] == ["system", "user"]
    for bad, said in (
        ([{"type": "video", "url": "a.mp4"}], "type 'video'"),
        ([{"type": "image"}], "holds nothing"),
        ([{"type": "image", "url": "http://x/a.png"}], "cannot be read"),
        (7, "text or a list"),
    ):
        with pytest.raises(ValueError, match=said):
            parts_of(bad)
    with pytest.raises(ValueError, match="role 'tool'"):
        turns_of([{"role": "tool", "content": "x"}])


def test_vlmevalkit_s_interface_answers_as_our_evaluation_does(folder: Path, tmp_path: Path) -> None:
    """``generate_inner`` and ``chat_inner`` on the items of an own test set, beside ``evaluate`` in batches."""
    vlm = AccessoryVLM(str(folder / "tiny"), device="cpu", max_new_tokens=9)
    tests = read_tasks(folder / "t.yaml")[0]
    run(vlm.asked.model, tests, tmp_path / "q.jsonl", model_id="m", batch_size=3)
    items = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()][1:]
    message: list[dict[str, Any]]
    for k, item in enumerate(items):
        message = [{"type": "image", "value": str(folder / f"{k}.png")}, {"type": "text", "value": f"Where is {k}?"}]
        assert vlm.generate_inner(message, dataset="q") == item["answer"]
        assert vlm.chat_inner([{"role": "user", "content": message}]) == item["answer"]
        # As its runs call it: any form of a message, and by name of the argument.
        assert vlm.generate(message=[str(folder / f"{k}.png"), f"Where is {k}?"], dataset="q") == item["answer"]
        assert vlm.chat([{"role": "user", "content": message}]) == item["answer"]
    assert len({i["answer"] for i in items}) > 1
    assert vlm.generate("Where is 1?") == vlm.generate({"type": "text", "value": "Where is 1?"}) != items[1]["answer"]
    assert vlm.is_api is False
    vlm.set_dump_image(lambda line: "a.png")
    told = [{"role": "user", "content": message}, {"role": "assistant", "content": "there"},
            {"role": "user", "content": [{"type": "text", "value": "Where?"}]}]  # fmt: skip
    assert vlm.chat_inner(told) != vlm.generate_inner([{"type": "text", "value": "Where?"}])
    assert vlm.use_custom_prompt("MMBench") is False
    with pytest.raises(ValueError, match="an empty message"):
        vlm.generate_inner([])
    with pytest.raises(ValueError, match="must be the user's"):
        vlm.chat_inner(told[:2])


def test_likelihoods_of_dialogues(folder: Path) -> None:
    asked = Asked(str(folder / "tiny"), device="cpu")
    turns = turns_of([{"role": "user", "content": "What is this?"}])
    one, two = asked.likelihoods([(turns, "a cat"), (turns, "three small birds")])
    assert one.total < 0
    assert two.total < one.total
    assert asked.device.type == "cpu"
