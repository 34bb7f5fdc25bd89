"""Numbers of the published reference around the network: tokenizers, rows, templates, pictures, the wrapper's calls;
training's rates, clipping, decay and whole epochs, and what is done to weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import LLM as GOLDEN
from tests.golden import bump, copied, edit, needs_golden
from tools.conformance import run_case

CASES = (
    "07_meta_text",
    "07_tokenizer_hf",
    "07_tokenizer_spm",
    "07_tokenizer_spm_noprefix",
    "07d_alpaca_dataset",
    "07d_conversation_dataset",
    "07d_image_transforms",
    "07d_pretrain_data",
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


def swap(row: dict[str, Any], key: str) -> None:
    row[key][3] += 1


def move(groups: list[dict[str, Any]]) -> None:
    """The first parameter that decays becomes one that does not."""
    groups[0]["params"].append(groups[1]["params"].pop(0))


SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    ("07_tokenizer_spm", edit("cases.json", lambda v: swap(v[0], "encode_segment")), "encode_segment is"),
    ("07_tokenizer_spm", edit("cases.json", lambda v: swap(v[0], "encode_wo_prefix_space")), "encode_wo_prefix_space"),
    ("07_tokenizer_hf", edit("cases.json", lambda v: v[0].update(decode_of_bos_eos_encode="<s>x</s>")), "with ends"),
    ("07_tokenizer_spm", edit("cases.json", lambda v: v.clear()), "is empty"),
    ("07d_alpaca_dataset", edit("items.json", lambda v: swap(v[1], "labels")), "row labels is"),
    ("07d_alpaca_dataset", edit("items.json", lambda v: swap(v[7], "input")), "row input is"),
    ("07d_alpaca_dataset", edit("format_prompt.json", lambda v: v[3].update(prompt="x")), "format_prompt is"),
    ("07d_alpaca_dataset", bump("out.image.8"), "image differs"),
    ("07d_conversation_dataset", edit("items.json", lambda v: swap(v[4], "labels")), "row labels is"),
    ("07d_conversation_dataset", edit("templates.json", lambda v: v["bair_v1"].update(prompt="x")), "bair_v1 prompt"),
    ("07d_image_transforms", bump("out.resized_center_crop.size14.image1"), "resized_center_crop differs"),
    ("07d_image_transforms", bump("out.padded_resize.size24.image0"), "padded_resize differs"),
    ("07d_pretrain_data", edit("pretrain.json", lambda v: v["packed"]["files"]["f1.pkl"].pop()), "packed is"),
    ("07d_pretrain_data", edit("pretrain.json", lambda v: v["val"][0].reverse()), "document is"),
    ("07_meta_text", bump("out.compute_logits.text1"), "compute_logits differs"),
    ("07_meta_text", bump("out.loss.c_loss"), "c_loss differs"),
    ("07_meta_text", edit("behaviour.json", lambda v: v["generate"][1].update(responses=["x"])), "answer is"),
    ("07_meta_text", edit("behaviour.json", lambda v: v["stream_generate"][1]["yields"].pop()), "stream is"),
    ("07_meta_text", edit("behaviour.json", lambda v: v["evaluate_examples"][0]["result"]["ppl"].reverse()), "nll"),
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


@needs_golden
def test_what_is_done_otherwise_on_purpose_is_said() -> None:
    _, said = run_case(GOLDEN / "07_tokenizer_hf")
    reasons = [line for line in said.splitlines() if line.startswith("    on purpose: ")]
    assert len(reasons) == 2
    assert any("the reference lets a user's </s> end the sequence" in r for r in reasons)
