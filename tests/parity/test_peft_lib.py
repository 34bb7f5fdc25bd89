"""The same numbers as the `peft` library: LoRA, and its LLaMA-Adapter method (adaption prompt), in fp32.

The mapping of the adaption prompt is exact: its gate is one raw scalar a layer where ours is one number a head, so the
scalar is broadcast, and the gradient of the scalar is the sum over our heads. It adds after the (linear, bias-free)
output projection what we add before it.
"""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from accessory.backbone.hf import from_hf, hf_name, interleave
from accessory.backbone.llama import Llama
from accessory.backbone.weights import load_backbone
from accessory.peft.attach import LINEARS, LoraSpec, PrefixSpec, attach, load_trainable, merge, trainable_state

LAYERS = 3


@pytest.fixture(params=[2, 4], ids=["grouped", "full"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LlamaForCausalLM, Llama]:
    """A library model with every parameter random, and ours with the same weights through the production loader."""
    config = HFConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()
    randomise(theirs.parameters())
    theirs.save_pretrained(tmp_path)
    return theirs, load_backbone(tmp_path, dtype=torch.float32).eval()


def randomise(parameters: object) -> None:
    for p in parameters:  # type: ignore[attr-defined]
        nn.init.normal_(p, std=0.3)


def compare(library: nn.Module, ours: Llama, plain: Tensor, ids: Tensor) -> None:
    """Logits and input gradients agree, and the tuning moved the logits."""
    x = ours.embed(ids).detach()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = library(inputs_embeds=a).logits, ours.logits(ours(b))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)
    assert a.grad.abs().max() > 1
    assert (expected - plain).abs().max() > 0.1


def library_name(name: str) -> str:
    """The library's name of one of our LoRA factors."""
    linear, factor = name.removesuffix(".weight").split(".delta.")
    module = hf_name(f"{linear}.weight").removesuffix(".weight")
    return f"base_model.model.{module}.lora_{factor.upper()}.default.weight"


def rows(name: str, value: Tensor) -> Tensor:
    """The library's tensor in our row order: B of queries and keys is reordered like their weights."""
    return interleave(value, 8) if name.endswith(("wq.delta.b.weight", "wk.delta.b.weight")) else value


@pytest.mark.parametrize(("alpha", "targets"), [(16.0, LINEARS), (3.0, ("wq", "wv"))])
def test_lora(pair: tuple[LlamaForCausalLM, Llama], alpha: float, targets: tuple[str, ...]) -> None:
    theirs, ours = pair
    ids = torch.randint(0, 60, (2, 9))
    plain = theirs(ids).logits.detach()
    attach(ours, [LoraSpec(rank=4, alpha=alpha, targets=targets)])
    mapped = {name: library_name(name) for name in trainable_state(ours)}
    leaves = sorted({name.split(".")[-4] for name in mapped.values()})
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=leaves)
    library = peft.get_peft_model(theirs, config).eval()
    trained = {n: p for n, p in library.named_parameters() if p.requires_grad}
    randomise(trained.values())
    assert set(mapped.values()) == set(trained)
    assert len(mapped) == 2 * len(targets) * LAYERS
    load_trainable(ours, {n: rows(n, trained[t].detach()) for n, t in mapped.items()})
    compare(library, ours, plain, ids)
    own = dict(ours.named_parameters())
    for n, t in mapped.items():
        torch.testing.assert_close(own[n].grad, rows(n, trained[t].grad), rtol=1e-3, atol=1e-3)
    merge(ours)
    folded = library.merge_and_unload().state_dict()
    expected = from_hf(ours.config, dict(folded), "the merged library model")
    assert len(expected) == len(ours.state_dict())
    for n, p in ours.state_dict().items():
        torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [2, LAYERS])
def test_llama_adapter(pair: tuple[LlamaForCausalLM, Llama], layers: int) -> None:
    theirs, ours = pair
    ids = torch.randint(0, 60, (2, 9))
    plain = theirs(ids).logits.detach()
    config = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=layers, task_type="CAUSAL_LM")
    library = peft.get_peft_model(theirs, config).eval()
    attach(ours, [PrefixSpec(length=5, layers=layers, gate="raw")])
    trained = {n: p for n, p in library.named_parameters() if p.requires_grad}
    randomise(trained.values())
    state, pairs = {}, []
    for i in range(LAYERS - layers, LAYERS):
        name = f"layers.{i}.attention.prefix"
        prompt, gate = (
            trained[f"base_model.model.model.layers.{i}.self_attn.adaption_{p}"] for p in ("prompt", "gate")
        )
        state[f"{name}.tokens"], state[f"{name}.gate"] = prompt[0].detach(), gate.detach().expand(4)
        pairs.append((name, prompt, gate))
    assert len(trained) == 2 * len(pairs)
    load_trainable(ours, state)
    compare(library, ours, plain, ids)
    own = dict(ours.named_parameters())
    for name, prompt, gate in pairs:
        torch.testing.assert_close(own[f"{name}.tokens"].grad, prompt.grad[0], rtol=1e-3, atol=1e-3)
        own_gate = own[f"{name}.gate"].grad
        assert own_gate is not None
        torch.testing.assert_close(own_gate.sum()[None], gate.grad, rtol=1e-3, atol=1e-3)
