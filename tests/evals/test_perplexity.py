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

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals.perplexity import (
    Config,
    Document,
    Perplexity,
    _row_nats,
    compare_with_compressors,
    make,
    summarize,
)
from llm_jax.evals.subject import Subject
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
    scores = Perplexity(DOCUMENTS).score(Subject(model, tokenizer, rules(), rows=2))
    for document, score in zip(DOCUMENTS, scores, strict=True):
        assert score.tokens == len(document.content) + 1
        assert score.nats == pytest.approx(nats(model, tokenizer, document.text), rel=1e-4)


@pytest.mark.parametrize("context", [0, 5, 15])
def test_windows_score_every_token_once(model, tokenizer, context):
    scores = Perplexity(DOCUMENTS, context).score(Subject(model, tokenizer, rules(), 16, 4))
    assert [s.tokens for s in scores] == [len(d.content) + 1 for d in DOCUMENTS]


def test_context_is_what_the_window_before_ended_with(model, tokenizer):
    text = TEXTS[1]
    subject = Subject(model, tokenizer, rules(), 64, 1)
    (score,) = Perplexity([Document("x", text)], 32).score(subject)
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
    one, many = (
        Perplexity(DOCUMENTS).run(Subject(model, tokenizer, rules(size), 16, size)).summary
        for size in (1, 8)
    )
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["tokens"] == many["tokens"]


def test_shares_of_the_sequence_do_not_matter(model, tokenizer):
    mesh = MeshConfig(data=2, context=2)
    in_shares = make_rules(mesh, make_mesh(mesh, jax.devices()[:4]))
    shared, plain = (
        Perplexity(DOCUMENTS).run(Subject(model, tokenizer, each, 16, 4)).summary
        for each in (in_shares, rules())
    )
    assert shared == pytest.approx(plain, rel=1e-5)


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
    scores = Perplexity(DOCUMENTS).score(Subject(model, tokenizer, rules(), 64, 4))
    summary = summarize(scores)
    total = sum(s.nats for s in scores)
    size = sum(len(d.content) for d in DOCUMENTS)
    assert summary["bits_per_byte"] == pytest.approx(total / math.log(2) / size)
    assert summary["perplexity"] == pytest.approx(math.exp(total / summary["tokens"]))
    for document, files in zip(DOCUMENTS, compare_with_compressors(DOCUMENTS, scores), strict=True):
        assert files.gzip * files.bytes / 8 == len(gzip.compress(document.content, 9))
        assert files.xz * files.bytes / 8 == len(lzma.compress(document.content, preset=9))


def test_each_domain_has_its_own_figures(model, tokenizer, tmp_path):
    for name, text in (("code", TEXTS[1]), ("prose", TEXTS[0])):
        (tmp_path / f"{name}.txt").write_text(text)
    domains = {name: str(tmp_path / f"{name}.txt") for name in ("code", "prose")}
    subject = Subject(model, tokenizer, rules(), 64, 4)
    found = make(Config(domains)).run(subject)
    alone = Perplexity([Document("x", TEXTS[1])]).run(subject).summary
    assert found.summary["bits_per_byte/code"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)
    assert found.summary["perplexity/code"] == pytest.approx(alone["perplexity"], rel=1e-5)
    for name, items in found.items.items():
        assert items.mean == pytest.approx(found.summary[name])
    assert found.items["bits_per_byte/prose"].weights == (len(TEXTS[0]),)
    assert "bits_per_byte/code" not in make(Config({"code": domains["code"]})).run(subject).summary


def test_texts_that_are_not_there(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"perplexity\.domains\.a: .*empty"):
        make(Config({"a": str(tmp_path / "empty.txt")}))
    with pytest.raises(ConfigError, match="nowhere"):
        make(Config({"a": str(tmp_path / "nowhere")}))
    with pytest.raises(ConfigError, match=r"perplexity\.domains is empty"):
        make(Config({}))


def test_impossible_context(model, tokenizer):
    subject = Subject(model, tokenizer, rules(), 16, 1)
    with pytest.raises(ConfigError, match="context 16 must lie in"):
        Perplexity(DOCUMENTS, 16).run(subject)
