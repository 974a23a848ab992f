"""Drawing tokens: distributions and supports against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llm_jax.generate.sampler import (
    Sampling,
    SamplingConfig,
    SamplingMethod,
    draw,
    first_argmax,
    processed,
    sample,
    top_k_mask,
    top_p_mask,
)

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))


def draws(config: SamplingConfig, number: int = 20_000, logits=LOGITS) -> np.ndarray:
    """Counts per token of `number` independent rows."""
    keys = jax.random.split(jax.random.key(config.seed), number)
    rows = jnp.broadcast_to(logits, (number, len(logits)))
    tokens, _ = jax.jit(sample, static_argnums=2)(rows, keys, config)
    return np.bincount(np.asarray(tokens), minlength=len(logits))


def wanted(temperature=1.0, kept=range(5)) -> np.ndarray:
    weights = np.exp(LOGITS.astype(np.float64) / temperature)
    weights *= np.isin(np.arange(5), list(kept))
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), wanted()),
        (SamplingConfig(temperature=0.5), wanted(0.5)),
        (SamplingConfig(temperature=2.0, top_k=3), wanted(2.0, [1, 3, 2])),
        (SamplingConfig(top_p=0.6), wanted(kept=[1, 3])),
        (SamplingConfig(top_p=0.71), wanted(kept=[1, 3, 2])),
        # After top_k=3 the three hold 8/17, 6/17 and 3/17, so two reach 0.8; without it, three do.
        (SamplingConfig(top_k=3, top_p=0.8), wanted(kept=[1, 3])),
        # Temperature comes first: at 0.25 the best two hold 97 % of it all.
        (SamplingConfig(temperature=0.25, top_p=0.95), wanted(0.25, [1, 3])),
    ],
)
def test_distribution(config, expected):
    counts = draws(config)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], expected[kept] * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("method", [{}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}])
def test_log_probability_is_the_models_own(method):
    config = SamplingConfig(**({"temperature": 0.3} | method))
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    keys = jax.random.split(jax.random.key(1), 6)
    tokens, log_probabilities = jax.jit(sample, static_argnums=2)(logits, keys, config)
    np.testing.assert_allclose(
        log_probabilities, jax.nn.log_softmax(logits)[np.arange(6), tokens], atol=1e-6
    )
    if method:
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_top_p_keeps_what_a_sort_keeps():
    """The definition on sorted float64, for flat, sharp and ordinary distributions."""
    rng, masked = np.random.default_rng(0), jax.jit(top_p_mask)
    for scale in (0.01, 1.0, 8.0):
        probabilities = jax.nn.softmax(jnp.asarray(rng.normal(size=(20, 777)) * scale, jnp.float32))
        for top_p in (0.01, 0.3, 0.9, 0.99):
            mask = np.asarray(masked(probabilities, top_p))
            p = np.asarray(probabilities, np.float64)
            order = np.argsort(-p, axis=-1)
            before = np.cumsum(np.take_along_axis(p, order, -1), -1)
            number = 1 + (before < top_p).sum(-1)
            assert np.abs(mask.sum(-1) - number).max() <= 1  # float32 sums, at the very border
            assert (mask.sum(-1) == number).mean() > 0.9
            least_kept = np.where(mask, p, 2).min(-1)
            assert (least_kept > np.where(mask, -1, p).max(-1)).all()


def test_top_p_of_everything_and_of_certainty():
    probabilities = jnp.asarray([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(
        top_p_mask(probabilities, 0.5), [[True] * 4, [True, False, False, False]]
    )


def test_equal_logits_at_the_border_of_top_k_keep_k():
    assert np.count_nonzero(draws(SamplingConfig(top_k=2), 500, np.zeros(5, np.float32))) == 2


def test_first_argmax_is_argmax():
    x = jax.random.randint(jax.random.key(0), (50, 20), 0, 6).astype(jnp.float32)
    np.testing.assert_array_equal(first_argmax(x), jnp.argmax(x, axis=-1))
    assert first_argmax(jnp.full((1, 20), jnp.nan))[0] < 20


def test_rows_draw_apart():
    logits = jnp.zeros((64, 1000))
    keys = jax.random.split(jax.random.key(0), 64)
    draw = jax.jit(sample, static_argnums=2)
    tokens, _ = draw(logits, keys, SamplingConfig())
    alone, _ = draw(logits[:1], keys[7:8], SamplingConfig())
    assert alone[0] == tokens[7]
    assert len(set(tokens.tolist())) > 50


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature nan must be 0"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p 0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1.5 must lie in \(0, 1\]"),
        ({"max_tokens": 0}, "max_tokens 0 must be at least 1"),
        ({"seed": -1}, "seed -1 must lie in"),
        ({"min_p": 1.1}, r"min_p 1.1 must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be above 0"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias inf must be a finite number"),
    ],
)
def test_config_errors(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        SamplingConfig(**fields)
    assert "\n" not in str(error.value)


MIXED = (
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.7),
    SamplingConfig(top_k=5),
    SamplingConfig(top_p=0.8),
    SamplingConfig(min_p=0.1),
    SamplingConfig(temperature=1.4, top_k=30, top_p=0.9, min_p=0.02),
    SamplingConfig(repetition_penalty=1.8),
    SamplingConfig(temperature=0.0, repetition_penalty=0.6, logit_bias={2: 3.5, 9: -4.0}),
    SamplingConfig(temperature=0.5, logit_bias={n: n / 9 for n in range(20)}, top_k=1000),
)


def test_each_row_is_processed_as_by_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(MIXED), 61)).astype(np.float32) * 3
    ids = rng.integers(0, 61, (len(MIXED), 12))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    method = SamplingMethod.of(MIXED)
    got = np.asarray(
        jax.jit(processed, static_argnums=2)(logits, Sampling.of(MIXED, method), method, seen)
    )
    for row, config in enumerate(MIXED):
        chain = processors.LogitsProcessorList()
        if config.logit_bias:
            bias = {(token,): value for token, value in config.logit_bias.items()}
            chain.append(processors.SequenceBiasLogitsProcessor(bias))
        chain.append(processors.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.temperature:
            chain.append(processors.TemperatureLogitsWarper(config.temperature))
            chain.append(processors.TopKLogitsWarper(config.top_k or 61))
            chain.append(processors.TopPLogitsWarper(config.top_p or 1.0))
            chain.append(processors.MinPLogitsWarper(config.min_p or 0.0))
        wanted = chain(torch.tensor(ids[row : row + 1]), torch.tensor(logits[row : row + 1]))[
            0
        ].numpy()
        if not config.temperature:
            assert got[row].argmax() == wanted.argmax()
            continue
        np.testing.assert_array_equal(np.isinf(got[row]), np.isinf(wanted), err_msg=str(config))
        np.testing.assert_allclose(got[row], wanted, rtol=1e-6, err_msg=str(config))


def test_what_another_row_needs_changes_nothing():
    """Tokens, and log probabilities to the last bit, of each row alone and among rows drawn in other ways."""
    logits = jax.random.normal(jax.random.key(0), (len(MIXED), 700)) * 2
    keys = jax.random.split(jax.random.key(1), len(MIXED))
    seen = jax.random.bernoulli(jax.random.key(2), 0.2, logits.shape)
    run = jax.jit(draw, static_argnames="method")
    method = SamplingMethod.of(MIXED)
    together = run(logits, keys, Sampling.of(MIXED, method), method=method, seen=seen)
    for row, config in enumerate(MIXED):
        one = SamplingMethod.of([config])
        rows = [config] * len(MIXED)
        alone = run(logits, keys, Sampling.of(rows, one), method=one, seen=seen)
        assert alone[0][row] == together[0][row]
        assert alone[1][row] == together[1][row]


def test_top_k_keeps_k_of_any_floats():
    rng = np.random.default_rng(0)
    for values in (
        rng.normal(size=(8, 100)).astype(np.float32) * 1e3,
        rng.integers(-2, 3, (8, 100)).astype(np.float32),  # many equal ones
        np.zeros((2, 100), np.float32) * np.float32(-1.0),
        np.where(rng.random((8, 100)) < 0.5, -np.inf, rng.normal(size=(8, 100))).astype(np.float32),
    ):
        for k in (1, 2, 17, 99, 100, 2**31 - 1):
            mask = np.asarray(jax.jit(top_k_mask)(values, jnp.full((len(values), 1), k)))
            order = np.argsort(-values, axis=-1, kind="stable")
            wanted = np.zeros(values.shape, bool)
            np.put_along_axis(wanted, order[:, :k], True, axis=-1)
            np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1e-40},
        {"temperature": 1e-39},
        {"repetition_penalty": 1e-46},
        {"logit_bias": {3: 1e308, 4: 1e307}},
    ],
    ids=str,
)
def test_what_float32_cannot_hold_is_the_nearest_that_it_can(fields):
    """Each of these means the most probable token, or the one with the bias."""
    logits = jnp.array([[0.0, 5.0, 1.0, 2.0, -3.0]] * 4)
    keys = jax.random.split(jax.random.key(0), 4)
    seen = jnp.zeros(logits.shape, bool).at[:, 1].set(True)
    config = SamplingConfig(**{"temperature": 1e-3, **fields})
    tokens, _ = sample(logits, keys, config, seen)
    assert tokens.tolist() == [3 if "logit_bias" in fields else 1] * 4
