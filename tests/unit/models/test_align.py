"""The alignment head: class vectors from token embeddings, targets from answers."""

import pytest
import torch
import torch.nn.functional as F

from accessory.models.align import Aligner
from accessory.vision.projector import VisualWords

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


def test_visual_words_start_at_the_answers_and_bring_the_second_head() -> None:
    embeddings = torch.randn(30, 8) + 3
    answers = [[1, 2], [5], [7, 8, 9]]
    aligner = Aligner(3, 8, 6, free_head=False)
    aligner.set_answers(answers, embeddings)
    words = VisualWords(6, 8, 3)
    aligner.fill_words(words, answers, embeddings)
    away = words.table - aligner.centre
    torch.testing.assert_close(torch.nn.functional.normalize(away, dim=-1), aligner.classes)
    # as far from the centre as a token embedding is on average
    usual = (embeddings - embeddings.mean(0)).pow(2).sum(-1).mean().sqrt()
    torch.testing.assert_close(away.norm(dim=-1), usual.expand(3), rtol=0.05, atol=0)
    tokens = torch.randn(4, 2, 6)
    scores = aligner(torch.randn(4, 2, 8), tokens, words)
    assert len(scores) == 2
    torch.testing.assert_close(scores[1], words.scores(tokens))
    with pytest.raises(ValueError, match=r"projector.words is 4, the answers to align with are 3"):
        aligner.fill_words(VisualWords(6, 8, 4), answers, embeddings)
