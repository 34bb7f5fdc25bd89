"""Numbers of the published reference with pictures: golden cases through the tool, and that the tool can fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden import LLM as GOLDEN
from tests.golden import copied, needs_golden
from tools.conform.vision import HANDLERS
from tools.conformance import HANDLERS as KNOWN
from tools.conformance import main

# Case, and how many of its outputs and intermediates are compared.
CASES = {
    "01v_llama_clip": 11,
    "02v_llama_adapter_visual": 14,
    "03v_llama_peft_clip": 11,
    "04_llama_qformerv2_peft_standin768": 8,
    "04_llama_qformerv2_peft_tinyblip2": 13,
    "04_llama_qformerv2_standin768": 8,
    "04_llama_qformerv2_tinyblip2": 13,
    "05_llama_ens": 29,
    "05_llama_ens10": 27,
    "05_llama_ens5": 29,
    "05_llama_ens5_light": 20,
    "05_llama_ens5p2": 31,
    "05_llama_ens_light": 20,
    "05_llama_ens_peft": 30,
    "05r_llama_ens5_real": 14,
    "05r_llama_ens_light_real": 10,
    "05r_llama_ens_real": 14,
    "06_mixtral_sparse_ens": 41,
    "06_mixtral_sparse_ens5": 37,
    "07v_meta_visual": 55,
}


def test_the_tool_knows_the_family() -> None:
    assert HANDLERS.items() <= KNOWN.items()


@needs_golden
def test_cases_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / case) for case in CASES]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("    on purpose: ")]
    for line, (case, number) in zip(lines, CASES.items()):
        assert line.startswith(f"{case}: passed ({number} compared: "), line
    assert lines[-1] == f"{len(CASES)} passed, 0 failed, 0 unsupported"


def changed(case: str, folder: Path, file: str, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a case with one tensor changed."""
    target = copied(GOLDEN / case, folder)
    tensors = load_file(target / f"{file}.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, target / f"{file}.safetensors")
    return target


def turned(x: Tensor) -> Tensor:
    return x.flip(0) + 0.1


def right_half_darker(x: Tensor) -> Tensor:
    return torch.cat([x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :] - 0.5], -1)


@needs_golden
@pytest.mark.parametrize(
    ("case", "file", "name", "change", "problem"),
    [
        ("01v_llama_clip", "weights", "clip.visual.proj", turned, "clip_tokens differs"),
        ("02v_llama_adapter_visual", "weights", "visual_query", turned, "visual_query_out differs"),
        ("02v_llama_adapter_visual", "weights", "prefix_gate", turned, "train_logits differs"),
        ("02v_llama_adapter_visual", "io", "mid.actual_prefix", turned, "actual_prefix differs"),
        ("04_llama_qformerv2_tinyblip2", "weights", "qformer.query_tokens", lambda x: x.flip(1), "qformer_last"),
        ("05_llama_ens_light", "weights", "start_img", turned, "llm_input differs"),
        ("05_llama_ens_peft", "io", "in.image_grid", right_half_darker, "enc_input.dinov2.mean differs"),
        ("05r_llama_ens_light_real", "weights", "dinov2_vitg14.pos_embed", lambda x: x.flip(1), "enc.dinov2_norm"),
        ("05r_llama_ens_light_real", "io", "out.nohalf_train_logits", lambda x: x + 1e-3, "nohalf_train_logits"),
        ("07v_meta_visual", "io", "in.images", turned, "c_loss differs"),
    ],
)
def test_a_spoilt_case_fails(
    case: str,
    file: str,
    name: str,
    change: Callable[[Tensor], Tensor],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(changed(case, tmp_path, file, name, change))]) == 1
    assert problem in capsys.readouterr().out


@needs_golden
def test_clips_activation_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = copied(GOLDEN / "01v_llama_clip", tmp_path)
    said = (case / "config.json").read_text()
    assert '"clip_quick_gelu": true' in said
    (case / "config.json").write_text(said.replace('"clip_quick_gelu": true', '"clip_quick_gelu": false'))
    assert main([str(case)]) == 1
    assert "clip_tokens differs" in capsys.readouterr().out


@needs_golden
def test_an_output_that_nothing_computes_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = changed("04_llama_qformerv2_standin768", tmp_path, "io", "in.tokens", lambda x: x)
    io = load_file(case / "io.safetensors")
    save_file(io | {"mid.surprise": io["out.train_logits"].clone()}, case / "io.safetensors")
    assert main([str(case)]) == 1
    assert "nothing computes mid.surprise" in capsys.readouterr().out
