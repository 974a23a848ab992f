import jax
import numpy as np
import pytest
from fake_text import FakeModel
from record_cases import (
    assert_is_of_spec,
    batch_of,
    bytes_tokenizer,
    descend,
    log_softmax,
    made,
    pieces_tokenizer,
    sums,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.models import encoder_decoder
from llm_jax.objectives import seq2seq

TOKENIZER = bytes_tokenizer()
PAD, EOS = TOKENIZER.pad_id, TOKENIZER.eos_id
RECORDS = [
    {"source": "one", "target": "eins", "to": "German"},
    {"source": "two", "target": "deux", "to": "French"},
    {"source": "", "target": "", "to": "German"},
    {},
]


def objective(**config):
    return seq2seq.make(parse(seq2seq.Config, config))


def model(**changes):
    config = {
        "vocab_size": 272, "embed_dim": 32, "num_layers": 1, "num_heads": 2, "max_length": 64,
        "init_stddev": 0.2,
    }  # fmt: skip
    return made(encoder_decoder, encoder_decoder.Config(**config, **changes))


def logits_of(fake, batch):
    return np.asarray(fake.embedding[batch["tokens"]] @ fake.weights.T, np.float64)


def sums_of(fake, made_by, batch, train=False):
    return jax.jit(lambda batch: made_by.loss(fake, batch, key=None, train=train))(batch)


def test_the_encoder_reads_the_source_and_the_decoder_starts_from_pad():
    made_by = objective(target_length=8)
    batch = batch_of(made_by, RECORDS, TOKENIZER, 12)
    assert_is_of_spec(batch, made_by, 4, 12)
    assert batch["encoder_tokens"][0].tolist() == [*b"one", EOS] + [PAD] * 8
    assert batch["encoder_segment_ids"][0].tolist() == [1] * 4 + [0] * 8
    assert batch["encoder_positions"][0].tolist() == [0, 1, 2, 3] + [0] * 8
    assert batch["targets"][1].tolist() == [*b"deux", EOS, PAD, PAD, PAD]
    assert batch["tokens"][1].tolist() == [PAD, *b"deux", PAD, PAD, PAD]
    assert batch["loss_weights"][1].tolist() == [1] * 5 + [0] * 3
    assert batch["targets"][2, 0] == EOS  # an empty text is one that ends at once
    assert batch["loss_weights"][2].sum() == 1
    for name in ("loss_weights", "segment_ids", "encoder_segment_ids"):
        assert not batch[name][3].any()


def test_a_prefix_is_the_records_own():
    made_by = objective(prefix="to {to}: ")
    batch = batch_of(made_by, RECORDS, TOKENIZER, 32)
    assert bytes(batch["encoder_tokens"][1][:14].tolist()) == b"to French: two"
    assert made_by.texts(RECORDS[:2]) == [("to German: one", "eins"), ("to French: two", "deux")]
    plain = objective(prefix="{{x}} ")
    assert plain.texts(RECORDS[:1]) == [("{x} one", "eins")]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, pieces_tokenizer()], ids=["bytes", "pieces"])
def test_texts_come_back_from_the_batch(tokenizer):
    records = [{"source": f"the cat {i}", "target": f"la café {i}."} for i in range(5)]
    batch = batch_of(objective(), records, tokenizer, 64)
    for row, record in enumerate(records):
        target = batch["targets"][row][batch["loss_weights"][row] > 0]
        assert target[-1] == tokenizer.eos_id
        assert tokenizer.decode(target[:-1]) == record["target"]
        source = batch["encoder_tokens"][row][batch["encoder_segment_ids"][row] > 0]
        assert tokenizer.decode(source[:-1]) == record["source"]


def test_examples_that_share_a_row_do_not_see_each_other():
    records = [{"source": "abc" * (i % 3), "target": "x" * (i % 4 + 1)} for i in range(7)] + [{}]
    packed_by, alone_by = objective(examples_per_row=4), objective()
    packed = batch_of(packed_by, records, TOKENIZER, 32)
    assert_is_of_spec(packed, packed_by, 2, 32)
    assert packed["segment_ids"].max(axis=1).tolist() == [4, 3]
    alone = batch_of(alone_by, records, TOKENIZER, 32)
    network = model()
    together, apart = sums(network, packed_by, packed), sums(network, alone_by, alone)
    assert float(together.loss.weight) == float(apart.loss.weight) == alone["loss_weights"].sum()
    assert float(together.loss.mean) == pytest.approx(float(apart.loss.mean), rel=1e-5)
    for name in ("accuracy", "sequence_accuracy"):
        assert float(together.metrics[name].sum) == float(apart.metrics[name].sum)
    assert float(together.metrics["sequence_accuracy"].weight) == 7


def test_loss_is_cross_entropy_of_smoothed_labels():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 12)
    network = FakeModel(272)
    logits = logits_of(network, batch)
    log_p = log_softmax(logits)
    at_target = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    weights, smoothing = batch["loss_weights"], 0.1
    plain = -(at_target * weights).sum() / weights.sum()
    uniform = -(log_p.mean(-1) * weights).sum() / weights.sum()
    made_by = objective(label_smoothing=smoothing, z_loss=0.01)
    trained = sums_of(network, made_by, batch, train=True)
    log_z = np.log(np.exp(logits).sum(-1))
    z_loss = 0.01 * (log_z**2 * weights).sum() / weights.sum()
    expected = (1 - smoothing) * plain + smoothing * uniform + z_loss
    assert float(trained.loss.mean) == pytest.approx(expected, rel=1e-5)
    assert float(trained.metrics["cross_entropy"].mean) == pytest.approx(plain, rel=1e-5)
    assert "sequence_accuracy" not in trained.metrics
    assert float(sums_of(network, made_by, batch).loss.mean) == pytest.approx(plain, rel=1e-5)


def test_a_sequence_is_right_when_all_of_it_is():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 12)
    network = FakeModel(272)
    best = logits_of(network, batch).argmax(-1)
    # The targets are what the model would say, in all but one place of row 1 and the padding.
    batch["targets"] = np.where(batch["loss_weights"] > 0, best, PAD).astype(np.int32)
    batch["targets"][1, 2] = (batch["targets"][1, 2] + 1) % 256
    found = sums_of(network, objective(), batch).metrics["sequence_accuracy"]
    assert (float(found.sum), float(found.weight)) == (2, 3)


def test_it_learns():
    batch = batch_of(objective(label_smoothing=0.1), RECORDS, TOKENIZER, 12)
    losses = descend(model(), objective(), batch)
    assert losses[-1] < losses[1] < losses[0]


def test_what_does_not_fit_is_one_line_with_the_record():
    records = [RECORDS[0], {"source": "s" * 12, "target": "t" * 4}]
    with pytest.raises(
        ConfigError,
        match=r"^a.jsonl:2: the source has 13 tokens, more than data\.sequence_length = 12; raise it, or set objective\.truncate = True$",
    ):
        batch_of(objective(), records, TOKENIZER, 12, names=["a.jsonl:1", "a.jsonl:2"])
    cut = batch_of(objective(truncate=True), records, TOKENIZER, 12)
    assert cut["encoder_tokens"][1].tolist() == [*b"s" * 11, EOS]
    with pytest.raises(
        ConfigError,
        match=r"^record \{'source': 'one', .*\}: the target has 5 tokens, more than objective\.target_length = 4$",
    ):
        batch_of(objective(target_length=4, truncate=True), records, TOKENIZER, 12)
    with pytest.raises(
        ConfigError,
        match=r"the source, with those of 1 more in its row, has 17 tokens, .*; lower objective\.examples_per_row = 2$",
    ):
        batch_of(objective(examples_per_row=2), [RECORDS[0], records[1]], TOKENIZER, 13)


@pytest.mark.parametrize(
    ("config", "record", "error"),
    [
        (
            {},
            {"source": "a", "tgt": "b"},
            "no field 'target'; did you mean 'tgt'.*fields: source, tgt",
        ),
        ({}, {"source": "a", "target": None}, "field 'target' is empty"),
        ({}, {"source": ["a"], "target": "b"}, "field 'source' is a list: expected a text"),
        ({"prefix": "{to} "}, {"source": "a", "target": "b"}, "no field 'to'"),
    ],
)
def test_wrong_records(config, record, error):
    with pytest.raises(ConfigError, match=error) as caught:
        batch_of(objective(**config), [record], TOKENIZER, 12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"prefix": "{"}, {"prefix": "{}"}, {"prefix": "{to!r}"}, {"label_smoothing": 1.0},
        {"target_length": 0}, {"examples_per_row": 0}, {"z_loss": -1.0},
        {"examples_per_row": 2, "truncate": True},
    ],
)  # fmt: skip
def test_wrong_configs(config):
    with pytest.raises(ConfigError):
        parse(seq2seq.Config, config)
