"""GGUF files: dequantisation, config, conversion once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from accessory.backbone import gguf, store, weights
from accessory.nn.rope import RopeScaling, frequencies
from tests.tiny_backbone import TINY, equal, logits, model, write_gguf


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "F32", "BF16"])
def test_dequantisation_equals_the_reference(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    packed = quants.quantize(values, GGMLQuantizationType[kind])
    want = torch.from_numpy(np.array(quants.dequantize(packed, GGMLQuantizationType[kind])))
    raw = torch.frombuffer(bytearray(packed.tobytes()), dtype=torch.uint8).view(7, -1)
    got = gguf.dequantize(raw, kind)
    assert got.shape == (7, 96)
    assert torch.equal(got, want)
    assert (got - torch.from_numpy(values)).abs().max() < 0.3  # and it is the tensor, not only an equal mistake
    assert torch.equal(gguf.dequantize(raw, kind, torch.bfloat16), want.bfloat16())


def test_dequantisation_by_slices_equals_the_whole() -> None:
    raw = torch.randint(0, 60, (5000, 340), dtype=torch.uint8)  # more than one slice of about a megabyte
    whole = gguf.dequantize(raw, "Q8_0")
    assert torch.equal(whole[4000:4010], gguf.dequantize(raw[4000:4010], "Q8_0"))


def test_unsupported_quantisation_is_named() -> None:
    with pytest.raises(ValueError, match="Q6_K"):
        gguf.dequantize(torch.zeros(1, 210, dtype=torch.uint8), "Q6_K")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf_file_round_trips(tmp_path: Path, kind: str, tied: bool) -> None:
    m = model(dataclasses.replace(TINY, tie_embeddings=tied, rope_theta=1e5, norm_eps=1e-6))
    config, tensors = gguf.load_gguf(write_gguf(tmp_path / "x.gguf", m, kind), torch.float32)
    assert config == m.config
    error = (logits(weights.from_tensors(config, tensors)) - logits(m)).abs().max() / logits(m).abs().max()
    assert error <= {"F32": 0.0, "Q8_0": 0.05, "Q4_1": 0.5}[kind]
    assert (error == 0) == (kind == "F32")


def test_gguf_recovers_llama3_scaling_from_its_table(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0)
    config = dataclasses.replace(TINY, rope_scaling=scaling, rope_theta=5e5)
    plain, _ = frequencies(16, 5e5, None)
    table = plain / frequencies(16, 5e5, scaling)[0]
    path = write_gguf(tmp_path / "x.gguf", model(config), extra={"rope_freqs.weight": table})
    assert gguf.load_gguf(path)[0] == config
    wrong = write_gguf(tmp_path / "y.gguf", model(config), extra={"rope_freqs.weight": table**2})
    with pytest.raises(ValueError, match="rope_freqs"):
        gguf.load_gguf(wrong)


def test_gguf_of_another_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mamba'"):
        gguf.load_gguf(write_gguf(tmp_path / "x.gguf", model(), arch="mamba"))


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "x.gguf", model())
    folder = gguf.cached_gguf(path, tmp_path / "cache")
    assert store.read_json(folder / "config.json")["format"] == "accessory"
    again = weights.load_backbone(folder)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "load_gguf", None)  # a second conversion would fail
        assert gguf.cached_gguf(path, tmp_path / "cache") == folder
    other = gguf.cached_gguf(write_gguf(path, model()), tmp_path / "cache")  # new content, old name
    assert other != folder
    assert equal(weights.load_backbone(path).state_dict(), weights.load_backbone(other).state_dict())
