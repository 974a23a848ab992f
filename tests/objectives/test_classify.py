import jax
import numpy as np
import pytest
from record_cases import (
    FakeEncoder,
    assert_is_of_spec,
    batch_of,
    bytes_tokenizer,
    descend,
    log_softmax,
    tiny_bert,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.objectives import classify
from llm_jax.objectives.encoder_rows import longest_first

TOKENIZER = bytes_tokenizer()
CLS, SEP, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
LABELS = ("no", "yes", "maybe")
RECORDS = [
    {"text": "abc", "pair": "de", "label": "yes"},
    {"text": "x", "pair": "", "label": "no"},
    {"text": "", "pair": "zz", "label": "maybe"},
    {},
]


def objective(**config):
    return classify.make(parse(classify.Config, {"labels": LABELS, **config}))


def loss_of(network, made_by, batch, train=False):
    return jax.jit(lambda batch: made_by.loss(network, batch, key=None, train=train))(batch)


def test_a_row_is_cls_text_sep():
    made_by = objective()
    batch = batch_of(made_by, RECORDS, TOKENIZER, 8)
    assert_is_of_spec(batch, made_by, 4, 8)
    assert batch["tokens"][0].tolist() == [CLS, *b"abc", SEP, PAD, PAD, PAD]
    assert batch["segment_ids"][0].tolist() == [1] * 5 + [0] * 3
    assert not batch["token_types"].any()
    assert batch["labels"].tolist() == [1, 0, 2, 0]
    assert batch["label_weights"].tolist() == [1, 1, 1, 0]
    assert (batch["tokens"][3] == PAD).all()


@pytest.mark.parametrize(
    ("style", "separators", "second_type"), [("bert", [SEP], 1), ("roberta", [SEP, SEP], 0)]
)
def test_a_pair_has_its_separators_and_types(style, separators, second_type):
    batch = batch_of(objective(text_pair="pair", pair_style=style), RECORDS, TOKENIZER, 12)
    first, second = [CLS, *b"abc", *separators], [*b"de", SEP]
    size = len(first) + len(second)
    assert batch["tokens"][0].tolist() == first + second + [PAD] * (12 - size)
    types = [0] * len(first) + [second_type] * len(second)
    assert batch["token_types"][0].tolist() == types + [0] * (12 - size)
    assert batch["positions"][0].tolist() == [*range(size), *[0] * (12 - size)]


@pytest.mark.parametrize("room", range(12))
@pytest.mark.parametrize("sizes", [(7, 2), (2, 7), (5, 5), (0, 4), (6, 5)])
def test_the_longer_text_is_cut_first(sizes, room):
    first, second = list(range(sizes[0])), list(range(100, 100 + sizes[1]))
    expected = [first.copy(), second.copy()]
    while len(expected[0]) + len(expected[1]) > room:  # BERT's _truncate_seq_pair
        expected[0 if len(expected[0]) > len(expected[1]) else 1].pop()
    assert list(longest_first(first, second, room)) == expected


def test_too_long_a_text_is_an_error_or_cut():
    records = [{"text": "a" * 9, "pair": "b" * 3, "label": "no"}]
    with pytest.raises(
        ConfigError,
        match=r"^t:1: the text, .*, has 11 tokens, more than data\.sequence_length = 10;",
    ):
        batch_of(objective(), records, TOKENIZER, 10, names=["t:1"])
    cut = batch_of(objective(truncate=True), records, TOKENIZER, 10)
    assert cut["tokens"][0].tolist() == [CLS, *b"a" * 8, SEP]
    cut = batch_of(objective(truncate=True, text_pair="pair"), records, TOKENIZER, 10)
    assert cut["tokens"][0].tolist() == [CLS, *b"aaaa", SEP, *b"bbb", SEP]


@pytest.mark.parametrize(
    ("labels", "label", "number"),
    [(LABELS, "maybe", 2), (LABELS, 2, 2), (("1", "2", "3"), 3, 2), (("1", "2", "3"), "1", 0),
     (("False", "True"), True, 1)],
)  # fmt: skip
def test_labels_are_names_or_numbers(labels, label, number):
    batch = batch_of(objective(labels=labels), [{"text": "", "label": label}], TOKENIZER, 4)
    assert batch["labels"].tolist() == [number]


@pytest.mark.parametrize(
    ("labels", "label"), [(LABELS, "yess"), (LABELS, 3), (LABELS, -1), (("1", "2", "3"), 0), (LABELS, True)]
)  # fmt: skip
def test_a_label_outside_the_set_is_one_line(labels, label):
    records = [RECORDS[1] | {"label": labels[0]}, {"text": "a text", "label": label}]
    with pytest.raises(ConfigError) as caught:
        batch_of(objective(labels=labels), records, TOKENIZER, 8)
    text = str(caught.value)
    assert f"label {str(label)!r} is outside the set" in text
    assert f"choices: {', '.join(labels)}" in text
    assert "a text" in text
    assert "\n" not in text


def test_loss_is_cross_entropy_over_rows_and_padding_is_none_of_it():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 8)
    network = FakeEncoder(num_classes=3)
    log_p = log_softmax(network(batch).class_logits)[:3]
    labels = batch["labels"][:3]
    expected = -log_p[np.arange(3), labels].mean()
    output = loss_of(network, objective(), batch)
    assert float(output.loss.mean) == pytest.approx(expected, rel=1e-5)
    assert float(output.metrics["accuracy"].mean) == pytest.approx(
        (log_p.argmax(1) == labels).mean()
    )
    alone = {name: x[:3] for name, x in batch.items()}
    assert float(loss_of(network, objective(), alone).loss.sum) == pytest.approx(
        float(output.loss.sum)
    )
    smooth = loss_of(network, objective(label_smoothing=0.3), batch, train=True)
    assert float(smooth.loss.mean) == pytest.approx(0.7 * expected - 0.3 * log_p.mean(), rel=1e-5)


def test_it_learns():
    batch = batch_of(objective(text_pair="pair"), RECORDS, TOKENIZER, 12)
    losses = descend(tiny_bert("sequence_classification", 3), objective(), batch, rate=0.02)
    assert losses[-1] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("num_classes", "error"),
    [(2, "has 2 classes, objective.labels 3"), (None, "needs class logits")],
)
def test_a_model_with_other_classes(num_classes, error):
    batch = batch_of(objective(), RECORDS, TOKENIZER, 8)
    with pytest.raises(ValueError, match=error):
        loss_of(FakeEncoder(num_classes=num_classes), objective(), batch)


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a")])
def test_wrong_labels(labels):
    with pytest.raises(ConfigError, match="two or more different names"):
        objective(labels=labels)
