"""Our scorers beside those that lmms-eval ships (copies of the official evaluators), on thousands of answers."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest

from accessory.evaluate.scorers import Scored, Truth, anls, relaxed, scorer, yes_no
from accessory.evaluate.vqa import normalise_vqa, vqa_accuracy

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed beside this package")
PIECES = [*"ab .,?!-/'\"019%", "the ", "a ", "ten ", "dont ", "1,000 ", "y'alld've ", "None ", "yes", "No", "\n"]


def texts(seed: int, count: int, longest: int = 8) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices(PIECES, k=dice.randint(0, longest))) for _ in range(count)]


def test_vqa_normalisation_and_accuracy() -> None:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    processor = EvalAIAnswerProcessor()
    for text in texts(0, 5000):
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalise_vqa(text) == processor.process_digit_article(processor.process_punctuation(plain))
    dice, compared = random.Random(1), 0
    for answer in ["red", "blue", "the red", "2", "two", "a dog's"] * 20:
        people = dice.choices(["red", "blue", "a red", "2", "dogs", "two"], k=10)
        doc = {"question_id": 0, "answers": [{"answer": p, "answer_id": i} for i, p in enumerate(people)]}
        if len(set(people)) > 1:  # where all agree the official evaluator normalises nothing, theirs does
            compared += 1
            assert vqa_accuracy(answer, people) == pytest.approx(vqav2_process_results(doc, [answer])["exact_match"])
    assert compared > 100


def test_anls() -> None:
    from lmms_eval.api.metrics import anls as theirs

    for answer, truth, other in zip(texts(2, 2000), texts(3, 2000), texts(4, 2000), strict=True):
        # Theirs divides by lengths before blanks are trimmed, which is the same where there are none to trim.
        answer, known = " ".join(answer.split()), [" ".join(t.split()) or "x" for t in (truth, other)]
        assert anls(answer, known) == pytest.approx(theirs(known, [answer])["anls"])


def test_relaxed_accuracy() -> None:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    dice, right = random.Random(5), 0
    for _ in range(3000):
        truth = dice.choice(["10", "0", "5%", "-3.5", "red", "0.5"])
        answer = dice.choice(
            [truth, f"{dice.uniform(9, 11):.2f}", "10.4", "9.5", "-3.4", "4.9%", "0.049", "RED", "blue"]
        )
        right += relaxed(answer, truth)
        assert relaxed(answer, truth) == relaxed_correctness(answer, truth)
    assert 300 < right < 2700


def test_mme() -> None:
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results, parse_pred_ans

    for text in texts(6, 3000, 3):
        assert yes_no(text) == parse_pred_ans(text)
    dice, rows, theirs = random.Random(7), [], []
    for category in ("count", "OCR", "existence"):
        for k in range(20):
            for truth in ("Yes", "No"):
                answer = dice.choice(["yes", "no.", "maybe", "Yes, it is"])
                rows.append((answer, Truth((truth,), category=category, group=str(k))))
                doc = {"answer": truth, "category": category, "question_id": str(k)}
                theirs.append(mme_process_results(doc, [answer])["mme_perception_score"])
    mme = scorer("mme")
    ours = mme.total([Scored(a, t, mme.item(a, t)) for a, t in rows])
    assert ours["perception"] == pytest.approx(mme_aggregate_results(theirs))


def test_pope() -> None:
    from lmms_eval.tasks.pope import utils

    dice, rows, theirs = random.Random(8), [], []
    for k in range(200):
        answer, truth = dice.choice(["yes", "no"]), dice.choice(["yes", "no"])
        rows.append((answer, Truth((truth,))))
        theirs.append(utils.pope_process_results({"answer": truth, "question_id": k}, [answer])["pope_accuracy"])
    pope = scorer("pope")
    ours = pope.total([Scored(a, t, pope.item(a, t)) for a, t in rows])
    assert ours["accuracy"] == pytest.approx(utils.pope_aggregate_accuracy(theirs))
    assert ours["precision"] == pytest.approx(utils.pope_aggregate_precision(theirs))
    assert ours["recall"] == pytest.approx(utils.pope_aggregate_recall(theirs))
    assert ours["f1"] == pytest.approx(utils.pope_aggregate_f1_score(theirs))
    # Theirs counts the yes of the questions; POPE's own evaluator, and ours, that of the answers.
    assert ours["yes_ratio"] == sum(a == "yes" for a, _ in rows) / 200
