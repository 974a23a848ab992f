"""Scores are a code length: each token once, whatever the windows and the batches."""

import gzip
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import make_model, run

from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.perplexity import (
    Document,
    Perplexity,
    _row_nats,
    compare_with_compressors,
    summarize,
)
from llm_jax.models import gpt
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules

TEXTS = ["short", "a somewhat longer text, longer than two windows of the model " * 2, "é你"]
DOCUMENTS = [Document(f"{i}.txt", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return raw_bytes.make(raw_bytes.Config())


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(vocab_size=tokenizer.vocab_size, max_length=256)


def rules(count=1):
    return AxisRules(make_mesh(MeshConfig(), jax.devices()[:count]))


def nats(model, tokenizer, text):
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    log_p = jax.nn.log_softmax(run(model, {"tokens": ids[None, :-1]}).logits[0])
    return -float(np.take_along_axis(np.asarray(log_p), ids[1:, None], 1).sum())


def test_one_window_is_the_plain_sum(model, tokenizer):
    scores = Perplexity(DOCUMENTS, tokenizer, 256, batch_size=2).score(model, rules())
    for document, score in zip(DOCUMENTS, scores, strict=True):
        assert score.tokens == len(document.content) + 1
        assert score.nats == pytest.approx(nats(model, tokenizer, document.text), rel=1e-4)


@pytest.mark.parametrize("context", [0, 5, 15])
def test_windows_score_every_token_once(model, tokenizer, context):
    perplexity = Perplexity(DOCUMENTS, tokenizer, 16, 4, context)
    scores = perplexity.score(model, rules())
    assert [s.tokens for s in scores] == [len(d.content) + 1 for d in DOCUMENTS]


def test_context_is_what_the_window_before_ended_with(model, tokenizer):
    text = TEXTS[1]
    (score,) = Perplexity([Document("x", text)], tokenizer, 64, 1, 32).score(model, rules())
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    expected, scored = 0.0, 0
    while scored < len(ids) - 1:
        first = max(scored - 32, 0)
        window = np.array(ids[first : first + 65])
        log_p = np.asarray(jax.nn.log_softmax(run(model, {"tokens": window[None, :-1]}).logits[0]))
        each = -np.take_along_axis(log_p, window[1:, None], 1)[:, 0]
        expected += each[scored - first :].sum()
        scored = first + len(window) - 1
    assert score.nats == pytest.approx(expected, rel=1e-4)


def test_batch_size_and_mesh_do_not_matter(model, tokenizer):
    one = Perplexity(DOCUMENTS, tokenizer, 16, 1).run(model, rules())
    many = Perplexity(DOCUMENTS, tokenizer, 16, 8).run(model, rules(8))
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["tokens"] == many["tokens"]


def test_shares_of_the_sequence_do_not_matter(model, tokenizer):
    perplexity = Perplexity(DOCUMENTS, tokenizer, 16, 4)
    mesh = MeshConfig(data=2, context=2)
    shared = perplexity.run(model, make_rules(mesh, make_mesh(mesh, jax.devices()[:4])))
    assert shared == pytest.approx(perplexity.run(model, rules()), rel=1e-5)


def test_logits_of_all_tokens_are_never_in_memory():
    """Only compiled: 1 GiB of logits, by chunks of a quarter."""
    batch_size, length, vocab = 8, 1024, 32768
    config = gpt.Config(vocab, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8)
    make = lambda: gpt.make(config, precision=Precision(), rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))
    dtypes = {"loss_weights": jnp.float32}
    names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, length), dtypes.get(name, jnp.int32))
        for name in names
    }
    compiled = _row_nats.lower(graphdef, state, batch, rules()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch_size * length * vocab * 4


def test_summary_and_compressors(model, tokenizer):
    scores = Perplexity(DOCUMENTS, tokenizer, 64, 4).score(model, rules())
    summary = summarize(scores)
    total = sum(s.nats for s in scores)
    size = sum(len(d.content) for d in DOCUMENTS)
    assert summary["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    assert summary["perplexity"] == pytest.approx(math.exp(total / summary["tokens"]))
    for document, files in zip(DOCUMENTS, compare_with_compressors(DOCUMENTS, scores), strict=True):
        assert files.gzip * files.bytes / 8 == len(gzip.compress(document.content, 9))
        assert files.xz * files.bytes / 8 == len(lzma.compress(document.content, preset=9))


def test_impossible_context(tokenizer):
    with pytest.raises(ValueError, match=r"eval\.context 16 must lie in"):
        Perplexity(DOCUMENTS, tokenizer, 16, 1, 16)
