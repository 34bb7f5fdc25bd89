"""Numbers of the published reference on the data side: tokenizers, rows, templates, pictures, wrapper calls."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.golden import LLM as GOLDEN
from tests.golden import bump, edit, needs_golden

CASES = (
    "07_meta_text",
    "07_tokenizer_hf",
    "07_tokenizer_spm",
    "07_tokenizer_spm_noprefix",
    "07d_alpaca_dataset",
    "07d_conversation_dataset",
    "07d_image_transforms",
    "07d_pretrain_data",
)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_cases_pass(tool: ModuleType, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(GOLDEN / case)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{case}: passed")
    assert out.endswith("1 passed, 0 failed, 0 unsupported\n")


def swap(row: dict[str, Any], key: str) -> None:
    row[key][3] += 1


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
]


@needs_golden
@pytest.mark.parametrize(("case", "spoil", "words"), SPOILT)
def test_a_spoilt_case_fails(
    tool: ModuleType,
    case: str,
    spoil: Callable[[Path], None],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder, copy_function=shutil.copyfile)
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        path.chmod(0o755)
    spoil(folder)
    assert tool.main([str(folder)]) == 1
    assert words in capsys.readouterr().out


@needs_golden
def test_what_is_done_otherwise_on_purpose_is_said(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main([str(GOLDEN / "07_tokenizer_hf")])
    reasons = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    on purpose: ")]
    assert len(reasons) == 2
    assert any("the reference lets a user's </s> end the sequence" in r for r in reasons)
