"""Updates of real processes, for holding a plan against: ``python -m tests.unit.train.steps`` reads cases as JSON.

Each case is run in a fork of its own (two with ``ranks: 2``), which says by how much it grew at its peak during the
updates, the seconds that the fastest computed, and the bytes of all collectives of one.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory.backbone.llama import Llama, LlamaConfig
from accessory.models.mllm import MLLM
from accessory.nn.moe import MoEConfig
from accessory.parallel import groups
from accessory.parallel.layout import Layout, ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec, TuningSpec, attach
from accessory.peft.quantize import Quantization, quantize
from accessory.peft.tuning import promote
from accessory.schema import Batch
from accessory.tokens import IGNORE
from accessory.train.config import TrainConfig
from accessory.train.layouts import Choice, Planner
from accessory.train.loop import Hooks, Trainer
from accessory.train.objective import DialogueObjective, ObjectiveConfig
from accessory.train.stages import Rows
from tests.distributed.helpers import run_ranks

METHODS: dict[str, tuple[TuningSpec, ...]] = {
    "full": (TrainSpec(("backbone.*",)),),
    "lora": (LoraSpec(rank=16, alpha=32.0),),
    "prefix": (PrefixSpec(length=10),),
}
UPDATES = 4
LEAST = 1024  # bytes: collectives of counts and norms have less


def net(case: Mapping[str, Any]) -> MLLM:
    """The model of a case: on the device that is the default, with values that nobody reads."""
    sizes = dict(case["sizes"])
    moe = MoEConfig(**sizes.pop("moe")) if "moe" in sizes else None
    made = MLLM(Llama(LlamaConfig(**sizes, moe=moe)).to(torch.bfloat16))
    if case.get("quantization") and next(made.parameters()).device.type != "meta":
        quantize(made.backbone, Quantization(case["quantization"]))
    attach(made, METHODS[case["method"]], dtype=torch.float32)
    promote(made)
    return made


def config(case: Mapping[str, Any], folder: str = "") -> TrainConfig:
    """Its training section."""
    parallel = ParallelConfig(case.get("tensor", 1), case.get("data", "ddp"))
    return TrainConfig(
        folder, 100, 1e-4, case["batch"], case.get("accumulation", 1), cpu_autocast=case.get("autocast", False),
        block_checkpointing=case.get("checkpointing", False), parallel=parallel, tensorboard=False, log_every=1000,
    )  # fmt: skip


def planned(case: Mapping[str, Any], machine: Any) -> tuple[Planner, Choice]:
    """The plan of a case and the layout that it runs in."""
    with torch.device("meta"):
        skeleton = net(case)
    train = config(case)
    rows = Rows(case["batch"], case["length"], 0, 1.0)
    spec = Quantization(case["quantization"]) if case.get("quantization") else None
    choice = Choice(
        case.get("ranks", 1), train.parallel, train.block_checkpointing, case["batch"], train.accumulation
    )  # fmt: skip
    return Planner(skeleton, spec, train, rows, machine), choice


class _Words:
    """As much of a tokenizer as the objective asks for."""

    def special(self, name: str) -> int:
        raise ValueError(name)


class _Source:
    """The same batch for ever; all positions are learned."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(5, case["sizes"]["vocab_size"], (case["batch"], case["length"]), generator=g)
        labels = ids.clone()
        labels[:, 0] = IGNORE
        tiles = torch.empty(0, 3, 64, 64)
        self.batch = Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), tiles, ("made",) * len(ids))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Collectives(TorchDispatchMode):
    """Bytes of the whole result of every collective of more than :data:`LEAST`, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2].strip("_").replace("_base", "")
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = max(t.nbytes for t in tensors) if "base" in func._schema.name else 0
            if not size:
                size = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
            if size > LEAST:
                self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """What some updates take on this rank."""
    torch.manual_seed(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    made = net(case)
    with tempfile.TemporaryDirectory() as folder:
        train = config(case, folder)
        layout = Layout()
        if case.get("ranks", 1) > 1:
            layout = parallelize(made, train.parallel, list(made.backbone.layers))
        objective = DialogueObjective(ObjectiveConfig(), _Words())  # type: ignore[arg-type]
        hooks = Hooks(blocks=made.backbone.layers, layout=layout)
        trainer = Trainer(made, _Source(case), objective, train, hooks)
        made.train()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew: building is no update
        times = []
        for _ in range(case.get("updates", UPDATES)):
            begin = time.process_time()
            trainer._update(0.0)
            times.append(time.process_time() - begin)
        peak = _status("VmHWM") - before
        watch = Collectives()
        if case.get("ranks", 1) > 1:
            with watch:
                trainer._update(0.0)
        state = sum(t.nbytes for t in trainer.optimizer.state().values() if t.ndim)
        if trainer.metrics is not None:
            trainer.metrics.close()
    return {"peak": peak, "seconds": min(times), "sent": watch.bytes, "moments": state, "rank": groups.rank()}


def main() -> None:
    """Cases from stdin; a line of JSON for each, of its first rank."""
    torch.set_num_threads(1)
    warm = {"dim": 64, "n_layers": 2, "n_heads": 4, "ffn_dim": 128, "vocab_size": 64}
    for case in json.load(sys.stdin):

        def both(_: int, case: Mapping[str, Any] = case) -> dict[str, Any]:
            small = {"sizes": warm, "length": 40, "batch": 2, "updates": 2, "accumulation": 1}
            run({**case, **small, "sizes": {**warm, **{k: case["sizes"][k] for k in ("moe",) if k in case["sizes"]}}})
            return run(case)

        print(json.dumps(run_ranks(both, case.get("ranks", 1), 200)[0]), flush=True)


if __name__ == "__main__":
    main()
