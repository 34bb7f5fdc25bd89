"""Quantised backbones on disk: the same model after every way in, and no more memory on the way than full weights."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.__main__ import main
from accessory.backbone import hf, quantized, weights
from accessory.backbone.compiled import CompiledStep
from accessory.backbone.fast import accelerate
from accessory.backbone.generate import Sampling, generate
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.quantized import save_quantized
from accessory.models.gate import QUANTISED, GateError, check, check_codes, check_drift, drift, measure
from accessory.nn.moe import MoEConfig, lay_out_experts
from accessory.peft.attach import LoraSpec, attach
from accessory.peft.quantize import Quantization, found, num_bytes, quantize
from benchmarks.quantize import SPOILS, good, swapped, transposed, zeroed
from tests.tiny_backbone import write_gguf

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=96, tie_embeddings=True)
NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SPECS = [
    Quantization("int8"),
    Quantization("int4", 32, embeddings=True),
    pytest.param(Quantization("nf4"), marks=NF4),
]
compiler = shutil.which("g++") or shutil.which("clang++")


def made(config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(7)
    model = Llama(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.requires_grad_(False).bfloat16()


def scores(model: Llama) -> Tensor:
    with torch.no_grad():
        return model.logits(model(model.embed(torch.arange(9)[None])))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_way_in_gives_the_same_model(tmp_path: Path, spec: Quantization, tied: bool) -> None:
    config = LlamaConfig(**(vars(CONFIG) | {"tie_embeddings": tied}))
    full = made(config)
    weights.save_accessory(config, full.state_dict(), tmp_path / "ours", max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("model-*"))) > 1
    hf.write_hf(config, full.state_dict(), tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", full.float())
    quantize(full.bfloat16(), spec)
    wanted = full.state_dict()
    loaded = [
        weights.load_backbone(tmp_path / name, quantization=spec, dtype=torch.bfloat16)
        for name in ("ours", "hf", "m.gguf")
    ]
    save_quantized(accelerate(loaded[0]), tmp_path / "saved", max_shard_bytes=30_000)
    loaded += [weights.load_backbone(tmp_path / "saved"), weights.load_backbone(tmp_path / "saved", quantization=spec)]
    for model in loaded:
        assert found(model) == spec
        assert equal(model.state_dict(), wanted)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(scores(loaded[-1]), scores(full))
    stored = sum(f.stat().st_size for f in (tmp_path / "saved").glob("*.safetensors"))
    assert num_bytes(full) < stored < num_bytes(full) + 30_000


def test_what_is_refused(tmp_path: Path) -> None:
    spec = Quantization("int4", 32)
    model = made()
    with pytest.raises(ValueError, match="not quantised: save_accessory"):
        save_quantized(model, tmp_path / "x")
    quantize(model, spec)
    save_quantized(model, tmp_path / "q")
    with pytest.raises(ValueError, match=r"quantised as .*int4.*not as .*int8"):
        weights.load_backbone(tmp_path / "q", quantization=Quantization("int8"))
    with pytest.raises(ValueError, match="holds quantised weights"):
        weights.read_folder(tmp_path / "q")
    weights.save_accessory(CONFIG, made().state_dict(), tmp_path / "full")
    with pytest.raises(ValueError, match=r"layers.0.attention.wq: .* no groups of 128; of these: \[32, 64\]"):
        weights.load_backbone(tmp_path / "full", quantization=Quantization("int4", 128))
    config = tmp_path / "q" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"group"', '"groups"'))
    with pytest.raises(ValueError, match=r"quantization .* is wrong: .*groups"):
        weights.load_backbone(tmp_path / "q")
    config.write_text(json.dumps(json.loads(whole) | {"quantization": {"kind": "int8"}}))
    with pytest.raises(ValueError, match="does not fit the model"):
        weights.load_backbone(tmp_path / "q")
    attach(model, (LoraSpec(rank=2),))
    with pytest.raises(ValueError, match=r"14 unexpected|28 unexpected"):
        save_quantized(model, tmp_path / "tuned")


def test_the_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.save_accessory(CONFIG, made().state_dict(), tmp_path / "full")
    source, target = str(tmp_path / "full"), str(tmp_path / "q")
    assert main(["convert", source, target, "--quantize", "int4,group=32"]) == 0
    printed = capsys.readouterr().out
    assert "int4,group=32" in printed
    assert "moved by 0." in printed
    assert equal(
        weights.load_backbone(tmp_path / "q").state_dict(), quantize(made(), Quantization("int4", 32)).state_dict()
    )
    assert main(["convert", source, str(tmp_path / "hf"), "--to", "hf", "--quantize", "int8"]) == 2


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("spoil", SPOILS)
def test_the_gate_sees_a_spoilt_tensor(spec: Quantization, spoil: Callable[[nn.Module], None]) -> None:
    full, model = made(), made()
    before, bound = measure(full), QUANTISED[spec.kind]
    quantize(model, spec)
    spoil(model)
    after = measure(model)

    def weight(name: str) -> Tensor:
        return full.get_submodule(name).get_parameter("weight")

    if spoil is good:
        assert 0 < check_drift(before, after, "quantising", bound).nats < bound.nats / 2
        assert 0 < check_codes(model, weight, "quantising") < bound.code
        return
    with pytest.raises(GateError, match=r"quantising: in layers\.\d\.\S+ a weight is off by"):
        check_codes(model, weight, "quantising")
    if spoil is zeroed:  # the prompts alone may not notice it, and for that the codes are looked at
        assert drift(before, after).nats > 0
    assert {swapped, transposed, zeroed} == set(SPOILS) - {good}


@pytest.mark.parametrize("spoil", [swapped, zeroed, transposed])
def test_a_spoilt_file_is_refused(
    tmp_path: Path,
    spoil: Callable[[nn.Module], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights.save_accessory(CONFIG, made().state_dict(), tmp_path / "full")
    real = quantized.save_quantized

    def broken(model: Llama, folder: Path, **options: int) -> None:
        spoil(model)
        real(model, folder, **options)

    monkeypatch.setattr(quantized, "save_quantized", broken)
    convert = ["convert", str(tmp_path / "full"), str(tmp_path / "q"), "--quantize", "int8"]
    assert main(convert) == 2
    assert "was removed" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main([*convert, "--skip-gate"]) == 0  # and it is the gate that refuses


def test_the_gate_of_the_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.save_accessory(CONFIG, made().state_dict(), tmp_path / "full")
    convert = ["convert", str(tmp_path / "full"), str(tmp_path / "q"), "--quantize", "int4,group=32"]
    assert main([*convert, "--tolerance", "1e-6"]) == 2
    assert "the limit is 1e-06 nats" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main([*convert, "--tolerance", "1e-6", "--skip-gate"]) == 0
    assert "not compared" in capsys.readouterr().out


FAMILIES = {
    "mixtral": {"tie_embeddings": False, "moe": MoEConfig(4, 2)},
    "falcon": {"norm": "layer", "gated": False, "activation": "gelu", "order": "parallel_one_norm"},
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path: Path, family: str, spec: Quantization) -> None:
    """Experts, and feed-forwards without a gate; Falcon's file holds fused rows under names of its own."""
    config = LlamaConfig(**(vars(CONFIG) | FAMILIES[family]))
    full = made(config)
    hf.write_hf(config, full.state_dict(), tmp_path / "hf")
    loaded = weights.load_backbone(tmp_path / "hf", quantization=spec)
    lay_out_experts(loaded)  # leaves quantised experts alone
    before = measure(full)
    quantize(full, spec)
    assert equal(loaded.state_dict(), full.state_dict())
    assert check_drift(before, measure(loaded), "quantising", QUANTISED[spec.kind]).nats > 0
    check(measure(loaded), measure(accelerate(full)), "accelerating")
    save_quantized(loaded, tmp_path / "saved")
    assert equal(weights.load_backbone(tmp_path / "saved").state_dict(), loaded.state_dict())
    kernels = [n for n in loaded.state_dict() if n.endswith("codes") and ".feed_forward." in n]
    assert len(kernels) == (2 * 4 * 3 if family == "mixtral" else 2 * 2)
    assert not any(".gate." in n for n in kernels)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_of_any_layout_are_quantised_without_a_stated_dtype(tmp_path: Path, family: str) -> None:
    config = LlamaConfig(**(vars(CONFIG) | FAMILIES[family]))
    full, tensors = made(config), dict(made(config).state_dict())
    loaded = weights.quantized_from_tensors(config, tensors, Quantization("int8", embeddings=True))
    assert not tensors
    assert equal(loaded.state_dict(), quantize(full, Quantization("int8", embeddings=True)).state_dict())


# Loads and measures a model, or converts it, and says how much the process grew at its peak.
CHILD = """
import sys, torch
from pathlib import Path
from accessory.backbone.weights import load_backbone
from accessory.models.gate import measure
from accessory.peft.quantize import Quantization, quantize
def status(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name + ":")).split()[1])
torch.set_num_threads(1)
measure(quantize(load_backbone(Path(sys.argv[2])), Quantization("int4")))  # what libraries take at their first use
if sys.argv[3] == "convert":
    from accessory.__main__ import main
    main(["convert", sys.argv[2], sys.argv[4] + "-small", "--quantize", "int4"])
    before = status("VmRSS")
    assert main(["convert", sys.argv[1], *sys.argv[4:]]) == 0
    sys.exit(print(status("VmHWM") - before))
before = status("VmRSS")
spec = None if sys.argv[3] == "bf16" else Quantization.parse(sys.argv[3])
measure(load_backbone(Path(sys.argv[1]), quantization=spec))  # mapped weights count when they are read
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this machine")
def test_loading_quantised_never_holds_more_than_full_weights(tmp_path: Path) -> None:
    config = LlamaConfig(dim=1024, n_layers=6, n_heads=16, n_kv_heads=4, ffn_dim=3072, vocab_size=8000)
    model = Llama(config).bfloat16()
    weights.save_accessory(config, model.state_dict(), tmp_path / "big")
    weights.save_accessory(CONFIG, made().state_dict(), tmp_path / "small")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    peaks = {}
    for kind in ("bf16", "int4"):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "big"), str(tmp_path / "small"), kind]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        peaks[kind] = int(done.stdout) * 1024
    full = num_bytes(model)
    assert 0.9 * full < peaks["bf16"] < 1.4 * full  # with what a product of the largest matrix takes beside it
    assert peaks["int4"] < 0.75 * peaks["bf16"], peaks
    for name, options in {"gated": [], "alone": ["--skip-gate"]}.items():
        command = [sys.executable, "-c", CHILD, str(tmp_path / "big"), str(tmp_path / "small"), "convert"]
        command += [str(tmp_path / name), "--quantize", "int4", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        peaks[name] = int(done.stdout.split()[-1]) * 1024
    written = (tmp_path / "gated" / "model.safetensors").stat().st_size
    print({name: round(peak / full, 2) for name, peak in peaks.items()}, round(written / full, 2))
    # With the gate the full model is asked once, mapped, and let go (1.2 to 1.3 times what is read was measured);
    # without it no more than what is written, twice while it is laid out, and a layer (0.4 to 0.45).
    assert peaks["gated"] < 1.5 * full, peaks
    assert peaks["alone"] < 0.6 * full, peaks


@pytest.mark.skipif(compiler is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_compiled_step_takes_quantised_weights(kind: str) -> None:
    spec = Quantization("int8", embeddings=True) if kind == "int8" else Quantization("int4", 32, embeddings=True)
    config = LlamaConfig(**(vars(CONFIG) | {"n_layers": 1}))
    model = quantize(made(config), spec)
    assert isinstance(model, Llama)
    prompt = model.embed(torch.arange(5))
    plain = generate(accelerate(model), [prompt], sampling=Sampling(max_new_tokens=6))
    accelerate(model, compile=True)
    assert isinstance(model.step, CompiledStep)
    assert model.step.key(model) is not None
    calls = []
    run = model.step._run
    model.step._run = lambda *args: calls.append(1) or run(*args)
    assert generate(model, [prompt], sampling=Sampling(max_new_tokens=6)) == plain
    assert (len(calls), model.step.broken) == (5, False)
