"""Quantised linears: what is kept, what is computed, what trains, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.backbone.fast import accelerate, release
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.nn.linear import Linear
from accessory.nn.quantized import FEW, Int4, Int8, Quantized
from accessory.peft import quantize as module
from accessory.peft.attach import BiasSpec, LoraSpec, PrefixSpec, ScaleSpec, TrainSpec, attach, merge, trainable_state
from accessory.peft.quantize import CLASSES, Quantization, dequantize, found, num_bytes, quantize, targets
from tests.tiny import disturb

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=96)
TIED = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=96, tie_embeddings=True)
NF4 = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SPECS = {
    "int8": Quantization("int8"),
    "int4": Quantization("int4", 32),
    "int4-64": Quantization("int4", 64),
    "nf4": Quantization("nf4", 64),
}
KINDS = [pytest.param(name, marks=[NF4] if name == "nf4" else []) for name in SPECS]
# Root mean square error of a normal weight, relative to it: half a step, as each format has it.
ERROR = {"int8": 0.01, "int4": 0.09, "int4-64": 0.10, "nf4": 0.10}


def made(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(5)
    model = Llama(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.requires_grad_(False).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, length: int = 9) -> Tensor:
    return torch.randn(2, length, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def scores(model: Llama, x: Tensor) -> Tensor:
    return model.logits(model(x))


@pytest.mark.parametrize("name", KINDS)
def test_parts_of_a_kernel_have_its_values(name: str) -> None:
    torch.manual_seed(1)
    kernel = module.quantized(SPECS[name], torch.randn(96, 256))
    whole = kernel.dequantized()
    for axis in (0, 1):
        parts = [kernel.cut(axis, i, 2) for i in (0, 1)]
        assert torch.equal(torch.cat([p.dequantized() for p in parts], axis), whole)
        assert not torch.equal(*(p.dequantized() for p in parts))
        x = torch.randn(3, parts[0].shape[1])
        assert torch.allclose(parts[0].joined(x), x @ parts[0].dequantized().T, atol=1e-4)
    if name != "int8":
        with pytest.raises(ValueError, match=r"256 inputs are not 16 part\(s\) of whole groups"):
            kernel.cut(1, 0, 16)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_the_product_with_its_dequantised_weight(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(80, 128).to(dtype)
    kernel = module.quantized(SPECS[name], weight)
    near = kernel.dequantized()
    assert (kernel.shape, near.dtype, kernel.dtype) == ((80, 128), dtype, dtype)
    error = float((near.float() - weight.float()).pow(2).mean().sqrt())
    assert ERROR[name] / 4 < error < ERROR[name]
    for rows in (1, 3, FEW + 1):  # one row, few rows, more rows than the packed kernels are used for
        x = torch.randn(2, rows, 128).to(dtype)
        with torch.no_grad():
            plain = kernel.joined(x)
            kernel.optimize()
            packed = kernel.joined(x)
            kernel.release()
        wanted = x.float() @ near.float().T
        limit = 1e-4 if dtype == torch.float32 else 0.02 * float(wanted.abs().max())
        assert float((plain.float() - wanted).abs().max()) < limit
        assert float((packed.float() - wanted).abs().max()) < limit
        assert float((x.float() @ weight.float().T - wanted).abs().max()) > 0.02  # the weight itself is another


@pytest.mark.parametrize("out", [64, 80, 192, 208])
def test_packing_int4_for_this_machine_is_undone(out: int) -> None:
    kernel = Int4.of(torch.randn(out, 96).bfloat16(), 32)
    before = {k: v.clone() for k, v in kernel.state_dict().items()}
    near = kernel.dequantized()
    kernel.optimize()
    assert kernel.packed, "torch has no int4 kernel for this machine"
    assert not torch.equal(kernel.codes, before["codes"])
    assert torch.equal(kernel.dequantized(), near)
    assert all(torch.equal(v, before[k]) for k, v in kernel.state_dict().items())
    with pytest.raises(ValueError, match="release it before"):
        kernel.load_state_dict(before)
    kernel.release()
    assert torch.equal(kernel.codes, before["codes"])


def test_int4_chooses_a_range_by_its_error() -> None:
    weight = torch.randn(64, 128)
    weight[:, 5] = 9.0  # an outlier in every first group
    low, high = (f(weight.unflatten(1, (-1, 64)), -1).values[..., None] for f in (torch.min, torch.max))
    step = (high - low) / 15
    plain = (((weight.unflatten(1, (-1, 64)) - low) / step).round() * step + low).flatten(1)
    near = Int4.of(weight, 64).dequantized()
    assert (near - weight).pow(2).mean() < (plain - weight).pow(2).mean()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_what_is_quantised_and_what_is_not(name: str, config: LlamaConfig) -> None:
    full, model = made(config), made(config)
    before = {k: v.clone() for k, v in full.state_dict().items()}
    quantize(model, SPECS[name])
    assert found(model) == SPECS[name]
    linears = dict(targets(model))
    assert len(linears) == 14 + (not config.tie_embeddings)
    assert all(linear.weight is None for linear in linears.values())
    left = {k: v for k, v in model.state_dict().items() if ".kernel." not in k}
    assert set(left) == {k for k in before if "norm" in k or k == "tok_embeddings.weight"}
    assert all(torch.equal(v, before[k]) for k, v in left.items())
    x = inputs()
    with torch.no_grad():
        ours, theirs = scores(model, x), scores(full, x)
        assert not torch.allclose(ours, theirs, atol=1e-3)
        assert float((ours - theirs).pow(2).mean() / theirs.pow(2).mean()) < (0.001 if name == "int8" else 0.1)
        dequantize(model)
        torch.testing.assert_close(scores(model, x), ours, rtol=1e-4, atol=1e-4)
    assert found(model) is None
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_embeddings_are_quantised_when_asked(name: str, config: LlamaConfig) -> None:
    spec = Quantization(SPECS[name].kind, SPECS[name].group, embeddings=True)
    full, model = made(config, torch.bfloat16), quantize(made(config, torch.bfloat16), spec)
    assert isinstance(model, Llama)
    assert model.cache(1, 4).keys[0].dtype == torch.bfloat16
    ids = torch.tensor([[3, 95, -1, 7]])
    with torch.no_grad():
        near, exact = model.embed(ids), full.embed(ids)
        torch.testing.assert_close(near, exact, rtol=0.02, atol=0.01)
        assert not torch.equal(near, exact)
        torch.testing.assert_close(model.tok_embeddings.weight[ids.clamp_min(0)], near)
        if config.tie_embeddings:
            h = inputs(torch.bfloat16)
            table = model.tok_embeddings.weight.float()
            torch.testing.assert_close(model.logits(h).float(), h.float() @ table.T, rtol=0.03, atol=0.05)


def expected_bytes(config: LlamaConfig, spec: Quantization, wide: int) -> int:
    """By hand: codes, scales, and what stays in ``wide`` bytes."""
    d, f, kv = config.dim, config.hidden_width, config.kv_heads * config.head_width
    linears = config.n_layers * [(d, d), (kv, d), (kv, d), (d, d), (f, d), (d, f), (f, d)]
    linears += [] if config.tie_embeddings else [(config.vocab_size, d)]
    total = wide * (config.vocab_size * d + d * (2 * config.n_layers + 1))
    for out, width in linears:
        if spec.kind == "int8":
            total += out * width + wide * out
        elif spec.kind == "int4":
            total += out * width // 2 + 2 * wide * out * width // spec.group
        else:
            total += out * width // 2 + out * width // 64 + 4 * -(-out * width // 64 // 256) + 4
    return total


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_bytes(name: str, config: LlamaConfig) -> None:
    model, spec = made(config, torch.bfloat16), SPECS[name]
    full = num_bytes(model)
    assert full == 2 * sum(p.numel() for p in model.parameters())
    quantize(model, spec)
    assert num_bytes(model) == expected_bytes(config, spec, 2)
    before = num_bytes(model)
    accelerate(model)
    assert num_bytes(model) == before
    tensors = [*model.parameters(), *model.buffers()]  # joined products are views, not copies
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) == before


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 40])
def test_acceleration_changes_no_answer_and_no_state(name: str, length: int) -> None:
    spec = Quantization(SPECS[name].kind, SPECS[name].group, embeddings=True)
    model = made(TIED, torch.bfloat16)
    quantize(model, spec)
    x = inputs(torch.bfloat16, length)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = scores(model, x)
        after = scores(accelerate(model), x)
    assert float((after - before).float().abs().max()) < 0.05 * float(before.float().abs().max())
    fused = [m.fused for m in model.modules() if isinstance(getattr(m, "fused", None), Quantized)]
    # wk and wv have 32 rows here, which int4 cannot join; w1 and w3 have 128.
    assert len(fused) == {"int8": 4, "int4": 2, "nf4": 0}[spec.kind]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    release(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(scores(model, x), before)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_acceleration_keeps_what_hangs_beside(name: str) -> None:
    model = made(CONFIG, torch.bfloat16)
    quantize(model, SPECS[name])
    x = inputs(torch.bfloat16, 3)
    with torch.no_grad():
        bare = scores(model, x)
        attach(model, (LoraSpec(rank=3), ScaleSpec(), BiasSpec()))
        disturb(model)
        before = scores(model, x)
        after = scores(accelerate(model), x)
    largest = float(before.float().abs().max())
    assert float((after - before).float().abs().max()) < 0.05 * largest
    assert float((bare - before).float().abs().max()) > 0.2 * largest


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tuning", [LoraSpec(rank=3), PrefixSpec(length=5, layers=1), ScaleSpec(), BiasSpec()])
def test_gradients_are_those_on_the_dequantised_weights(name: str, tuning: Any) -> None:
    ours, theirs = made(), made()
    quantize(ours, SPECS[name])
    dequantize(quantize(theirs, SPECS[name]))
    for model in (ours, theirs):
        attach(model, (tuning,))
    disturb(ours)
    grads = []
    for model in (ours, theirs):
        for (_, p), (_, q) in zip(trainable(model), trainable(ours), strict=True):
            p.data.copy_(q.data)
        x = inputs().requires_grad_()
        scores(model, x).square().mean().backward()
        grads.append([x.grad, *(p.grad for _, p in trainable(model))])
    assert len(grads[0]) == 1 + len(trainable_state(ours)) > 1
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)
        assert float(wanted.abs().max()) > 1e-6


def trainable(model: Llama) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@NF4
def test_lora_on_nf4_learns() -> None:
    model = made(CONFIG)
    quantize(model, SPECS["nf4"])
    attach(model, (LoraSpec(rank=4),))
    codes = {k: v.clone() for k, v in model.state_dict().items() if ".kernel." in k}
    x, labels = inputs(), torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=3e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(scores(model, x).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, codes[k]) for k, v in model.state_dict().items() if k in codes)


@pytest.mark.parametrize("name", KINDS)
def test_lora_is_folded_only_into_full_weights(name: str) -> None:
    model = made(CONFIG)
    quantize(model, SPECS[name])
    attach(model, (LoraSpec(rank=3),))
    disturb(model)
    x = inputs()
    with torch.no_grad():
        before = scores(model, x)
    with pytest.raises(ValueError, match=f"kept as {SPECS[name].kind}.*dequantise"):
        merge(model)
    with torch.no_grad():
        assert torch.equal(scores(model, x), before)
        dequantize(model)
        assert merge(model) < 1e-5
        torch.testing.assert_close(scores(model, x), before, rtol=1e-3, atol=1e-3)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'int3' is not one of int8, int4, nf4"):
        Quantization("int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group 48 is not one of"):
        Quantization("int4", 48)
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.w2 has 96 inputs.*that do: \[32\]"):
        quantize(Llama(LlamaConfig(dim=64, n_layers=1, n_heads=4, ffn_dim=96, vocab_size=40)), Quantization("int4"))
    with pytest.raises(ValueError, match="quantised as int8 already"):
        quantize(quantize(made(), SPECS["int8"]), SPECS["int4"])
    with pytest.raises(ValueError, match="packed for this machine; release"):
        quantize(accelerate(made()), SPECS["int8"])
    trained = made()
    attach(trained, (TrainSpec(("layers.0.attention.wo.weight",)),))
    with pytest.raises(ValueError, match=r"wo.weight trains"):
        quantize(trained, SPECS["int8"])
    assert all(isinstance(linear.weight, Tensor) for _, linear in targets(trained))


def test_nf4_without_its_library_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    module._bitsandbytes.cache_clear()
    with pytest.raises(ValueError, match=r"nf4 needs bitsandbytes.*pip install bitsandbytes"):
        quantize(made(), SPECS["nf4"])
    module._bitsandbytes.cache_clear()


def test_what_a_command_line_says() -> None:
    assert Quantization.parse("int4") == Quantization("int4", 64)
    assert Quantization.parse("int4,group=32,embeddings") == Quantization("int4", 32, True)
    for wrong in ("int4,32", "int8,group=", "int8,embeddings=no"):
        with pytest.raises(ValueError, match="neither group=NUMBER nor embeddings"):
            Quantization.parse(wrong)


def test_every_kind_says_what_it_is_made_of() -> None:
    for kind, group in (("int8", 64), ("int4", 32), ("nf4", 64)):
        if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        kernel = CLASSES[kind].of(torch.randn(48, 96).bfloat16(), group)
        fields = CLASSES[kind].fields(48, 96, group)
        assert {k: tuple(v.shape) for k, v in kernel.state_dict().items()} == {k: s for k, (s, _) in fields.items()}
        assert all(v.dtype == (fields[k][1] or torch.bfloat16) for k, v in kernel.state_dict().items())
    assert issubclass(Int8, Quantized)
    assert Linear(4, 4).kernel is None
