import itertools

import jax
import numpy as np
import pytest
from fake_text import (
    CLS,
    MASK,
    PAD,
    SEP,
    FakeModel,
    FakeTokenizer,
    documents_in_rows,
    log_softmax,
    make_batch,
    shapes_of,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.pieces import Pieces
from llm_jax.core.randomness import RowRandom
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.objectives import masked_lm

WORDS = [" a", " the", " word", "s", "ing", "ed", ".", " of", "\n", " x"]
TOKENIZER = FakeTokenizer([f" {i}" for i in range(57)])
FIRST, VOCAB = TOKENIZER.first, TOKENIZER.vocab_size
KINDS = [
    {"pairs": pairs, "whole_word": whole}
    for pairs, whole in itertools.product(
        ("none", "next_sentence", "sentence_order"), (False, True)
    )
]


def objective(**config):
    return masked_lm.make(masked_lm.Config(**config))


def batch_of(count=64, length=64, tokenizer=TOKENIZER, row_ids=None, padded=True, **config):
    made = objective(**config)
    width = made.row_length(length)
    rows, partners = (
        documents_in_rows(
            count, width, tokenizer.first, tokenizer.vocab_size, seed=s, padded=padded
        )
        for s in (0, 1)
    )
    ids = np.arange(count) if row_ids is None else row_ids
    return make_batch(
        made,
        tokenizer,
        rows[ids % count],
        ids,
        partners[ids % count] if made.partner_rows else None,
    )


def unmasked(batch):
    """The tokens before they were masked."""
    tokens = batch["tokens"].copy()
    rows, places = np.nonzero(batch["loss_weights"])
    tokens[rows, batch["predict_positions"][rows, places]] = batch["targets"][rows, places]
    return tokens


@pytest.mark.parametrize("config", KINDS)
def test_batch_spec_is_what_the_transform_makes(config):
    batch = batch_of(count=8, length=40, **config)
    spec = objective(**config).batch_spec(8, 40)
    assert shapes_of(spec) == shapes_of(batch)
    assert list(spec) == list(objective(**config).batch_spec(8, 40))
    assert spec["targets"].shape == (8, 8)  # 15 % of 40 are 6, of which the next multiple of 8


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("fraction", [0.15, 0.4])
def test_the_share_is_exact_and_special_tokens_are_safe(config, fraction):
    batch = batch_of(mask_fraction=fraction, **config)
    original = unmasked(batch)
    for row in range(len(original)):
        ordinary = original[row] >= FIRST
        count = int(batch["loss_weights"][row].sum())
        wanted = min(max(round(fraction * ordinary.sum()), 1), ordinary.sum())
        assert count == wanted  # every word here is a token, so whole words fit too
        positions = batch["predict_positions"][row]
        assert ordinary[positions[:count]].all()
        assert (np.diff(positions[:count]) > 0).all()
        for name in ("predict_positions", "targets", "loss_weights"):
            assert not batch[name][row, count:].any()
    changed = original != batch["tokens"]
    assert (original[changed] >= FIRST).all()
    assert not np.isin(batch["tokens"][changed], [PAD, CLS, SEP]).any()


def test_eighty_ten_ten():
    batch = batch_of(count=64, row_ids=np.arange(6400), padded=False, mask_fraction=0.3)
    chosen = batch["loss_weights"] > 0
    now = np.take_along_axis(batch["tokens"], batch["predict_positions"], 1)[chosen]
    targets = batch["targets"][chosen]
    assert len(targets) > 50_000
    num_ordinary = VOCAB - FIRST
    assert (now == MASK).mean() == pytest.approx(0.8, abs=0.01)
    # A random token is the one that was there once in a vocabulary.
    assert (now == targets).mean() == pytest.approx(0.1 + 0.1 / num_ordinary, abs=0.01)
    random = now[(now != MASK) & (now != targets)]
    counts = np.bincount(random, minlength=VOCAB)
    assert not counts[:FIRST].any()
    assert counts[FIRST:] / len(random) == pytest.approx(1 / num_ordinary, abs=0.006)


def test_every_place_is_as_likely_and_each_row_id_masks_anew():
    ids = np.arange(4000) * 64  # always the first row of text
    batch = batch_of(row_ids=ids, padded=False)
    assert (unmasked(batch) == unmasked(batch)[0]).all()
    ordinary = unmasked(batch)[0] >= FIRST
    counts = np.bincount(batch["predict_positions"][batch["loss_weights"] > 0], minlength=64)
    assert not counts[~ordinary].any()
    share = counts[ordinary] / len(ids)
    assert share == pytest.approx(round(0.15 * ordinary.sum()) / ordinary.sum(), abs=0.03)
    assert len({row.tobytes() for row in batch["predict_positions"]}) > 3900


@pytest.mark.parametrize("config", KINDS)
def test_a_row_is_the_same_in_any_batch(config):
    whole = batch_of(row_ids=np.arange(64), **config)
    for ids in (np.array([3]), np.array([40, 2, 63, 2])):
        part = batch_of(row_ids=ids, **config)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][ids], err_msg=name)
    other = batch_of(row_ids=np.arange(64), seed=1, **config)
    assert (other["predict_positions"] != whole["predict_positions"]).any()


def test_rows_of_documents_are_full_and_each_text_has_its_cls():
    rows = np.array(
        [
            [50, 51, SEP, CLS, 52, SEP, CLS],
            [CLS, 50, SEP, CLS, 51, 52, 53],
            [50, SEP, CLS, 51, SEP, -1, -1],
            [-1] * 7,
        ],
        np.int32,
    )
    batch = masked_lm.whole_rows(rows, CLS, PAD)
    assert batch["tokens"].tolist() == [
        [CLS, 50, 51, SEP, CLS, 52, SEP, CLS],
        [CLS, 50, SEP, CLS, 51, 52, 53, PAD],
        [CLS, 50, SEP, CLS, 51, SEP, PAD, PAD],
        [PAD] * 8,
    ]
    assert batch["segment_ids"].tolist() == [
        [1, 1, 1, 1, 2, 2, 2, 3],
        [1, 1, 1, 2, 2, 2, 2, 0],
        [1, 1, 1, 2, 2, 2, 0, 0],
        [0] * 8,
    ]
    assert batch["positions"].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 0],
        [0, 1, 2, 0, 1, 2, 3, 0],
        [0, 1, 2, 0, 1, 2, 0, 0],
        [0] * 8,
    ]
    assert not batch["token_types"].any()


def word_rows(count=40, length=60):
    """Random pieces between specials, what of them is maskable and what continues a word."""
    tokenizer = FakeTokenizer(WORDS)
    rng = np.random.default_rng(0)
    tokens = rng.integers(tokenizer.first, tokenizer.vocab_size, (count, length)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = SEP
    tokens[:, 0] = CLS
    tokens[0] = PAD
    tokens[1, 2:] = PAD
    pieces = Pieces.of(tokenizer)
    maskable = pieces.are_ordinary(tokens)
    return maskable, pieces.continue_words(tokens) & maskable


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
def test_whole_words_follow_the_algorithm_of_bert(fraction):
    maskable, continues = word_rows()
    length = maskable.shape[1]
    sizes = np.rint(fraction * maskable.sum(axis=1)).astype(int)
    random = RowRandom(5, np.arange(len(maskable)))
    chosen = masked_lm.choose_words(maskable, continues, sizes, length, random)
    order = random.order("predict", maskable & ~continues, length)
    for row in range(len(maskable)):
        words = []
        for place in np.flatnonzero(maskable[row]):
            if continues[row, place]:
                words[-1].append(place)
            else:
                words.append([place])
        by_start = {word[0]: word for word in words}
        taken = []  # create_masked_lm_predictions, after its shuffle
        for start in order[row, : len(words)]:
            if len(taken) >= sizes[row]:
                break
            if len(taken) + len(by_start[start]) <= sizes[row]:
                taken += by_start[start]
        assert chosen[row][chosen[row] < length].tolist() == sorted(taken)


def test_whole_words_are_masked_whole():
    tokenizer = FakeTokenizer(WORDS)
    batch = batch_of(tokenizer=tokenizer, whole_word=True)
    original = unmasked(batch)
    pieces = Pieces.of(tokenizer)
    continues = pieces.continue_words(original)
    assert continues.mean() > 0.1
    predicted = np.zeros(original.shape, bool)
    rows, places = np.nonzero(batch["loss_weights"])
    predicted[rows, batch["predict_positions"][rows, places]] = True
    np.testing.assert_array_equal(
        predicted[:, 1:][continues[:, 1:]], predicted[:, :-1][continues[:, 1:]]
    )
    wanted = np.maximum(np.rint(0.15 * pieces.are_ordinary(original).sum(axis=1)), 1)
    missing = wanted - batch["loss_weights"].sum(axis=1)
    assert missing.min() >= 0
    assert missing[wanted > 4].mean() < 0.1


@pytest.mark.parametrize("pairs", ["none", "next_sentence", "sentence_order"])
def test_the_loss_is_that_of_plain_numpy(pairs):
    model, made = FakeModel(VOCAB, pairs=pairs != "none"), objective(pairs=pairs)
    batch = batch_of(count=16, length=48, pairs=pairs)
    if pairs != "none":
        batch["label_weights"][:3] = 0
        assert batch["loss_weights"][:3].sum() > 3
    output = jax.jit(lambda b: made.loss(model, b, key=None, train=False))(batch)
    raw = model(batch)
    weights = batch["loss_weights"]
    log_p = log_softmax(np.asarray(raw.hidden) @ np.asarray(model.weights).T)
    nats = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    right = log_p.argmax(-1) == batch["targets"]
    expected = {
        "cross_entropy": (nats * weights).sum() / weights.sum(),
        "mlm_accuracy": (right * weights).sum() / weights.sum(),
    }
    loss = expected["cross_entropy"]
    if pairs != "none":
        log_p = log_softmax(raw.class_logits)
        labels, usable = batch["labels"], batch["label_weights"]
        assert 0 < usable.sum() < len(usable)
        pair = -np.take_along_axis(log_p, labels[:, None], -1)[:, 0]
        expected["pair_loss"] = (pair * usable).sum() / usable.sum()
        expected["pair_accuracy"] = ((log_p.argmax(-1) == labels) * usable).sum() / usable.sum()
        loss += (pair * usable * weights.sum(axis=1)).sum() / weights.sum()
    assert set(output.metrics) == set(expected)
    for name, value in expected.items():
        assert float(output.metrics[name].mean) == pytest.approx(value, rel=1e-5), name
    assert float(output.loss.mean) == pytest.approx(loss, rel=1e-5)
    assert float(output.loss.weight) == weights.sum()
    halves = [
        made.loss(model, {n: x[i::2] for n, x in batch.items()}, key=None, train=False)
        for i in (0, 1)
    ]
    summed = [sum(float(h.loss[i]) for h in halves) for i in (0, 1)]
    assert summed == pytest.approx([float(x) for x in output.loss], rel=1e-5)


def test_of_rows_of_one_length_the_loss_is_the_sum_of_two_means():
    model = FakeModel(VOCAB, pairs=True)
    rng = np.random.default_rng(0)
    rows, partners = (rng.integers(FIRST, VOCAB, (16, 29)).astype(np.int32) for _ in range(2))
    made = objective(pairs="next_sentence", short_fraction=0.0)
    batch = make_batch(made, TOKENIZER, rows, partners=partners)
    assert set(batch["segment_ids"].sum(axis=1)) == {32}
    output = made.loss(model, batch, key=None, train=True)
    metrics = output.metrics
    both = float(metrics["cross_entropy"].mean) + float(metrics["pair_loss"].mean)
    assert float(output.loss.mean) == pytest.approx(both, rel=1e-5)


def test_through_the_bytes_tokenizer():
    tokenizer = raw_bytes.make(raw_bytes.Config(extra_tokens=("<mask>",)))
    text = "One sentence. And another one, said the fox! 中文。\n" * 3
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    rows = np.array([ids], np.int32)
    for whole_word in (False, True):
        made = objective(mask_token="<mask>", whole_word=whole_word)
        batch = make_batch(made, tokenizer, rows)
        assert tokenizer.decode(unmasked(batch)[0].tolist()) == text
        assert (batch["tokens"] == tokenizer.token_id("<mask>")).sum() > 5


def test_what_cannot_be():
    plain = raw_bytes.make(raw_bytes.Config())
    with pytest.raises(
        ConfigError, match=r"'\[MASK\]' is no special.*extra_tokens = \('\[MASK\]',\)"
    ):
        objective().transforms(plain)
    batch = batch_of(count=8, pairs="next_sentence")
    with pytest.raises(ValueError, match="needs a model with a pair head"):
        objective(pairs="next_sentence").loss(FakeModel(VOCAB), batch, key=None, train=False)
    for section, message in [
        ({"mask_fraction": 1.5}, "mask_fraction 1.5 must be"),
        ({"short_fraction": -0.1}, "short_fraction -0.1 must be"),
        ({"pairs": "next_sentense"}, "did you mean 'next_sentence'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(masked_lm.Config, section)
