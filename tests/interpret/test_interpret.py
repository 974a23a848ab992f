"""One token's attention, lens and probabilities are those of the whole text's forward pass."""

import jax
import numpy as np
import pytest
from tiny import FAMILIES, make_model, run

from llm_jax.core.config import ConfigError
from llm_jax.interpret.attention_maps import attention_map
from llm_jax.interpret.logit_lens import logit_lens
from llm_jax.interpret.token_probabilities import token_probabilities
from llm_jax.nn.transformer import unstack

TOKENS = np.random.default_rng(0).integers(3, 64, 23).tolist()
KINDS = {
    "gpt2": FAMILIES["gpt2"],
    "windows": {**FAMILIES["qwen3"], "attention_window": 5, "global_every": 2},
}


def whole(model, tokens, **arguments):
    return run(model, {"tokens": np.array([tokens], np.int32)}, **arguments)


@pytest.fixture(params=sorted(KINDS))
def model(request):
    return make_model(**KINDS[request.param])


@pytest.mark.parametrize("length", [1, 18])
def test_attention_is_a_row_of_the_whole_map(model, length):
    found = attention_map(model, TOKENS[:length])
    captured = whole(model, TOKENS[:length], capture=("attention",)).captured["attention"]
    expected = np.asarray(captured)[:, 0, :, :, -1].reshape(2, 4, length)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)


def test_the_last_layer_of_the_lens_is_the_model_itself(model):
    lens = logit_lens(model, TOKENS, 7, vocab_size=60, num_best=4)
    logits = whole(model, TOKENS).logits[0, -1, :60]
    expected = np.asarray(jax.nn.log_softmax(logits))
    best = np.argsort(-expected)[:4]
    np.testing.assert_array_equal(lens.tokens[-1], best)
    np.testing.assert_allclose(lens.log_probabilities[-1], expected[best], atol=1e-4)
    np.testing.assert_allclose(lens.target_log_probabilities[-1], expected[7], atol=1e-4)
    assert lens.target_ranks[-1] == np.sum(expected > expected[7])
    assert lens.tokens.shape == (2, 4)


def test_the_lens_reads_layers_through_norm_and_head():
    model = make_model()
    lens = logit_lens(model, TOKENS, TOKENS[0], vocab_size=64, num_best=64)
    out = whole(model, TOKENS, capture=("residual",))
    normed = model.final_norm(out.captured["residual"][0][:, -1:])[0, 0]
    expected = jax.nn.log_softmax(normed @ model.head[...])
    np.testing.assert_allclose(
        lens.log_probabilities[0], np.sort(np.asarray(expected))[::-1], atol=1e-4
    )


def test_probabilities_of_a_text(model):
    found = token_probabilities(model, TOKENS, vocab_size=64, num_best=3)
    logs = np.asarray(jax.nn.log_softmax(whole(model, TOKENS).logits[0]))
    expected = [logs[place, token] for place, token in enumerate(TOKENS[1:])]
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)
    np.testing.assert_array_equal(found.best_tokens, np.argsort(-logs, axis=-1)[:-1, :3])
    assert found.best_log_probabilities.shape == (22, 3)


@pytest.mark.slow
def test_layers_apart_give_the_same():
    model = make_model()
    apart = unstack(model)
    np.testing.assert_allclose(
        attention_map(model, TOKENS), attention_map(apart, TOKENS), atol=1e-6
    )


def test_one_token_has_no_probability():
    found = token_probabilities(make_model(), [1], vocab_size=64, num_best=3)
    assert found.log_probabilities.shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "0 tokens"), ([1] * 33, "33 tokens"), ([1, 64], "token id 64"), ([-1], "token id -1")],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ConfigError, match=message):
        attention_map(make_model(), tokens)
    with pytest.raises(ConfigError, match=message):
        token_probabilities(make_model(), tokens, vocab_size=64, num_best=1)


def test_a_target_that_is_no_id():
    with pytest.raises(ConfigError, match="target 64"):
        logit_lens(make_model(), [1], 64, vocab_size=64, num_best=1)
