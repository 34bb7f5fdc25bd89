"""The reference's tensor-parallel shards, each read by the rank that it was cut for, give the reference's logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.backbone.llama import Llama
from accessory.backbone.reference import from_reference
from accessory.nn import unread
from accessory.nn.unread import Cut
from accessory.parallel import groups
from accessory.parallel.axes import merge_shards
from accessory.parallel.layout import ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.peft.attach import attach
from tests.distributed.helpers import run_ranks
from tests.golden import LLM, needs_golden

OWN = ("08_tp_llama", "08_tp_llama_adapter", "08_tp_llama_peft", "08_tp_mixtral_sparse")  # a rank reads its file alone
SHARED = ("08_tp_mixtral", "08_tp_internlm")  # there whole experts, or queries, lie on one rank: both files are read
LIMIT = 1e-4


def shards(case: str) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The configuration of a case and its two files."""
    stated = json.loads((LLM / case / "config.json").read_text())
    return stated, [load_file(LLM / case / f"consolidated.{r:02d}-of-02.model.safetensors") for r in range(2)]


def own(tensor: Tensor, cut: Cut | None = None) -> Tensor:
    """A shard's tensor is the part already."""
    return tensor


def logits(case: str, other: bool = False) -> Tensor:
    """(B, T, V) on two ranks; ``other``: each rank takes the file of its neighbour."""
    stated, files = shards(case)
    names = stated["args"], stated["llama_type"]
    read: Callable[[Tensor], unread.Reader] = unread.held if case in SHARED else lambda t: partial(own, t)
    state: Mapping[str, Tensor] = merge_shards(files) if case in SHARED else files[groups.rank() ^ other]
    config, specs, tensors = from_reference(state, *names)
    with torch.device("meta"):
        net = Llama(config)
        attach(net, specs)
    unread.note(net, {name: read(tensors[name]) for name, _ in net.named_parameters()})
    assert len(tensors) == len(unread.noted(net))
    parallelize(net, ParallelConfig(tensor=2))
    tokens = load_file(LLM / case / "io.safetensors")["in.tokens"]
    with torch.no_grad():
        return net.eval().logits(net(net.embed(tokens)))


@needs_golden
def test_our_ranks_compute_what_the_references_ranks_computed() -> None:
    def work(rank: int) -> Any:
        groups_of_two(rank)
        found = {case: logits(case).numpy() for case in (*OWN, *SHARED)}
        return found, logits(OWN[0], other=True).numpy()

    for found, swapped in run_ranks(work):
        for case, ours in found.items():
            io = load_file(LLM / case / "io.safetensors")
            wanted = io.get("out.mp2_logits", io.get("out.merged_mp1_logits"))
            assert wanted is not None
            assert float((torch.from_numpy(ours) - wanted).abs().max()) < LIMIT, case
        wanted = load_file(LLM / OWN[0] / "io.safetensors")["out.mp2_logits"]
        assert float((torch.from_numpy(swapped) - wanted).abs().max()) > 100 * LIMIT


def groups_of_two(rank: int) -> None:
    """Tensor groups before anything is read, as the files are chosen by rank."""
    from accessory.parallel import layers

    layers.start(2)
    assert groups.tensor_rank() == rank


@needs_golden
def test_a_single_key_head_is_refused() -> None:
    """Falcon's one key head would have to be whole on every rank, as the reference has it."""

    def work(_: int) -> str:
        stated, files = shards("08_tp_falcon")
        config, _specs, _ = from_reference(merge_shards(files, whole=("wk", "wv")), stated["args"], "falcon")
        try:
            parallelize(Llama(config), ParallelConfig(tensor=2))
        except ValueError as error:
            return str(error)
        return ""

    assert run_ranks(work) == ["parallel.tensor 2 does not divide n_kv_heads 1; up to 8 1 does"] * 2
