"""A model that is spread before its weights are read: the same parts on every rank, and no rank ever holds all."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.hf import write_hf
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.meta import save_shards
from accessory.backbone.weights import save_accessory
from accessory.models import build
from accessory.models.build import BackboneConfig, ModelConfig
from accessory.nn import unread
from accessory.nn.moe import MoEConfig
from accessory.parallel.layout import Layout, ParallelConfig, local
from accessory.parallel.shard import parallelize
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec
from accessory.peft.quantize import Quantization
from accessory.train.run import RunConfig, run
from tests.distributed.curves import PLANS, TOLERANCE, difference
from tests.distributed.helpers import run_ranks
from tests.distributed.spread import EVERYTHING
from tests.tiny import tiny_config, tiny_tokenizer
from tests.unit.train.squares import write_squares

SIZES = LlamaConfig(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=360, ffn_dim=256, max_length=64)


def written(
    home: Path, sizes: LlamaConfig = SIZES, layout: str = "accessory", dtype: torch.dtype = torch.float32
) -> ModelConfig:
    """A folder of random weights, and a model of nothing else."""
    torch.manual_seed(5)
    folder, net = home / layout, Llama(sizes).to(dtype)
    if layout == "hf":
        write_hf(sizes, dict(net.state_dict()), folder)
    elif layout == "shards":
        save_shards(sizes, net.state_dict(), folder, 2)
    else:
        save_accessory(sizes, net.state_dict(), folder)
    words = str(tiny_tokenizer(home / "tokenizer"))
    return ModelConfig(BackboneConfig(str(folder), tokenizer=words, dtype="fp32"), None, None)


def parts(config: ModelConfig, plan: ParallelConfig, later: bool) -> tuple[dict[str, Tensor], Layout, bool]:
    """What a rank holds of a model; whether any of it was unread before it was spread."""
    torch.manual_seed(0)
    net = build.build(config, train=True, later=later).net
    waiting = any(p.is_meta for p in net.parameters())
    unread.read(net.backbone, ("norm.weight",))  # what is wanted before is whole, and cut with the rest
    layout = parallelize(net, plan, list(net.backbone.layers))
    assert not any(t.is_meta for t in net.state_dict().values())
    return {n: local(t).clone() for n, t in net.state_dict().items()}, layout, waiting


def cases(home: Path) -> dict[str, ModelConfig]:
    """A model of every kind of weights and layout, by what is special about it."""
    plain = written(home)
    tuned = (LoraSpec(rank=3), PrefixSpec(length=3))
    tower = replace(tiny_config(tiny_tokenizer(home / "tokenizer")), backbone=plain.backbone)
    found = {
        "full": replace(plain, tuning=(TrainSpec(("backbone.*",)),)),
        "everything": replace(tower, tuning=EVERYTHING),
        "hf": replace(written(home, layout="hf"), tuning=tuned),
        "shards": replace(written(home, layout="shards"), tuning=tuned),
        "tied": replace(written(home / "tied", replace(SIZES, tie_embeddings=True)), tuning=tuned),
        "moe": replace(written(home / "moe", replace(SIZES, moe=MoEConfig(4, 2))), tuning=tuned),
        "bf16": replace(plain, backbone=replace(plain.backbone, dtype="bf16"), tuning=(TrainSpec(("*.wq.*",)),)),
    }
    for kind in ("int8", "int4", "nf4"):
        few = Quantization(kind, group=32 if kind == "int4" else 64)  # type: ignore[arg-type]
        found[kind] = replace(plain, tuning=tuned, quantization=few)
    torch.manual_seed(1)
    build.save(build.build(found["full"], train=True), home / "trained")
    found["base"] = ModelConfig(base=str(home / "trained"), tuning=(LoraSpec(rank=2),))
    found["base in nf4"] = replace(found["base"], quantization=Quantization("nf4"))
    return found


@pytest.mark.parametrize("name", PLANS)
def test_what_is_read_late_is_what_was_cut(name: str, tmp_path: Path) -> None:
    plan, world = PLANS[name]
    known = cases(tmp_path)

    def work(rank: int) -> Any:
        wrong = {}
        for case, config in known.items():
            early, late = (parts(config, plan, later) for later in (False, True))
            same = early[0].keys() == late[0].keys() and early[1] == late[1]
            differ = [n for n, t in early[0].items() if n not in late[0] or not torch.equal(t, late[0][n])]
            if not same or differ or early[2] or late[2] == (case == "base in nf4"):
                wrong[case] = (same, differ[:3], early[2], late[2])
        return wrong

    assert run_ranks(work, world) == [{}] * world


def test_a_model_that_was_not_spread_does_not_compute(tmp_path: Path) -> None:
    config = replace(written(tmp_path), quantization=Quantization("int8"))
    net = build.build(config, later=True).net
    with pytest.raises(ValueError, match=r"a weight \(128, 128\) has not been read yet"):
        net.backbone.layers[0].get_submodule("attention.wq")(torch.ones(1, 128))
    unread.point(net, {"backbone.tok_embeddings.weight": unread.held(torch.ones(3, 128))})
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(3, 128\), the model needs \(360, 128\)"):
        unread.read(net)


def test_a_run_begins_with_folders(tmp_path: Path) -> None:
    """An experiment on a folder of weights, then one that begins where the first ended; both ways of reading."""
    path = write_squares(tmp_path, 3)
    folder = written(tmp_path / "weights").backbone.source

    def rows(name: str, *more: str) -> list[dict[str, float]]:
        own = (f"model.backbone.source={folder}", "model.backbone.llama=null", f"train.output_dir={tmp_path}/{name}")
        run(configuration.load(path, RunConfig, [*own, "train.eps=1e-6", *more]), folder=tmp_path)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first = rows("first")
    again = f"init={tmp_path}/first/final"
    second = rows("second", again)
    assert second[0]["loss"] < first[0]["loss"] - 0.05  # what was learned is there

    def work(rank: int) -> Any:
        spread = "train.parallel.tensor=2"
        return rows("first on two", spread), rows("second on two", spread, again)

    for one, two in zip((first, second), run_ranks(work)[0], strict=True):
        assert max(difference(one, two, value) for value in ("loss", "grad_norm")) < TOLERANCE


# --- memory ----------------------------------------------------------------------------------------------------------

_MMAP_THRESHOLD = -3
BIG = LlamaConfig(dim=768, n_layers=8, n_heads=12, n_kv_heads=6, vocab_size=4096, ffn_dim=2304, max_length=64)


def peak(work: Any) -> int:
    """Bytes by which the resident memory of this process grew at most during ``work()``."""
    # Freed tensors go back to the system at once, as those of a real model do: they are beyond glibc's 32 MB.
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 18)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("name", ["tensor", "fsdp"])
def test_no_rank_ever_holds_the_whole(name: str, tmp_path: Path) -> None:
    plan, world = PLANS[name]
    plain = written(tmp_path, BIG, dtype=torch.bfloat16)
    backbone = replace(plain.backbone, dtype="bf16")
    config = replace(plain, backbone=backbone, tuning=(TrainSpec(("backbone.*",)),))  # trains, and so in fp32
    small = replace(written(tmp_path / "small"), tuning=config.tuning)
    whole = 2 * (tmp_path / "accessory" / "model.safetensors").stat().st_size
    assert whole > 250e6

    def work(rank: int) -> Any:
        def spread(later: bool, config: ModelConfig = config) -> None:
            net = build.build(config, train=True, later=later).net
            parallelize(net, plan, list(net.backbone.layers))

        spread(True, small)  # what is imported on the way is no weight
        return peak(lambda: spread(True)), peak(lambda: spread(False))

    for late, early in run_ranks(work, world):
        print(f"{name}: {late / whole:.2f} of the whole at most, {early / whole:.2f} when built whole")
        assert late < 0.75 * whole  # half of it, and a block or the largest tensor while it is read
        assert early > whole
