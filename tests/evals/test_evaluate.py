"""The evaluate entry and the final evaluation: on which mesh, in what precision."""

import dataclasses
import json

import jax
import pytest
from flax import nnx
from saved_run import save_run
from tiny import make_model, run_config

from llm_jax import evaluate as entry
from llm_jax.checkpoint.load import load_model
from llm_jax.data.documents import Document as Found
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals import evaluation, job
from llm_jax.evals.perplexity import Document, Perplexity, summarize
from llm_jax.evals.subject import Subject
from llm_jax.nn.precision import with_precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules

DOCUMENTS = [
    Document("a.txt", "some text that fills several windows of the model"),
    Document("b.txt", "more text"),
]


def one_device():
    return AxisRules(make_mesh(MeshConfig(), jax.devices()[:1]))


def make_run(mesh=None):
    return run_config(
        model={"vocab_size": 259, "init_stddev": 0.2},
        data={
            "sources": [{"name": "text", "path": "unread.txt"}],
            "tokenizer": {"name": "raw_bytes"},
            "sequence_length": 16,
        },
        train={"batch_size": 3},
        mesh=mesh or {},
    )


@pytest.fixture
def held_out(monkeypatch):
    found = [Found(i, d.name, d.text, len(d.text), True) for i, d in enumerate(DOCUMENTS)]
    in_source = [("unread.txt", document) for document in found]
    monkeypatch.setattr(evaluation, "held_out_documents", lambda *_: iter(in_source))


@pytest.fixture
def trained_in_shares(tmp_path):
    """A run of four shares of the sequence, on four of the eight devices."""
    save_run(tmp_path, make_run({"context": 4}), jax.devices()[:4])
    return tmp_path


def test_a_run_with_its_sequence_in_shares(trained_in_shares, held_out, monkeypatch):
    """Two shares of the batch on eight devices, and three rows in training: four at a time."""
    monkeypatch.setattr("sys.argv", ["evaluate", "--workdir", str(trained_in_shares)])
    entry.main()
    saved = json.loads((trained_in_shares / "evals" / "scores_1.json").read_text())
    loaded = load_model(trained_in_shares)
    assert dict(job.rules_for(loaded.run).mesh.shape)["context"] == 4
    subject = Subject(loaded.model, loaded.tokenizer, one_device(), 16, 2)
    scores = Perplexity(DOCUMENTS).score(subject)
    assert saved["summary"] == pytest.approx(summarize(scores), rel=1e-5)


@pytest.mark.parametrize("mesh", [{"context": 3}, {"data": 1, "context": -1}], ids=str)
def test_a_mesh_that_does_not_fit_gives_way(mesh):
    """Three do not divide eight devices, nor do eight shares of the sequence its 24 tokens."""
    run = make_run(mesh)
    data = dataclasses.replace(run.data, sequence_length=24)
    rules = job.rules_for(dataclasses.replace(run, data=data))
    assert {axis for axis, size in rules.mesh.shape.items() if size > 1} == {"fsdp"}


def test_the_score_is_that_of_the_weights_as_exported(held_out, tmp_path):
    pytest.importorskip("qwix")
    run, tokenizer = make_run(), raw_bytes.make(raw_bytes.Config())
    model = make_model(vocab_size=259)
    graphdef, state = nnx.split(model)
    rounded = dataclasses.replace(model.precision, matmul_dtype="int8")
    trained = with_precision(nnx.merge(graphdef, state), rounded)
    arguments = (tokenizer, run, one_device(), tmp_path, 1, 2)
    expected = evaluation.evaluate(model, *arguments)
    assert evaluation.evaluate(trained, *arguments) == expected
    assert trained.precision == rounded  # the caller's model is as it was
    as_trained = Subject(trained, tokenizer, one_device(), 16, 2)
    assert Perplexity(DOCUMENTS).run(as_trained).summary["loss"] != expected.summary["loss"]
