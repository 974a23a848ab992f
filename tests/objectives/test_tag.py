import functools

import jax
import numpy as np
import pytest
from record_cases import (
    FakeEncoder,
    assert_is_of_spec,
    batch_of,
    bytes_tokenizer,
    log_softmax,
    pieces_tokenizer,
    tiny_bert,
    word_piece_tokenizer,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.objectives import tag

TOKENIZER = bytes_tokenizer()
CLS, SEP, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
LABELS = ("O", "B-PER", "I-PER")
RECORDS = [
    {"tokens": ["Jo", "X", "ran"], "labels": ["B-PER", "I-PER", "O"]},
    {"tokens": ["", "yes"], "labels": ["O", 2]},
    {"tokens": [], "labels": []},
    {},
]


def objective(**config):
    return tag.make(parse(tag.Config, {"labels": LABELS, **config}))


def test_the_first_piece_of_a_word_is_its_target():
    made_by = objective()
    batch = batch_of(made_by, RECORDS, TOKENIZER, 12)
    assert_is_of_spec(batch, made_by, 4, 12)
    assert batch["tokens"][0].tolist() == [CLS, *b"Jo X ran", SEP, PAD, PAD]
    assert batch["targets"][0].tolist() == [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch["loss_weights"][0].tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    # A word without a piece has no target.
    assert batch["tokens"][1].tolist()[:6] == [CLS, *b" yes", SEP]
    assert batch["loss_weights"][1].tolist() == [0, 1, *[0] * 10]
    assert batch["targets"][1, 1] == 2
    assert not batch["loss_weights"][2:].any()
    assert batch["segment_ids"].sum(axis=1).tolist() == [10, 6, 2, 0]


@pytest.mark.parametrize(
    "tokenizer", [pieces_tokenizer(), word_piece_tokenizer()], ids=["sentencepiece", "wordpiece"]
)
def test_words_are_encoded_as_in_their_sentence(tokenizer):
    words = ["the", "cat", "is", "in", "Paris", "(1889)"]
    labels = [LABELS[i % 3] for i in range(len(words))]
    batch = batch_of(objective(), [{"tokens": words, "labels": labels}], tokenizer, 32)
    ids = batch["tokens"][0][batch["segment_ids"][0] > 0][1:-1].tolist()
    assert ids == tokenizer.encode(" ".join(words))
    chosen = np.flatnonzero(batch["loss_weights"][0])
    assert batch["targets"][0][chosen].tolist() == [i % 3 for i in range(len(words))]
    firsts = [tokenizer.encode(w if i == 0 else f" {w}")[0] for i, w in enumerate(words)]
    assert batch["tokens"][0][chosen].tolist() == firsts


def test_too_long_a_sentence_is_an_error_or_cut():
    with pytest.raises(
        ConfigError, match=r"the sentence, .*, has 10 tokens, more than data\.sequence_length = 7;"
    ):
        batch_of(objective(), RECORDS[:1], TOKENIZER, 7)
    cut = batch_of(objective(truncate=True), RECORDS[:1], TOKENIZER, 7)
    assert cut["tokens"][0].tolist() == [CLS, *b"Jo X ", SEP]
    assert cut["targets"][0].tolist() == [0, 1, 0, 2, 0, 0, 0]
    assert cut["loss_weights"][0].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_loss_is_cross_entropy_over_words():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 12)
    network = FakeEncoder(3)
    log_p = log_softmax(network(batch).logits)
    rows, columns = np.nonzero(batch["loss_weights"])
    targets = batch["targets"][rows, columns]
    chosen = log_p[rows, columns]
    output = objective().loss(network, batch, key=None, train=False)
    expected = -chosen[np.arange(4), targets].mean()
    assert float(output.loss.weight) == 4
    assert float(output.loss.mean) == pytest.approx(expected, rel=1e-5)
    accuracy = (chosen.argmax(1) == targets).mean()
    assert float(output.metrics["accuracy"].mean) == pytest.approx(accuracy)


def test_bert_has_the_head_for_it():
    spec = objective().batch_spec(4, 12)
    network = tiny_bert("token_classification", 3)
    loss = functools.partial(objective().loss, network, key=None, train=True)
    assert jax.eval_shape(loss, spec).loss.sum.shape == ()


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, "2 words in 'tokens', 1 labels in 'labels'"),
        (
            {"tokens": ["a"], "labels": ["PER"]},
            "label 'PER' is outside the set; did you mean '[BI]-PER'",
        ),
        ({"tokens": "a", "labels": ["O"]}, "field 'tokens' is a str: expected a list"),
        ({"tokens": ["a"]}, "no field 'labels'"),
    ],
)
def test_wrong_records(record, error):
    with pytest.raises(ConfigError, match=error) as caught:
        batch_of(objective(), [record], TOKENIZER, 12, names=["file:3"])
    assert str(caught.value).startswith("file:3: ")
    assert "\n" not in str(caught.value)


def test_a_model_with_other_classes():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 12)
    with pytest.raises(
        ValueError,
        match=r"2 classes for each token, objective.labels 3: set model.head = 'token_classification'",
    ):
        objective().loss(FakeEncoder(2), batch, key=None, train=False)
