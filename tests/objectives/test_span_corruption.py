import itertools

import jax
import numpy as np
import pytest
from fake_text import (
    CLS,
    PAD,
    SEP,
    FakeModel,
    FakeTokenizer,
    documents_in_rows,
    make_batch,
    shapes_of,
)

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.randomness import RowRandom
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.objectives import causal_lm, span_corruption
from llm_jax.objectives.span_corruption import UL2, Denoiser, Lengths, random_segments

TOKENIZER = FakeTokenizer([f" {i}" for i in range(50)], sentinels=90)
FIRST, VOCAB = TOKENIZER.first, TOKENIZER.vocab_size
SENTINELS = [TOKENIZER.token_id(f"<extra_id_{i}>") for i in range(90)]
MIXTURE = (
    Denoiser(0.15, 3.0, 2.0, "[R]"),
    Denoiser(0.25, None, 1.0, "[S]"),
    Denoiser(0.5, 4.0, 1.0, "[X]"),
)
CONFIGS = [{}, {"noise_density": 0.5}, {"mean_span_length": 8.0}, {"denoisers": MIXTURE}]


def objective(**config):
    return span_corruption.make(span_corruption.Config(**config))


def rows_of(made, count=64, length=128, **options):
    return documents_in_rows(count, made.row_length(length), FIRST, VOCAB, **options)


def t5_lengths(inputs_length, noise_density, mean_span):
    """`compute_input_and_target_lengths` of the T5 code, but for its evening out at density 0.5."""

    def lengths(tokens_length):
        num_noise = round(tokens_length * noise_density)
        num_spans = round(num_noise / mean_span)
        return tokens_length - num_noise + num_spans + 1, num_noise + num_spans + 1

    tokens_length = inputs_length - 1
    while lengths(tokens_length + 1)[0] <= inputs_length:
        tokens_length += 1
    return tokens_length, lengths(tokens_length)[1]


def t5_noise_mask(rng, length, noise_density, mean_span):
    """`random_spans_noise_mask` of the T5 code."""
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    num_spans = max(round(num_noise / mean_span), 1)

    def random_segmentation(num_items, num_segments):
        first_in_segment = np.arange(num_items - 1) < num_segments - 1
        rng.shuffle(first_in_segment)
        return np.bincount(np.cumsum([0, *first_in_segment]))

    noise = random_segmentation(num_noise, num_spans)
    clean = random_segmentation(length - num_noise, num_spans)
    mask = []
    for clean_length, noise_length in zip(clean, noise, strict=True):
        mask += [False] * clean_length + [True] * noise_length
    return np.array(mask)


def put_together(batch, row):
    """(text, mask of noise): the spans of the decoder in the places of the encoder's sentinels."""
    read = batch["encoder_tokens"][row][batch["encoder_segment_ids"][row] > 0].tolist()
    written = batch["targets"][row][batch["loss_weights"][row] > 0].tolist()
    if not read:
        assert not written
        return [], []
    assert read.pop() == written.pop() == SEP
    spans = {}
    for token in written:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans) == SENTINELS[: len(spans)]
    assert [t for t in read if t in SENTINELS] == list(spans)
    text, mask = [], []
    for token in read:
        part = spans.get(token, [token])
        text += part
        mask += [token in spans] * len(part)
    return text, mask


@pytest.mark.parametrize("config", CONFIGS)
def test_batch_spec_is_what_the_transform_makes(config):
    made = objective(**config)
    batch = make_batch(made, TOKENIZER, rows_of(made))
    assert shapes_of(made.batch_spec(64, 128)) == shapes_of(batch)


@pytest.mark.parametrize(
    ("density", "mean_span"), [(0.15, 3.0), (0.15, 8.0), (0.3, 2.5), (0.5, 3.0)]
)
def test_lengths_are_those_of_t5(density, mean_span):
    made = objective(noise_density=density, mean_span_length=mean_span)
    for length in (64, 113, 512, 1024):
        tokens, targets = t5_lengths(length, density, mean_span)
        assert made.row_length(length) == tokens
        spec = made.batch_spec(2, length)
        assert spec["targets"].shape == (2, targets)
        assert spec["encoder_tokens"].shape == (2, length)
    assert t5_lengths(512, 0.15, 3.0) == (568, 114)  # what T5 was trained with


@pytest.mark.parametrize("mixture", [(Denoiser(),), (Denoiser(0.5, 3.0),), MIXTURE, UL2])
def test_a_row_tells_the_length_of_its_encoder(mixture):
    for length in (*range(5, 300), 511, 512, 2048):
        assert Lengths.of_row(mixture, Lengths.of(mixture, length).row).encoder == length


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_sentinels_replaced_give_back_the_row(config):
    made = objective(**config)
    rows = rows_of(made)
    batch = make_batch(made, TOKENIZER, rows)
    full = 0
    for row in range(len(rows)):
        text, _ = put_together(batch, row)
        expected = rows[row][rows[row] >= 0].tolist()
        assert text == (expected if len(expected) > 1 else [])
        if len(expected) == rows.shape[1]:
            full += 1
            assert batch["encoder_segment_ids"][row].all()
            assert batch["segment_ids"][row].all()
    assert full > 40


def test_the_decoder_reads_what_it_wrote():
    made = objective()
    batch = make_batch(made, TOKENIZER, rows_of(made))
    for row in range(64):
        count = int(batch["loss_weights"][row].sum())
        targets = batch["targets"][row]
        assert batch["tokens"][row, :count].tolist() == [PAD, *targets[: count - 1]][:count]
        assert (batch["tokens"][row, count:] == PAD).all()
        assert (targets[count:] == PAD).all()
        for prefix, size in (
            ("", count),
            ("encoder_", (batch["encoder_segment_ids"][row] > 0).sum()),
        ):
            assert batch[f"{prefix}segment_ids"][row].tolist() == [1] * size + [0] * (
                batch[f"{prefix}segment_ids"].shape[1] - size
            )
            assert batch[f"{prefix}positions"][row, :size].tolist() == list(range(size))
            assert not batch[f"{prefix}positions"][row, size:].any()


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 4.0)])
def test_spans_are_distributed_as_in_t5(density, mean_span):
    made = objective(noise_density=density, mean_span_length=mean_span)
    rows = rows_of(made, count=3000, length=48, padded=False)
    batch = make_batch(made, TOKENIZER, rows)
    ours = np.array([put_together(batch, row)[1] for row in range(len(rows))])
    rng = np.random.default_rng(0)
    theirs = np.array(
        [t5_noise_mask(rng, rows.shape[1], density, mean_span) for _ in range(len(rows))]
    )
    assert set(ours.sum(axis=1)) == set(theirs.sum(axis=1))
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.05)

    def lengths(masks):
        edges = np.diff(np.pad(masks.astype(int), ((0, 0), (1, 1))))
        sizes = np.argwhere(edges < 0)[:, 1] - np.argwhere(edges > 0)[:, 1]
        return np.bincount(sizes, minlength=40) / len(sizes), sizes.mean()

    (our_shares, our_mean), (their_shares, their_mean) = lengths(ours), lengths(theirs)
    assert our_mean == their_mean == pytest.approx(mean_span, rel=0.2)
    np.testing.assert_allclose(our_shares, their_shares, atol=0.02)


def test_every_cut_into_segments_is_as_likely():
    count = 20_000
    random = RowRandom(0, np.arange(count))
    segments = random_segments(random, "x", np.full(count, 6), np.full(count, 3), (9, 4))
    assert (segments[:, 3] == 0).all()
    ways = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6]
    counts = np.array([(segments[:, :3] == way).all(axis=1).sum() for way in ways])
    assert counts.sum() == count
    expected = count / len(ways)
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi square, 9: p = 0.001


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_is_the_same_in_any_batch(config):
    made = objective(**config)
    rows = rows_of(made)
    whole = make_batch(made, TOKENIZER, rows)
    for ids in (np.array([3]), np.array([40, 2, 63, 2])):
        part = make_batch(made, TOKENIZER, rows[ids], ids)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][ids], err_msg=name)
    again = make_batch(made, TOKENIZER, rows, np.arange(64) + 64)
    assert (again["targets"] != whole["targets"]).any()


def test_a_mixture_draws_denoisers_by_weight_and_names_them():
    made = objective(denoisers=MIXTURE)
    rows = rows_of(made, count=2000, padded=False)
    batch = make_batch(made, TOKENIZER, rows)
    names = [TOKENIZER.token_id(d.prefix) for d in MIXTURE]
    which = np.array([names.index(t) for t in batch["encoder_tokens"][:, 0]])
    assert np.bincount(which) / len(rows) == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    lengths = Lengths.of(MIXTURE, 128)
    begins = set()
    for row in range(len(rows)):
        read = batch["encoder_tokens"][row]
        rest = {**batch, "encoder_tokens": batch["encoder_tokens"][:, 1:]}
        rest["encoder_segment_ids"] = batch["encoder_segment_ids"][:, 1:]
        text, mask = put_together(rest, row)
        denoiser = MIXTURE[which[row]]
        assert batch["encoder_segment_ids"][row].all()  # whichever it is, the encoder is full
        assert read[-1] == SEP
        assert len(text) == lengths.tokens[which[row]]
        assert sum(mask) == round(len(text) * denoiser.noise_density)
        if denoiser.prefix == "[S]":
            assert mask == sorted(mask)
        places = [
            i
            for i in range(rows.shape[1] - len(text) + 1)
            if rows[row, i : i + len(text)].tolist() == text
        ]
        assert places
        begins.add((which[row], places[0]))
    assert len({place for kind, place in begins if kind == 0}) > 20
    assert {place for kind, place in begins if kind == 2} == {0}  # the densest needs all of the row


def test_ul2_is_table_1_of_the_paper():
    assert [(d.mean_span_length, d.noise_density) for d in UL2] == [
        (3, 0.15), (8, 0.15), (None, 0.25), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)
    ]  # fmt: skip
    parsed = parse(
        span_corruption.Config,
        {"denoisers": [{"noise_density": 0.25, "mean_span_length": None, "prefix": "[S2S]"}]},
    )
    assert parsed.denoisers == UL2[2:3]


def test_the_loss_is_that_of_a_decoder():
    model, made = FakeModel(VOCAB), objective(z_loss=1e-3)
    batch = make_batch(made, TOKENIZER, rows_of(made, count=8, length=32))
    ours, causal = (
        jax.jit(lambda b, o=o: o.loss(model, b, key=None, train=True))(batch)
        for o in (made, causal_lm.make(causal_lm.Config(z_loss=1e-3)))
    )
    assert float(ours.loss.mean) == float(causal.loss.mean)
    assert float(ours.loss.weight) == batch["loss_weights"].sum() > 0


def test_through_the_bytes_tokenizer():
    extra = tuple(f"<extra_id_{i}>" for i in range(20))
    tokenizer = raw_bytes.make(raw_bytes.Config(extra_tokens=extra))
    made = objective()
    text = "Thank you for inviting me to your party last week. 中文。".encode()
    row = [tokenizer.bos_id, *text, tokenizer.eos_id]
    length = next(n for n in range(8, 128) if made.row_length(n) >= len(row))
    row += [-1] * (made.row_length(length) - len(row))
    batch = make_batch(made, tokenizer, np.array([row], np.int32))
    read, written = (batch[name][0] for name in ("encoder_tokens", "targets"))
    hidden = [tokenizer.id_to_piece(i) for i in read if i >= 259]
    assert hidden == list(extra[: len(hidden)])
    assert len(hidden) > 1
    spans = np.split(written, np.flatnonzero(written >= 259))[1:]
    parts = np.split(read, np.flatnonzero(read >= 259))
    joined = [parts[0]] + [x[1:] for pair in zip(spans, parts[1:], strict=True) for x in pair]
    assert tokenizer.decode(np.concatenate(joined).tolist()).encode() == text


def test_what_cannot_be():
    few = FakeTokenizer([" a"], sentinels=3)
    made = objective()
    rows = documents_in_rows(4, made.row_length(128), few.first, few.vocab_size)
    with pytest.raises(
        ConfigError, match=r"needs 7 sentinels <extra_id_0>.*has 3: set.*range\(7\)"
    ):
        make_batch(made, few, rows)
    with pytest.raises(ConfigError, match="has 0: set data"):
        made.transforms(FakeTokenizer([" a"]))
    with pytest.raises(ConfigError, match=r"the prefix '\[NLU\]' is no special token"):
        objective(denoisers=UL2).transforms(TOKENIZER)
    with pytest.raises(ConfigError, match="sequence_length 2 is too short for spans"):
        made.row_length(2)
    for section, message in [
        ({"noise_density": 1.0}, "noise_density 1.0 must be"),
        ({"mean_span_length": 0.5}, "mean_span_length 0.5 must be"),
        ({"sentinel": "<extra>"}, "must have one {}"),
        ({"z_loss": -1.0}, "z_loss -1.0"),
        ({"denoisers": [{"weight": 0.0}]}, "weight 0.0 must be above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(span_corruption.Config, section)


@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_short_rows(tail):
    made = objective()
    row = np.full((1, made.row_length(40)), -1, np.int32)
    row[0, :tail] = [CLS, FIRST, SEP][:tail]
    batch = make_batch(made, TOKENIZER, row)
    text, mask = put_together(batch, 0)
    assert text == (row[0, :tail].tolist() if tail > 1 else [])
    assert sum(mask) == (tail > 1)
