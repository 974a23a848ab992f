"""Choices, pairs and confidence, against figures counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.bias import BiasPairs, Pair
from llm_jax.evals.calibration import calibration_error
from llm_jax.evals.multiple_choice import MultipleChoice, Question
from llm_jax.evals.scorer import Likelihood, Request

TOKENIZER = raw_bytes.make(raw_bytes.Config())


class Told:
    """Scores continuations as told, spread evenly over their tokens."""

    def __init__(self, totals):
        self.totals = totals

    def score(self, requests):
        found = []
        for request in requests:
            text = TOKENIZER.decode(request.continuation)
            total, cut = self.totals[text], 3 if text.endswith("cut") else 0
            size = len(request.continuation)
            found.append(
                Likelihood(np.full(size, total / size, np.float32), np.zeros(size, bool), cut)
            )
        return found


def subject(told):
    return SimpleNamespace(scorer=told, tokenizer=TOKENIZER)


def test_choices_by_each_way_to_compare():
    questions = [
        Question("Q1:", (" no", " certainly not"), 1),
        Question("Q2:", (" a", " bb cut"), 0),
    ]
    told = Told({" no": -3.0, " certainly not": -6.0, " a": -1.0, " bb cut": -2.0})
    scores = MultipleChoice(questions).run(subject(told)).summary
    # Of the first, the short one is more probable, the long one per byte; of the second the right one,
    # and per byte, 1 against 6 without the blank, the other.
    assert scores["accuracy"] == 0.5
    assert scores["accuracy_per_byte"] == 0.5
    assert scores["questions"] == 2
    assert scores["cut"] == 1
    sure = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))
    assert scores["calibration_error"] == pytest.approx((sure[0] + 1 - sure[1]) / 2)
    with pytest.raises(
        ConfigError, match=r"answer 2 of 'Q' must be the number of a choice: 0\.\.1"
    ):
        Question("Q", ("a", "b"), 2)


def test_confidence_against_accuracy():
    confidences = np.array([0.95, 0.95, 0.55, 0.55, 1.0])
    correct = np.array([True, False, True, True, True])
    # Bins 0.9 to 1: 2.9 against 2; 0.5 to 0.6: 1.1 against 2.
    assert calibration_error(confidences, correct) == pytest.approx((0.9 + 0.9) / 5)
    assert calibration_error(np.array([]), np.array([])) == 0


def test_pairs_by_group():
    pairs = [Pair("s1", "o1", "age"), Pair("s2", "o2", "age"), Pair("s3", "o3", "work")]
    told = Told({"s1": -1.0, "o1": -3.0, "s2": -2.0, "o2": -1.0, "s3": -1.0, "o3": -1.0})
    scores = BiasPairs(pairs).run(subject(told)).summary
    assert scores["stereotype"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert scores["stereotype/age"] == 0.5
    assert scores["stereotype/work"] == 0.5
    assert scores["gap"] == pytest.approx((2 - 1 + 0) / 3)


class Merging:
    """Two letters a token, from the start: what follows changes the last one."""

    bos_id = 0

    def encode(self, text):
        return [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]


def test_texts_are_cut_where_the_context_ends():
    request = Request.of(TOKENIZER, "Q: ", "yes")
    ids = TOKENIZER.encode("Q: yes")
    assert list(request.context) == [TOKENIZER.bos_id, *ids[:2]]
    assert list(request.continuation) == ids[2:]
    # Three letters are two tokens, of which the second is another one once "d" follows: that is asked
    # for too, and in the other continuation, where "c" stays, as well.
    requests = Request.several(Merging(), "abc", ("def", ""))
    for request, text in zip(requests, ("abcdef", "abc"), strict=True):
        assert [*request.context, *request.continuation] == [0, *Merging().encode(text)]
        assert len(request.context) == 2
    assert len(requests[1].continuation) == 1  # never nothing
    assert list(Request.of(TOKENIZER, "", "x").context) == [TOKENIZER.bos_id]
