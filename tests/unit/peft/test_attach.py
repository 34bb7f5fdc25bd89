"""What attach promises, for every method; saving, loading, detaching."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from accessory.backbone.llama import Llama
from accessory.peft.attach import (
    BiasSpec,
    LoraSpec,
    NormSpec,
    PrefixSpec,
    ScaleSpec,
    TrainSpec,
    attach,
    attached,
    detach,
    find_backbone,
    load_trainable,
    trainable_state,
)
from tests.tiny import disturb
from tests.tiny_peft import CONFIG, METHODS, inputs, make

METHOD = pytest.mark.parametrize("name", METHODS)
ALL = (METHODS["lora"], METHODS["prefix"], METHODS["bias"], METHODS["scale"], METHODS["norm"], METHODS["train"])


@pytest.fixture
def x() -> Tensor:
    return inputs()


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_changes_no_bit(name: str, dtype: torch.dtype, x: Tensor) -> None:
    model = make(dtype=dtype)
    before = model(x.to(dtype))
    for added in (None, torch.float32):
        tuned = copy.deepcopy(model)
        attach(tuned, [METHODS[name]], dtype=added)
        after = tuned(x.to(dtype))
        assert after.dtype == dtype
        assert torch.equal(before, after)


@METHOD
def test_values_matter_and_everything_trainable_gets_a_gradient(name: str, x: Tensor) -> None:
    model = make(METHODS[name])
    before = model(x)
    disturb(model, 0.3)
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    after.square().sum().backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    for n, p in trainable.items():
        assert p.grad is not None, n
        assert p.grad.abs().max() > 0, n
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_fresh_tuning_learns_although_it_is_the_identity(x: Tensor) -> None:
    model = make(LoraSpec(rank=2), PrefixSpec(length=3))
    model(x).square().sum().backward()
    state = dict(model.named_parameters())
    for name in ("attention.wq.delta.b.weight", "attention.prefix.gate"):
        assert state[f"backbone.layers.1.{name}"].grad.abs().max() > 0  # type: ignore[union-attr]


def test_what_trains_is_exactly_what_the_specs_name() -> None:
    names = trainable_state(make(LoraSpec(rank=2, targets=("wq",)), PrefixSpec(length=3, layers=1))).keys()
    assert names == {
        *(f"backbone.layers.{i}.attention.wq.delta.{ab}.weight" for i in range(3) for ab in "ab"),
        *(f"backbone.layers.2.attention.prefix.{p}" for p in ("tokens", "gate")),
    }
    norms = trainable_state(make(NormSpec())).keys()
    assert len(norms) == 2 * CONFIG.n_layers + 1
    assert all("norm.weight" in name for name in norms)
    assert trainable_state(make(TrainSpec(("projector.*",)))).keys() == {"projector.weight", "projector.bias"}
    assert len(trainable_state(make(BiasSpec(targets=("w1", "w2"))))) == 2 * CONFIG.n_layers


def test_lora_in_the_top_blocks_alone() -> None:
    model = make()
    attach(model, [LoraSpec(rank=2, layers=1)])
    top = f"layers.{CONFIG.n_layers - 1}."
    assert CONFIG.n_layers > 1
    assert trainable_state(model)
    assert all(top in name for name in trainable_state(model))
    detach(model)
    assert not trainable_state(model)
    attach(model, [LoraSpec(rank=2, layers=CONFIG.n_layers)])
    assert trainable_state(model).keys() == _lora_of_all_blocks()
    with pytest.raises(ValueError, match=rf"lora layers must be in \[1, {CONFIG.n_layers}\], got 0"):
        attach(make(), [LoraSpec(layers=0)])


def _lora_of_all_blocks() -> set[str]:
    model = make()
    attach(model, [LoraSpec(rank=2)])
    return set(trainable_state(model))


def test_an_existing_bias_trains_in_place_and_survives_detach() -> None:
    model = make(config=dataclasses.replace(CONFIG, qkv_bias=True))
    nn.init.normal_(model.backbone.layers[0].attention.wq.bias)
    value = model.backbone.layers[0].attention.wq.bias.clone()
    attach(model, [BiasSpec()])
    assert "backbone.layers.0.attention.wq.bias" in trainable_state(model)
    detach(model)
    assert torch.equal(model.backbone.layers[0].attention.wq.bias, value)
    assert model.backbone.layers[0].attention.wo.bias is None


def test_round_trip_of_the_trainable_state(x: Tensor) -> None:
    source = make(*ALL)
    disturb(source, 0.3)
    state = {name: p.clone() for name, p in trainable_state(source).items()}
    target = make(*ALL)
    assert not torch.allclose(target(x), source(x), atol=1e-3)
    load_trainable(target, state)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_state_that_does_not_fit_is_refused_whole(fault: str) -> None:
    model = make(LoraSpec(rank=2))
    state = {name: p + 1 for name, p in trainable_state(model).items()}
    name = "backbone.layers.1.attention.wo.delta.a.weight"
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state["backbone.norm.weight"] = torch.ones(CONFIG.dim)
    else:
        state[name] = state[name][:1]
    before = {n: p.clone() for n, p in trainable_state(model).items()}
    with pytest.raises(ValueError, match="norm.weight" if fault == "unexpected" else name):
        load_trainable(model, state)
    assert all(torch.equal(before[n], p) for n, p in trainable_state(model).items())


def test_detach_restores_the_plain_model(x: Tensor) -> None:
    model = make()
    before, keys = model(x), set(model.state_dict())
    attach(model, [METHODS[n] for n in ("lora", "prefix", "bias", "scale")])
    disturb(model, 0.3)
    detach(model)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == keys
    assert attached(model) == ()
    attach(model, [LoraSpec(rank=2)])  # the slots are free again


def test_a_second_stage_freezes_the_first_and_may_thaw_it() -> None:
    model = make(LoraSpec(rank=2))
    attach(model, [NormSpec()])
    assert not any("delta" in name for name in trainable_state(model))
    attach(model, [TrainSpec(("*.delta.*",))])
    assert all("delta" in name for name in trainable_state(model))
    assert len(trainable_state(model)) == 2 * 7 * CONFIG.n_layers


@pytest.mark.parametrize("name", ["lora", "prefix", "bias", "scale"])
def test_the_same_kind_twice_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="already attached"):
        attach(make(METHODS[name]), [METHODS[name]])
    with pytest.raises(ValueError, match="already attached"):
        make(METHODS[name], METHODS[name])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoraSpec(targets=("q_proj",)), "q_proj.*wq"),
        (BiasSpec(targets=("wq", "nope")), "nope.*w1"),
        (ScaleSpec(targets=()), "unknown scale targets"),
        (LoraSpec(rank=0), "rank.*0"),
        (LoraSpec(dropout=1.0), "dropout"),
        (PrefixSpec(layers=4), r"\[1, 3\], got 4"),
        (PrefixSpec(layers=0), "got 0"),
        (PrefixSpec(length=0), "length"),
        (PrefixSpec(gate="sigmoid"), "sigmoid"),  # type: ignore[arg-type]
        (TrainSpec(("projekt.*",)), "projekt.*begin with backbone, projector"),
    ],
)
def test_errors_name_the_value_and_change_nothing(spec: object, words: str, x: Tensor) -> None:
    model = make(NormSpec())
    before, keys, trainable = model(x), set(model.state_dict()), set(trainable_state(model))
    with pytest.raises(ValueError, match=words):
        attach(model, [METHODS["prefix" if isinstance(spec, LoraSpec) else "lora"], spec])  # type: ignore[list-item]
    assert set(model.state_dict()) == keys
    assert set(trainable_state(model)) == trainable
    assert torch.equal(model(x), before)


def test_the_backbone_is_found_and_only_it_is_touched() -> None:
    model = make(LoraSpec(rank=2))
    assert find_backbone(model) is model.backbone
    assert find_backbone(model.backbone) is model.backbone
    assert all(name.startswith("backbone.") for name in trainable_state(model))
    with pytest.raises(ValueError, match="found none"):
        find_backbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0.*1"):
        find_backbone(nn.ModuleList([Llama(CONFIG), Llama(CONFIG)]))


def test_no_class_attribute_shadows_a_slot() -> None:
    """A slot declared in the class body would win over the assigned sub-module: tuning would silently do nothing."""

    class Trap(nn.Module):
        delta = None

    trap = Trap()
    trap.delta = nn.Linear(2, 2)  # type: ignore[assignment]
    assert trap.delta is None  # the trap is real: the module was stored, and is never seen
    model = make(LoraSpec(rank=2), PrefixSpec(length=3), ScaleSpec())
    attention = model.backbone.layers[2].attention
    for module, slot in ((attention.wq, "delta"), (attention.wq, "scale"), (attention, "prefix")):
        assert not any(slot in vars(cls) for cls in type(module).__mro__)
        assert getattr(module, slot) is not None
