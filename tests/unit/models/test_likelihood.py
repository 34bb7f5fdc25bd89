"""Log-likelihoods: the model's own scores, whatever the batch and however often a picture stands in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.models import likelihood
from accessory.models.build import Model
from accessory.models.likelihood import answered, likelihoods, rank
from accessory.schema import Turn
from accessory.tokens import IGNORE
from tests.unit.models.pictured import mixed, model, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model(tmp_path_factory.mktemp("likelihood"))


@torch.no_grad()
def by_hand(made: Model, turns: tuple[Turn, ...], answer: str) -> tuple[float, int]:
    """One token after the other."""
    row = made.encoder.row((*turns, Turn("assistant", (answer,))))
    total, n = 0.0, 0
    for t in range(1, len(row.ids)):
        if row.labels[t] != IGNORE:
            state = made.net(row.ids[None, :t], row.tiles if len(row.tiles) else None)[0, -1]
            total += float(made.net.logits(state).double().log_softmax(-1)[row.ids[t]])
            n += 1
    return total, n


def test_likelihoods_are_the_model_s_in_any_batch(made: Model) -> None:
    asked = [(s.turns[:1], a) for s in mixed() for a in ("a cat", "three small birds on a hat")]
    rows = [answered(made, *a) for a in asked]
    wanted = [by_hand(made, *a) for a in asked]
    for size in (1, 3, 16):
        got = likelihoods(made, rows, batch_size=size)
        assert [g.total for g in got] == pytest.approx([w for w, _ in wanted], abs=1e-4)
        assert [g.tokens for g in got] == [n for _, n in wanted]
    assert len({round(w, 3) for w, _ in wanted}) == len(wanted)  # no two are alike
    assert got[0].nll == pytest.approx(-got[0].total / got[0].tokens)


def test_a_picture_is_encoded_once_for_all_options(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Turn("user", (picture(7), "What is this?")),)
    alone = [rank(made, turns, [o])[0].total for o in ("cat", "dog", "a fish")]
    seen: list[int] = []
    encode = made.net.encode
    monkeypatch.setattr(made.net, "encode", lambda tiles: (seen.append(len(tiles)), encode(tiles))[1])
    assert [r.total for r in rank(made, turns, ["cat", "dog", "a fish"])] == pytest.approx(alone, abs=1e-4)
    assert seen == [1]
    other = rank(made, (Turn("user", (picture(8), "What is this?")),), ["cat"])[0]
    assert abs(other.total - alone[0]) > 1e-4  # and it matters which picture it is


def test_greedy_says_whether_the_model_would_say_it(made: Model) -> None:
    row = answered(made, (Turn("user", ("What is this?",)),), "a cat")
    where = (row.labels != IGNORE).nonzero().flatten()
    state = likelihood.hidden(made, [row])[0]
    best = made.net.logits(state[where[:1] - 1]).argmax(-1)
    labels = torch.full_like(row.labels, IGNORE)
    labels[where[0]] = best[0]
    assert likelihoods(made, [replace(row, labels=labels)])[0].greedy
    labels[where[0]] = (int(best[0]) + 1) % made.tokenizer.vocab_size
    assert not likelihoods(made, [replace(row, labels=labels)])[0].greedy


def test_rows_that_cannot_be_scored(made: Model, tmp_path: Path) -> None:
    row = answered(made, (Turn("user", ("What is this?",)),), "a cat")
    with pytest.raises(ValueError, match="must label a position"):
        likelihoods(made, [replace(row, labels=torch.full_like(row.labels, IGNORE))])
    with pytest.raises(ValueError, match="the limit is 512"):
        answered(made, (Turn("user", ("x y " * 600,)),), "a cat")
