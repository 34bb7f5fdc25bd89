"""The alignment head: class vectors from token embeddings, targets from answers."""

import pytest
import torch
import torch.nn.functional as F

from accessory.models.align import Aligner

NAMES = [[3, 4], [5], [6, 7, 8]]


def aligner() -> tuple[Aligner, torch.Tensor]:
    made, table = Aligner(3, 8, 6), torch.randn(10, 8)
    made.set_answers(NAMES, table)
    return made, table


def test_features_made_of_the_words_are_classified_right() -> None:
    made, table = aligner()
    features = torch.stack([table[n].mean(0).expand(5, 8) for n in NAMES])
    scores, free = made(features, torch.randn(3, 5, 6))
    assert scores.argmax(-1).tolist() == [0, 1, 2]
    assert free.shape == (3, 3)
    # by hand: cosine with the centred mean embedding, times the learned scale
    rows = torch.stack([table[n].mean(0) for n in NAMES])
    unit = F.normalize(rows - rows.mean(0), dim=-1)
    torch.testing.assert_close(scores, unit @ unit.T * 30, rtol=1e-4, atol=1e-4)


def test_targets_are_exact_answers_only() -> None:
    made, _ = aligner()
    assert made.targets([[6, 7, 8], [3], [3, 4], []]).tolist() == [2, -100, 0, -100]


def test_class_vectors_are_fixed_and_in_no_file() -> None:
    made, _ = aligner()
    assert set(made.state_dict()) == {"log_scale", "head.weight", "head.bias"}
    scores, free = made(torch.randn(2, 5, 8), torch.randn(2, 5, 6))
    (scores.sum() + free.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


def test_bad_answer_lists_are_refused() -> None:
    made, table = aligner()
    with pytest.raises(ValueError, match="has 3 classes, 2 answers"):
        made.set_answers(NAMES[:2], table)
    with pytest.raises(ValueError, match="without a token"):
        made.set_answers([*NAMES[:2], []], table)
