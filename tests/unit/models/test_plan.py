"""The plan: counts by hand, names, and totals against the measured peaks of processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.__main__ import main
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.sizes import SIZES
from accessory.models.plan import (
    KERNELS,
    KINDS,
    Load,
    Rates,
    Subject,
    activation_bytes,
    find,
    plan,
    product_weights,
    weight_bytes,
)
from accessory.peft.quantize import Quantization

SMALL = {
    "wide": LlamaConfig(dim=768, n_layers=6, n_heads=12, n_kv_heads=4, ffn_dim=2048, vocab_size=16000),
    "deep": LlamaConfig(dim=512, n_layers=20, n_heads=8, ffn_dim=1536, vocab_size=32000, tie_embeddings=True),
    "long": LlamaConfig(dim=512, n_layers=16, n_heads=8, n_kv_heads=8, ffn_dim=2048, vocab_size=8000),
}
LOADS = {"wide": Load(1, 256, 2), "deep": Load(1, 128, 2), "long": Load(2, 384, 2)}
RATES = Rates(1e12, 1e11)

# Builds a model of touched memory, feeds a prompt, decodes, and says by how much the process grew at its peak.
CHILD = """
import json, os, sys
import torch
from accessory.backbone.keys import build_meta, config_from_dict
from accessory.backbone.quantized import TABLE, layout
from accessory.models.plan import KINDS
from accessory.nn.quantized import QuantizedTable
from accessory.peft.quantize import fill, restored, stamp, targets

torch.set_num_threads(1)
BF16 = torch.bfloat16

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

def run(config, kind, batch, prompt, new):
    with torch.inference_mode():
        model = build(config, KINDS[kind])
        cache = model.cache(batch, prompt + new)
        for length in (prompt, *[1] * new):
            ids = torch.ones(batch, length, dtype=torch.long)
            scores = model.logits(model(model.embed(ids), cache=cache)[:, -1:]).float()

warm = config_from_dict({"dim": 64, "n_layers": 1, "n_heads": 4, "ffn_dim": 128, "vocab_size": 64})
cases = json.load(sys.stdin)
for kind in sorted({c["kind"] for c in cases}):
    run(warm, kind, 1, 40, 2)
for case in cases:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a fork's peak begins at what it has now, and it has yet to touch the libraries
        run(warm, case["kind"], 1, 40, 2)
        before = status("VmRSS")
        run(config_from_dict(case["config"]), case["kind"], *case["load"])
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(os.read(read, 99).decode(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this machine")
def test_totals_are_the_peaks_of_processes() -> None:
    kinds = ["bf16", "int8", "int4", *(["nf4"] if importlib.util.find_spec("bitsandbytes") else [])]
    cases = [(name, kind) for name in SMALL for kind in kinds]
    asked = [
        {"config": vars(SMALL[n]), "kind": k, "load": [LOADS[n].batch, LOADS[n].prompt, LOADS[n].new]} for n, k in cases
    ]
    # Every larger block goes back to the system when it is freed, so the peak is that of what lives.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == len(cases) >= 9
    report = []
    for (name, kind), peak in zip(cases, peaks, strict=True):
        wanted = plan(Subject(name, SMALL[name]), kind, LOADS[name], RATES)
        # What the kernels keep may lie in the process already, left by what ran before: then it is not in the peak.
        least, most = (wanted.total - KERNELS) / peak, wanted.total / peak
        report.append((name, kind, round(peak / 1e6, 1), round(wanted.total / 1e6, 1), round(least, 3), round(most, 3)))
    print(*report, sep="\n")
    assert all(least <= 1.1 and most >= 0.9 for *_, least, most in report), report
    # The parts matter: without its activations the plan would be off by more than that somewhere.
    spare = [activation_bytes(SMALL[n], k, LOADS[n]) / p for (n, k), p in zip(cases, peaks, strict=True)]
    assert max(spare) > 0.2


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
    assert made.prefill_seconds == pytest.approx(2 * 6.476e9 * 200 / 1e12 + made.weights / 1e11, rel=1e-3)
    moved = made.weights - 2 * 32000 * 4096 + made.cache
    assert made.tokens_per_second == pytest.approx(2 * 1e11 / moved)
    assert plan(subject, "int4", load, RATES).tokens_per_second > 3 * made.tokens_per_second


def test_names() -> None:
    assert find("tinyllama-1.1b") == Subject("tinyllama-1.1b", SIZES["tinyllama-1.1b"])
    seen = find("tinyllama-1.1b+clip-l")
    assert 2 * 300e6 < seen.rest < 2 * 320e6
    nano = find("nano-sphinx")
    assert nano.backbone == SIZES["smollm2-135m"]
    assert 4 * 5e6 < nano.rest < 4 * 30e6
    with pytest.raises(ValueError, match="did you mean llama2-13b"):
        find("llama2-13")
    with pytest.raises(ValueError, match="sizes are: llama-7b"):
        find("zzz")


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama2-13b", "--prompt", "2048", "--rates", "100", "2000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama2-13b: 12.7 G weights in 40 blocks; 1 x (2048 + 256) tokens")
    assert [line.split("|")[1].strip() for line in lines[4:8]] == list(KINDS)
    assert "26.03 GB" in lines[4]
    for wrong in (["--batch", "0"], ["--rates", "0", "1"], ["--kinds", "int3"]):
        assert main(["plan", "llama2-13b", *wrong]) == 2
