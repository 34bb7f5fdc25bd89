"""The bugs of ``test_lineage_bugs`` that were in what users start: evaluation, the chat class, ranks, first stages."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from accessory.__main__ import EXAMPLES, main
from accessory.evaluate.scorers import SCORERS, Truth, chosen
from accessory.models import published_keys
from accessory.models.published import LLAMA_TYPES, trains
from accessory.models.reference import projector_names
from accessory.parallel.axes import merge_shards, split_shards
from accessory.serve.sphinx import SPHINXModel
from tests.tiny import tiny_model
from tests.tiny_backbone import TINY, equal, model


def test_bug_03_options_of_the_evaluation_are_those_that_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    asked = re.findall(r"--[a-z-]+", EXAMPLES["evaluate"])
    assert asked
    assert all(option in shown for option in asked)


@pytest.mark.parametrize("said", ["Red.", " red ", "RED", "reddish"])
def test_bug_03_answers_are_cleaned_before_they_are_compared(said: str) -> None:
    assert SCORERS["exact"].item(said, Truth(("red",)))["accuracy"] == float(said != "reddish")


def test_bug_03_a_choice_that_is_not_made_is_never_guessed() -> None:
    options = ("a cat", "a dog", "a cow")
    assert [chosen("I cannot tell", options) for _ in range(50)] == [None] * 50
    assert chosen("B. a dog", options) == "B"


def test_bug_04_the_chat_class_answers(tmp_path: Path) -> None:
    talk = SPHINXModel(tiny_model(tmp_path, template="sphinx"))
    picture = Image.new("RGB", (40, 24), (9, 99, 200))
    said = talk.generate_response([["What is this?", None]], picture, max_gen_len=4, temperature=0.0)
    assert isinstance(said, str)
    again = talk.generate_response([["What is this?", said], ["And this?", None]], picture, max_gen_len=4, seed=1)
    assert isinstance(again, str)
    for name, method in inspect.getmembers(talk, inspect.ismethod):
        if not name.startswith("_"):
            called = set(re.findall(r"self\.(\w+)\(", inspect.getsource(method)))
            assert all(hasattr(talk, other) for other in called), (name, called)


def test_bug_12_every_rank_has_its_own_heads_of_internlm() -> None:
    state = dict(model(replace(TINY, qkv_bias=True, out_bias=True)).state_dict())
    shards = split_shards(state, 2)
    assert equal(merge_shards(shards), state)
    axes = {"attention.wq": 0, "attention.wk": 0, "attention.wv": 0, "feed_forward.w1": 0, "feed_forward.w3": 0}
    axes |= {"attention.wo": 1, "feed_forward.w2": 1}
    for rank, shard in enumerate(shards):
        for name, axis in axes.items():
            whole = state[f"layers.0.{name}.weight"]
            assert torch.equal(shard[f"layers.0.{name}.weight"], whole.chunk(2, axis)[rank]), name
        for name in ("wq", "wk", "wv"):
            whole = state[f"layers.0.attention.{name}.bias"]
            assert torch.equal(shard[f"layers.0.attention.{name}.bias"], whole.chunk(2)[rank]), name


def test_bug_21_a_first_stage_trains_every_projection() -> None:
    kinds = [kind for kind, row in LLAMA_TYPES.items() if len(row.encoders) > 1]
    assert "mixtral_sparse_ens5" in kinds
    assert [trains(kind, {"trainable_mode": "mm_stage1"}) for kind in kinds] == [("projector.*",)] * len(kinds)
    joints = published_keys.joints("mixtral_sparse_ens5", 32)
    assert any(name.startswith("qformer_proj.") for name in joints)
    assert len(projector_names(published_keys.on_meta(joints))) == len(joints)
