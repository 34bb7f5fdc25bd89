"""The plan: counts by hand, names, and totals against the measured peaks of processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accessory.__main__ import main
from accessory.backbone.keys import config_to_dict
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.models import plan as planning
from accessory.models.plan import (
    KERNELS,
    KINDS,
    Load,
    Rates,
    Subject,
    activation_bytes,
    bytes_read,
    find,
    plan,
    product_weights,
    weight_bytes,
)
from accessory.models.published import LLAMA_TYPES
from accessory.nn.moe import MoEConfig
from accessory.peft.quantize import Quantization
from accessory.vision import meta, presets
from tests.structure.source import ROOT
from tests.unit.models.pictured import SMALL_SPHINX

SMALL = {
    "wide": LlamaConfig(dim=768, n_layers=6, n_heads=12, n_kv_heads=4, ffn_dim=2048, vocab_size=16000),
    "deep": LlamaConfig(dim=512, n_layers=20, n_heads=8, ffn_dim=1536, vocab_size=32000, tie_embeddings=True),
    "long": LlamaConfig(dim=512, n_layers=16, n_heads=8, n_kv_heads=8, ffn_dim=2048, vocab_size=8000),
    "experts": LlamaConfig(dim=512, n_layers=4, n_heads=8, ffn_dim=1024, vocab_size=8000, moe=MoEConfig(8, 2)),
    "seeing": LlamaConfig(dim=512, n_layers=8, n_heads=8, ffn_dim=1536, vocab_size=8000),
}
SEEN = 5 * (8 + 257)
LOADS = {
    "wide": Load(1, 256, 2), "deep": Load(1, 128, 2), "long": Load(2, 384, 2), "experts": Load(2, 512, 2),
    "seeing": Load(1, SEEN + 75, 2, 1),
}  # fmt: skip
RATES = Rates(1e12, 1e11)

# Builds a model of touched memory, feeds a prompt, decodes, and says by how much the process grew at its peak.
CHILD = """
import ctypes, json, os, sys
import torch
from torch import nn
from accessory.backbone.keys import build_meta, config_from_dict
from accessory.backbone.quantized import TABLE, layout
from accessory.models.mllm import MLLM
from accessory.models.plan import KINDS
from accessory.peft.quantize import fill, restored, targets
from accessory.tokens import IMAGE
from accessory.vision import presets
from accessory.vision.projector import Projector
from tests.unit.models.pictured import SMALL_SPHINX

torch.set_num_threads(1)
libc = ctypes.CDLL(None)
BF16 = torch.bfloat16
presets.PRESETS["small-sphinx"] = SMALL_SPHINX

def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def tensor(shape, dtype):
    made = torch.empty(shape, dtype=dtype)
    return made.fill_(0.01 if dtype.is_floating_point else 37)

def build(config, spec):
    model = build_meta(config)
    for name, linear in targets(model):
        if spec is not None:
            shape = tuple(linear.weight.shape)
            fields = {k: tensor(s, d or BF16) for k, (s, d) in spec.layout(*shape).items()}
            fill(linear, restored(spec, fields, shape, BF16))
    state = {k: tensor(p.shape, BF16) for k, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval()

def run(config, kind, batch, prompt, new, pictures=0, preset=None):
    with torch.inference_mode():
        model = build(config, KINDS[kind])
        net, tiles = model, None
        ids = torch.ones(batch, prompt, dtype=torch.long)
        if preset is not None:
            tower = presets.build(preset)
            projector = Projector(tower.groups, config.dim)
            ids[:, : projector.num_tokens] = IMAGE
            tiles = torch.ones(batch, 3, tower.size, tower.size)
            net = MLLM(model, tower, projector).eval()
        cache = model.cache(batch, prompt + new)
        x = model.embed(ids) if tiles is None else net.embed(ids, tiles)
        for _ in range(new + 1):
            scores = model.logits(model(x, cache=cache)[:, -1:]).float()
            x = model.embed(torch.ones(batch, 1, dtype=torch.long))

warm = config_from_dict({"dim": 64, "n_layers": 1, "n_heads": 4, "ffn_dim": 128, "vocab_size": 64})
cases = json.load(sys.stdin)
for kind in sorted({c["kind"] for c in cases}):
    run(warm, kind, 1, 40, 2, 1, "tiny-sphinx")
for case in cases:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a fork's peak begins at what it has now, and it has yet to touch the libraries
        run(warm, case["kind"], 1, 40, 2, 1, "tiny-sphinx")
        libc.malloc_trim(0)  # what was freed and kept would be used again, and missing in the peak
        before = status("VmRSS")
        run(config_from_dict(case["config"]), case["kind"], *case["load"], case["preset"])
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(os.read(read, 99).decode(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this machine")
def test_totals_are_the_peaks_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "small-sphinx", SMALL_SPHINX)
    kinds = ["bf16", "int8", "int4", *(["nf4"] if importlib.util.find_spec("bitsandbytes") else [])]
    cases = [(name, kind) for name in SMALL for kind in (kinds if name in ("wide", "deep", "long") else kinds[:2])]
    preset = {"seeing": "small-sphinx"}
    asked = [
        {"config": config_to_dict(SMALL[n]), "kind": k, "load": list(vars(LOADS[n]).values()), "preset": preset.get(n)}
        for n, k in cases
    ]
    subjects = {n: Subject(n, c) for n, c in SMALL.items()}
    subjects["seeing"] = planning._seeing(subjects["seeing"], "small-sphinx")
    assert subjects["seeing"].positions == SEEN
    # Every larger block goes back to the system when it is freed, so the peak is that of what lives.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True, env=env, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == len(cases) >= 9
    report = []
    for (name, kind), peak in zip(cases, peaks, strict=True):
        wanted = plan(subjects[name], kind, LOADS[name], RATES)
        # What the kernels keep may lie in the process already, left by what ran before: then it is not in the peak.
        least, most = (wanted.total - KERNELS) / peak, wanted.total / peak
        report.append((name, kind, round(peak / 1e6, 1), round(wanted.total / 1e6, 1), round(least, 3), round(most, 3)))
    print(*report, sep="\n")
    assert all(least <= 1.1 and most >= 0.9 for *_, least, most in report), report
    # The parts matter: without its activations the plan would be off by more than that somewhere.
    spare = [activation_bytes(SMALL[n], k, LOADS[n]) / p for (n, k), p in zip(cases, peaks, strict=True)]
    assert max(spare) > 0.2
    tower = subjects["seeing"]
    assert min(tower.rest, tower.encoding.peak) > 0.1 * peaks[cases.index(("seeing", "bf16"))]


def test_weights_by_hand() -> None:
    c = SIZES["llama2-7b"]
    assert weight_bytes(c, None) == 2 * 6_738_415_616
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    rest = 2 * (32000 * 4096 + 65 * 4096)
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096) + 32000
    assert weight_bytes(c, Quantization("int8")) == linears + 2 * rows + rest
    assert weight_bytes(c, Quantization("int4", 64)) == linears // 2 + 4 * linears // 64 + rest
    assert product_weights(c) == linears - 32000 * 4096
    assert weight_bytes(c, Quantization("nf4")) < 0.29 * weight_bytes(c, None)


def test_cache_and_times_by_hand() -> None:
    subject, load = Subject("x", SIZES["llama2-7b"], rest=5), Load(2, 100, 28)
    made = plan(subject, "bf16", load, RATES)
    assert made.cache == 2 * 2 * 32 * 4096 * 2 * 128
    assert made.total == made.weights + 5 + made.cache + made.activations
    read = made.weights - 2 * 32000 * 4096
    assert made.prefill_seconds == pytest.approx(2 * 6.476e9 * 200 / 1e12 + read / 1e11, rel=1e-4)
    assert made.tokens_per_second == pytest.approx(2 * 1e11 / (read + made.cache))
    assert plan(subject, "int4", load, RATES).tokens_per_second > 3 * made.tokens_per_second


def test_names() -> None:
    assert find("tinyllama-1.1b") == Subject("tinyllama-1.1b", SIZES["tinyllama-1.1b"])
    seen = find("tinyllama-1.1b+clip-l")
    assert 4 * 300e6 < seen.rest < 4 * 320e6
    assert (seen.tower, seen.positions, seen.load()) == ("clip-l", 257, Load(1, 1024, 256, 1))
    nano = find("nano-sphinx")
    assert nano.backbone == SIZES["smollm2-135m"]
    assert 4 * 5e6 < nano.rest < 4 * 30e6
    assert (nano.tower, nano.positions) == ("efficientnet-lite0", 17)
    with pytest.raises(ValueError, match="nano-dit is a generator; plan is for"):
        find(str(ROOT / "weights" / "nano-dit"))
    with pytest.raises(ValueError, match="did you mean llama2-13b"):
        find("llama2-13")
    with pytest.raises(ValueError, match="sizes are: llama-7b"):
        find("zzz")


def test_published_models() -> None:
    made = find("sphinx-1k")
    assert (made.backbone, made.tower, made.positions) == (SIZES["llama2-13b"], "sphinx-1k", 1455)
    # All parameters as published, less the language model and the text half of a CLIP that is not kept; in fp32.
    assert 3.38e9 < made.rest / 4 < 3.45e9
    assert made.load() == Load(1, 3840, 256, 1)
    assert (find("llama_ens5").rest, find("SPHINX-Tiny-1k").load().prompt) == (made.rest, 2048 - 256)
    assert find("sphinx-plus-2k").positions == 10 * (257 + 2)
    with pytest.raises(ValueError, match="did you mean SPHINX-1k"):
        find("SPHINX-1kk")
    with pytest.raises(ValueError, match="--prompt 1000 is too short: 1 x 1455"):
        plan(made, "bf16", Load(1, 1000, 1, 1), RATES)
    with pytest.raises(ValueError, match="--pictures 1: llama2-7b does not see"):
        plan(find("llama2-7b"), "bf16", Load(1, 1000, 1, 1), RATES)


def test_experts_that_no_token_takes_are_not_read() -> None:
    c = SIZES["mixtral-8x7b"]
    experts = 2 * 32 * 8 * 3 * 4096 * 14336
    whole = weight_bytes(c, None) - 2 * 32000 * 4096
    assert bytes_read(c, "bf16", 1) == whole - experts * 6 // 8
    torch.manual_seed(0)
    for tokens in (2, 5):
        drawn = torch.rand(4000, tokens, 8).topk(2).indices.flatten(1)
        taken = sum(len(row.unique()) for row in drawn) / 4000
        assert (bytes_read(c, "bf16", tokens) - whole + experts) / experts * 8 == pytest.approx(taken, rel=0.01)
    assert bytes_read(c, "bf16", 4096) == whole
    one, many = (plan(Subject("x", c), "bf16", Load(b, 10, 1), RATES).tokens_per_second for b in (1, 64))
    assert one > 3 * many / 64  # and it matters: alone, a token waits for a quarter of the experts
    assert bytes_read(SIZES["llama2-7b"], "int8", 1) == bytes_read(SIZES["llama2-7b"], "int8", 9)


def test_encoders_by_themselves_are_the_mixture() -> None:
    """A mixture is planned from its encoders; run whole it takes the same products, and nearly the same memory."""
    tower = meta.tower_of("tiny-sphinx").requires_grad_(False)
    counter = meta.Counter(tower)
    with torch.no_grad(), counter:
        tower.tokens(torch.empty(1, 3, tower.size, tower.size, device="meta"))
    found = meta.encoding("tiny-sphinx")
    assert found.flops == counter.flops > 0
    assert 0.8 < found.peak / counter.peak < 1.25
    assert meta.encoding("clip-l").flops == pytest.approx(2 * 303e6 * 257, rel=0.05)


def test_the_table_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(planning.published()) == 20
    rows = {kind: (kind, LLAMA_TYPES[kind]) for kind in ("llama", "mixtral")}
    monkeypatch.setattr(planning, "published", lambda: rows)
    assert main(["plan", "--rates", "100", "2000", "--kinds", "bf16", "nf4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "| model | made of | positions | tokens | towers | KV cache | activations | bf16 | nf4 |"
    )
    assert lines[2].startswith("| llama | llama2-7b+clip-l-projected | 257 | 4096 | 1.2")
    assert len(lines[2].split("|")) == len(lines[0].split("|")) == len(lines[1].split("|"))


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama2-13b", "--prompt", "2048", "--rates", "100", "2000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama2-13b: 12.7 G weights in 40 blocks; 1 x (2048 + 256) tokens")
    assert [line.split("|")[1].strip() for line in lines[4:8]] == list(KINDS)
    assert "26.03 GB" in lines[4]
    for wrong in (["--batch", "0"], ["--rates", "0", "1"], ["--kinds", "int3"]):
        assert main(["plan", "llama2-13b", *wrong]) == 2
