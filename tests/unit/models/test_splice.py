"""Splice and gather: exact places, loud counts."""

import pytest
import torch

from accessory.models.splice import gather, splice


def test_features_land_in_reading_order_and_nowhere_else() -> None:
    x = torch.randn(2, 5, 3)
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[0, 3] = where[1, 0] = where[1, 4] = True
    features = torch.randn(3, 3)
    y = splice(x, where, features)
    assert torch.equal(gather(y, where), features)
    assert torch.equal(y[~where], x[~where])
    assert not torch.equal(splice(x, where, features.flip(0)), y)


@pytest.mark.parametrize("given", [0, 2, 4])
def test_a_wrong_number_of_features_names_both_counts(given: int) -> None:
    where = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"3 <image> placeholders.*{given} features"):
        splice(torch.zeros(1, 3, 2), where, torch.zeros(given, 2))


def test_a_row_without_pictures_keeps_the_projector_in_the_graph() -> None:
    features = torch.zeros(0, 2, requires_grad=True)
    y = splice(torch.randn(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool), features)
    y.sum().backward()
    assert features.grad is not None


def test_features_are_cast_to_the_sequence() -> None:
    where = torch.tensor([[True, False]])
    assert splice(torch.zeros(1, 2, 2, dtype=torch.bfloat16), where, torch.ones(1, 2)).dtype == torch.bfloat16
