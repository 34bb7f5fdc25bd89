"""Numbers of the published reference on training: rates, clipping, decay, whole epochs, and what is done to weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import LLM as GOLDEN
from tests.golden import bump, copied, edit, needs_golden
from tools.conformance import run_case

CASES = (
    "09_clip_grad",
    "09_convert_to_hf",
    "09_lr_schedule",
    "09_param_groups",
    "09_train_llama",
    "09_train_mixtral",
    "09_train_peft",
    "09_weight_operate",
)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_cases_pass(case: str) -> None:
    verdict, said = run_case(GOLDEN / case)
    assert verdict == "passed", said


def move(groups: list[dict[str, Any]]) -> None:
    """The first parameter that decays becomes one that does not."""
    groups[0]["params"].append(groups[1]["params"].pop(0))


SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    ("09_clip_grad", bump("out.combo0.grad.2.weight"), "clipped differs"),
    ("09_clip_grad", edit("clip.json", lambda v: v["toy"][2].update(returned_norm=8.5)), "total norm differs"),
    ("09_convert_to_hf", bump("out.base.model.layers.1.self_attn.k_proj.weight"), "base differs"),
    ("09_convert_to_hf", bump("out.base_plus_diff.model.norm.weight"), "base_plus_diff differs"),
    ("09_convert_to_hf", bump("out.reference_logits"), "reference_logits differs"),
    ("09_lr_schedule", edit("lr.json", lambda v: v["iterations"][0]["rows"][6].update(lr=8e-4)), "lr by iterations"),
    ("09_lr_schedule", edit("lr.json", lambda v: v["epochs"][1]["rows"][1].update(lr=2e-4)), "lr by epochs"),
    ("09_lr_schedule", edit("lr.json", lambda v: v["epochs"].clear()), "lr.json has no epochs"),
    ("09_param_groups", edit("groups.json", lambda v: move(v[0]["result"]["groups"])), "llama decay is"),
    ("09_param_groups", edit("groups.json", lambda v: v[2]["result"]["groups"][1]["params"].pop()), "trainable is"),
    ("09_train_llama", bump("out.final.llma.layers.1.attention.wk.weight"), "final differs"),
    ("09_train_llama", edit("log.json", lambda v: v["per_iteration"]["4"].update(closs=6.0)), "closs differs"),
    ("09_train_peft", edit("log.json", lambda v: v["per_iteration"]["2"].update(grad_norm=1.0)), "grad_norm differs"),
    ("09_train_peft", bump("out.final.llma.layers.0.attention.wo.lora_b.weight"), "final differs"),
    ("09_weight_operate", bump("out.delta1.llma.norm.weight"), "delta differs"),
    ("09_weight_operate", bump("out.applied0.llma.layers.0.attention.wq.weight"), "applied differs"),
]


@needs_golden
@pytest.mark.parametrize(("case", "spoil", "words"), SPOILT)
def test_a_spoilt_case_fails(case: str, spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    spoil(copied(GOLDEN / case, tmp_path))
    verdict, said = run_case(tmp_path / case)
    assert verdict == "failed"
    assert words in said
