"""What starts chats: models by folder or name, messages, sessions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

import accessory
from accessory.backbone.generate import Sampling
from accessory.models.build import Model
from accessory.peft.attach import TrainSpec
from accessory.serve import chat as chats
from accessory.serve.chat import ChatModel
from accessory.serve.sessions import Sessions
from tests.tiny import tiny_model, tiny_model_dir

GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("model"), seed=1)


def test_sessions_are_separate_and_bounded(model: Model) -> None:
    sessions = Sessions(ChatModel(model, sampling=GREEDY), capacity=2)
    sessions.get("a").say("What is this?")
    assert len(sessions.get("a").history) == 2
    assert sessions.get("b").history == ()
    sessions.get("a")
    sessions.get("c")
    assert len(sessions) == 2
    assert len(sessions.get("a").history) == 2, "the one idle for longest goes, not the oldest"
    with pytest.raises(ValueError, match="capacity"):
        Sessions(ChatModel(model), capacity=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path, seed=1)


def test_three_lines_of_python(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "cat.png")
    model = accessory.load(folder, sampling=GREEDY)
    answer = model.chat("What is this?", images=[str(tmp_path / "cat.png")])
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tmp_path / "cat.png"}, {"type": "text", "text": "What is this?"}],
        }
    ]
    assert answer == model.chat(messages)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And this?"}]
    chat = model.new_chat()
    chat.say("What is this?", [tmp_path / "cat.png"])
    assert model.chat(messages) == chat.say("And this?")
    assert model.chat("What is this?", max_new_tokens=200) != model.chat("What is this?")
    with pytest.raises(ValueError, match="last message must be the user's"):
        model.chat(messages[:2])
    with pytest.raises(ValueError, match="give no images beside"):
        model.chat(messages, images=["x.png"])


def test_seeds_make_sampling_repeatable(model: Model) -> None:
    whole = ChatModel(model, sampling=replace(GREEDY, temperature=1.0))
    assert whole.chat("What is this?", seed=3) == whole.chat("What is this?", seed=3)
    assert len({whole.chat("What is this?", seed=s) for s in range(4)}) > 1


def test_models_are_found_by_folder_or_shipped_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chats.find_model(folder) == folder
    monkeypatch.setattr("accessory.models.build.SHIPPED", folder.parent)
    assert chats.find_model("tiny") == folder
    with pytest.raises(ValueError, match=r"nowhere is neither a model folder .*shipped models are: tiny"):
        chats.find_model("nowhere")
    with pytest.raises(ValueError, match=r"did you mean tiny\?"):
        chats.find_model("tinny")
    folder.rename(folder.parent / "final")
    with pytest.raises(ValueError, match=r"did you mean .*/final\?"):
        chats.find_model(folder.parent)


def half(folder: Path, dtype: Literal["bf16", "fp32"] = "bf16") -> Path:
    """A model folder whose backbone does not train, and so stays in ``dtype``."""
    plain = tiny_model(folder).config
    backbone = replace(plain.backbone, dtype=dtype)
    return tiny_model_dir(folder, backbone=backbone, tuning=(TrainSpec(("projector.*",)),))


@pytest.mark.parametrize(
    ("dtype", "device", "packed"), [("fp32", "cpu", False), ("bf16", "cpu", True), ("bf16", "meta", False)]
)
def test_a_model_lies_on_its_device_and_is_packed_where_it_pays(
    tmp_path: Path, dtype: Literal["bf16", "fp32"], device: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = half(tmp_path, dtype)
    monkeypatch.setattr(chats, "choose_device", lambda name: torch.device(name))
    net = chats.load(folder, device=device).model.net
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {device}
    assert all((block.attention.fused is not None) is packed for block in net.backbone.layers)


def test_a_device_that_is_not_there_costs_no_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        chats.load(tmp_path / "nowhere", device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_a_gpu_says_the_same(folder: Path) -> None:
    picture = Image.effect_noise((50, 40), 60).convert("RGB")
    there, here = (chats.load(folder, device=d, sampling=GREEDY).new_chat() for d in ("cuda", "cpu"))
    for text, images in (("What is this?", [picture]), ("How many birds are there?", [])):
        assert there.say(text, images) == here.say(text, images)
