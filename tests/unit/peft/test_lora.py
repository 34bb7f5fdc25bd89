"""Low-rank deltas: the formula, dtypes, dropout, folding."""

import pytest
import torch
from torch import Tensor

from accessory.nn.linear import Linear
from accessory.peft.attach import BiasSpec, LoraSpec, PrefixSpec, ScaleSpec, attached, detach, merge
from accessory.peft.lora import LowRank, folding_error
from accessory.peft.lora import merge as merge_linear
from tests.tiny import disturb
from tests.tiny_peft import METHODS, inputs, make


@pytest.fixture
def x() -> Tensor:
    return inputs()


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (8.0, 2.0)])
def test_the_formula(alpha: float | None, factor: float) -> None:
    delta, x = LowRank(6, 5, rank=4, alpha=alpha), torch.randn(2, 3, 6)
    torch.nn.init.normal_(delta.b.weight)
    expected = factor * x @ delta.a.weight.T @ delta.b.weight.T
    torch.testing.assert_close(delta(x), expected)
    torch.testing.assert_close(x @ delta.matrix().T, expected)


def test_initial_values_follow_the_reference() -> None:
    delta = LowRank(400, 300, rank=50)
    assert delta.b.weight.count_nonzero() == 0
    assert 0.019 < delta.a.weight.std() < 0.021


def test_fp32_parameters_serve_a_bf16_input() -> None:
    delta = LowRank(16, 8, rank=4)
    torch.nn.init.normal_(delta.b.weight)
    x = torch.randn(3, 16)
    y = delta(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), delta(x), rtol=0.05, atol=0.02)
    y.sum().backward()
    assert delta.a.weight.grad is not None
    assert delta.a.weight.grad.dtype == torch.float32


def test_dropout_acts_in_training_only() -> None:
    delta, x = LowRank(16, 8, rank=4, dropout=0.5), torch.randn(3, 16)
    torch.nn.init.normal_(delta.b.weight)
    assert not torch.equal(delta(x), delta(x))
    delta.eval()
    assert torch.equal(delta(x), delta(x))


@pytest.mark.parametrize(("dtype", "layer", "whole"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.04, 0.1)])
def test_merging_keeps_the_outputs_and_empties_the_slots(
    dtype: torch.dtype, layer: float, whole: float, x: Tensor
) -> None:
    model = make(LoraSpec(rank=3, alpha=6.0, dropout=0.2), ScaleSpec(), BiasSpec(), dtype=dtype)
    plain = model(x.to(dtype))
    disturb(model, 0.3)
    tuned = model(x.to(dtype))
    model.train()  # dropout must not disturb the comparison
    assert 0 < merge(model) < layer
    merged = model.eval()(x.to(dtype))
    assert (merged - tuned).abs().max() <= whole * tuned.abs().max()
    assert (tuned - plain).abs().max() > 3 * whole * tuned.abs().max()  # and there was something to fold
    assert not any("delta" in name or "scale" in name for name in model.state_dict())
    assert [spec.kind for spec in attached(model)] == ["bias"]


def test_a_prefix_stays_and_sees_the_folded_weights(x: Tensor) -> None:
    model = make(LoraSpec(rank=2), ScaleSpec(), PrefixSpec(length=3))
    disturb(model, 0.3)
    before = model(x)
    assert 0 < merge(model) < 1e-5
    assert [spec.kind for spec in attached(model)] == ["prefix"]
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()
    detach(model)
    assert (model(x) - before).abs().max() > 1e-3, "and the prefix matters"


def test_merging_nothing_is_exact(x: Tensor) -> None:
    model = make(METHODS["norm"])
    before = model(x)
    assert merge(model) == 0.0
    assert torch.equal(model(x), before)


def test_the_gate_refuses_what_does_not_fold_and_changes_nothing(x: Tensor) -> None:
    model = make(LoraSpec(rank=2))
    disturb(model, 0.3)
    bad = model.backbone.layers[2].feed_forward.w2
    bad.delta.a.weight.data[0, 0] = float("nan")
    first = model.backbone.layers[0].attention.wq.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.2\.feed_forward\.w2"):
        merge(model)
    assert torch.equal(model.backbone.layers[0].attention.wq.weight, first)
    assert bad.delta is not None


def test_a_foreign_delta_is_refused() -> None:
    linear = Linear(4, 4)
    linear.delta = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with pytest.raises(ValueError, match="Sequential"):
        merge_linear(linear)


def test_the_gate_measures_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(8, 8)
    linear.delta = LowRank(8, 8, rank=2)
    torch.nn.init.normal_(linear.delta.b.weight)
    assert folding_error(linear) < 1e-6
    monkeypatch.setattr(LowRank, "matrix", lambda self: 1.1 * self.b.weight @ self.a.weight)
    assert folding_error(linear) > 1e-4
    with pytest.raises(ValueError, match="folding would change"):
        merge_linear(linear)


def test_merging_is_visible_to_whoever_keeps_a_copy_of_the_weight() -> None:
    """Packed kernels know a weight by identity and version; assigning to ``.data`` would change neither."""
    linear = Linear(8, 8, bias=True)
    linear.delta = LowRank(8, 8, rank=2)
    torch.nn.init.normal_(linear.delta.b.weight)
    linear.requires_grad_(False)
    weight, version, values = linear.weight, linear.weight._version, linear.weight.clone()
    merge_linear(linear)
    assert linear.weight is not weight or linear.weight._version != version
    assert torch.equal(weight, values)  # the old memory is not written
    assert not linear.weight.requires_grad
