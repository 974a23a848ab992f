"""A probe finds what hidden states hold, and nothing where nothing is."""

import jax
import numpy as np
import pytest
from tiny import make_model, run

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.linear_probe import Labelled, LinearProbe, hidden_means
from llm_jax.evals.subject import Subject
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules

TOKENIZER = raw_bytes.make(raw_bytes.Config())


def rules(count=1):
    return AxisRules(make_mesh(MeshConfig(), jax.devices()[:count]))


def texts(count, seed):
    """Words of one half of the alphabet or of the other, of every length."""
    rng = np.random.default_rng(seed)
    halves = ["abcdefghij", "klmnopqrst"]
    labels = rng.integers(0, 2, count)
    found = ["".join(rng.choice(list(halves[label]), rng.integers(1, 40))) for label in labels]
    return [
        Labelled(text, "early" if label == 0 else "late")
        for text, label in zip(found, labels, strict=True)
    ]


def test_what_the_tokens_say_is_found_and_noise_is_not():
    pytest.importorskip("sklearn")
    model = make_model(vocab_size=259)
    train, test = texts(120, 0), texts(60, 1)
    subject = Subject(model, TOKENIZER, rules())
    scores = LinearProbe(train, test).run(subject).summary
    assert set(scores) == {"layer/1", "layer/2", "majority"}
    assert scores["layer/1"] > 0.9
    assert 0.3 < scores["majority"] < 0.7
    noise = np.random.default_rng(2).permutation([example.label for example in test])
    shuffled = [
        Labelled(example.text, str(label)) for example, label in zip(test, noise, strict=True)
    ]
    by_chance = LinearProbe(train, shuffled)
    assert by_chance.run(subject).summary["layer/1"] < 0.75


def test_means_are_over_a_text_s_own_tokens():
    model = make_model(vocab_size=259)
    found = hidden_means(
        model, ["abc", "", "a text longer than the model can read"], TOKENIZER, rules(), 2
    )
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("abc")]
    states = run(model, {"tokens": np.array([ids])}, capture=("residual",)).captured["residual"]
    np.testing.assert_allclose(found[0], np.mean(states[:, 0], axis=1), atol=1e-5)
    assert found.shape == (3, 2, 32)
    on_four = hidden_means(model, ["abc", "", "a text"], TOKENIZER, rules(4), 64)
    np.testing.assert_allclose(on_four[:2], found[:2], atol=1e-5)


def test_bad_labels():
    two = [Labelled("a", "x"), Labelled("b", "y")]
    with pytest.raises(ConfigError, match="label 'z' is tested, but no text to train on has it"):
        LinearProbe(two, [Labelled("a", "z")])
    with pytest.raises(ConfigError, match="two labels at least"):
        LinearProbe(two[:1], two[:1])
