"""One tree for all requests gives what each of them gives alone."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import make_model

from llm_jax.core.config import ConfigError
from llm_jax.evals import scorer as scorer_module
from llm_jax.evals.prefix_tree import Queries, prefix_tree
from llm_jax.evals.scorer import Request, Scorer, padded_length
from llm_jax.nn.moe import MoeConfig
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules

VOCAB = 61
KINDS = {
    "learned": {"position": "learned"},
    "windows": {"attention_window": 5, "global_every": 2},
    "experts": {"experts": MoeConfig(num_experts=4, mlp_dim=16, experts_per_token=2)},
}


def one_device():
    return AxisRules(make_mesh(MeshConfig(), jax.devices()[:1]))


def model_of(kind="windows"):
    return make_model(vocab_size=VOCAB, max_length=96, init_stddev=0.3, **KINDS[kind])


def ids(rng, size):
    return tuple(rng.integers(0, VOCAB, size).tolist())


def questions(seed=0):
    """Requests with shared examples, shared questions, one inside another, and twice the same."""
    rng = np.random.default_rng(seed)
    examples = ids(rng, 30)
    requests = []
    for size in (3, 17, 25):
        question = examples + ids(rng, size)
        requests += [Request(question, ids(rng, n)) for n in (1, 1, 4, 9)]
        requests.append(Request(question, requests[-1].continuation[:5]))
    requests += [requests[2], Request((0,), ids(rng, 40)), Request((0,), ids(rng, 95))]
    return requests


def forward(model):
    """Logits [T, V] of a row of T tokens; nothing comes back from the padding behind it."""
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)({"tokens": tokens}).logits[0])

    def run(row):
        padded = np.zeros((1, model.config.max_length), np.int32)
        padded[0, : len(row)] = row
        return np.asarray(jitted(state, padded), np.float64)[: len(row)]

    return run


def alone(run, request):
    """Log probabilities of the continuation, and whether each is first, by one forward pass."""
    row = [*request.context, *request.continuation]
    asked = np.arange(len(request.context) - 1, len(row) - 1)
    logits, targets = run(row[:-1])[asked], np.array(row[1:])[asked]
    log_z = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    chosen = logits[np.arange(len(asked)), targets]
    return chosen - log_z, logits.argmax(1) == targets


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_gets_what_it_gets_alone(kind):
    model, requests = model_of(kind), questions()
    scorer, run = Scorer(model, one_device(), batch_tokens=128), forward(model)
    for request, found in zip(requests, scorer.score(requests), strict=True):
        log_probabilities, best = alone(run, request)
        np.testing.assert_allclose(found.log_probabilities, log_probabilities, atol=2e-5)
        np.testing.assert_array_equal(found.best, best)
        assert found.cut == 0
        assert found.total == pytest.approx(log_probabilities.sum(), abs=1e-4)
        assert found.greedy == best.all()


def chains(seed=0):
    """Requests that leave long shared beginnings at many places, in two trees."""
    rng, requests = np.random.default_rng(seed), []
    for _ in range(2):
        stem = ids(rng, 80)
        for size in (16, 33, 34, 50, 66, 80):
            question = stem[:size] + ids(rng, 3)
            requests += [Request(question, ids(rng, n)) for n in (2, 3, 5)]
    return requests


@pytest.mark.parametrize("batch_tokens", [32, 4096])
def test_beginnings_that_are_left_at_many_places(batch_tokens):
    model, requests = model_of("learned"), chains()
    scorer, run = Scorer(model, one_device(), batch_tokens=batch_tokens), forward(model)
    for request, found in zip(requests, scorer.score(requests), strict=True):
        log_probabilities, best = alone(run, request)
        np.testing.assert_allclose(found.log_probabilities, log_probabilities, atol=2e-5)
        np.testing.assert_array_equal(found.best, best)
    # 80 of each stem once, and behind it what is not shared by 16.
    assert scorer.computed < sum(len(r.context) + len(r.continuation) for r in requests) / 3


def test_greedy_is_what_decoding_gives():
    model, row = model_of(), [5]
    run = forward(model)
    for _ in range(6):
        row.append(int(run(row)[-1].argmax()))
    found = Scorer(model, one_device()).score(
        [Request(row[:1], row[1:]), Request(row[:3], row[3:])]
    )
    assert all(one.greedy for one in found)


def test_what_is_shared_goes_through_the_model_once():
    rng = np.random.default_rng(1)
    examples, scorer = ids(rng, 20), Scorer(model_of(), one_device())
    asked = [
        Request(examples + question, choice)
        for question in (ids(rng, 18), ids(rng, 21))
        for choice in ((1,), (2,), (3, 4, 5))
    ]
    scorer.score(asked)
    assert scorer.computed == 20 + 18 + 21 + 2 * 2
    scorer.score([Request((0,), (1,) * 3), Request((0,), (2,) * 3)])
    assert scorer.computed == 63 + 2 * 3  # too little is shared to stand apart


def test_a_request_longer_than_the_model_loses_its_left():
    model, rng = model_of(), np.random.default_rng(2)
    long, text = ids(rng, 100), ids(rng, 130)
    scorer, run = Scorer(model, one_device()), forward(model)
    found = scorer.score([Request(long, long[:7]), Request((0,), text)])
    assert [one.cut for one in found] == [10, 34]
    log_probabilities, _ = alone(run, Request(long[10:], long[:7]))
    np.testing.assert_allclose(found[0].log_probabilities, log_probabilities, atol=2e-5)
    log_probabilities, _ = alone(run, Request(text[33:34], text[34:]))
    np.testing.assert_allclose(found[1].log_probabilities, log_probabilities, atol=2e-5)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_shards_score_as_one_device(mesh):
    model, requests = make_model(vocab_size=64, max_length=96, init_stddev=0.3), questions()
    config = MeshConfig(**({"data": 1} | mesh))
    rules = make_rules(config, make_mesh(config))
    found = Scorer(model, rules, batch_tokens=64).score(requests)
    expected = Scorer(model, one_device()).score(requests)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=2e-5)


def test_nothing_asked_is_nothing():
    scorer = Scorer(model_of(), one_device())
    assert scorer.score([]) == []
    (found,) = scorer.score([Request((0, 1), ())])
    assert found.total == 0
    assert found.greedy
    assert scorer.computed == 0


def test_bad_requests():
    scorer = Scorer(model_of(), one_device())
    with pytest.raises(ConfigError, match="request 1 has no context"):
        scorer.score([Request((0,), (1,)), Request((), (1,))])
    with pytest.raises(
        ConfigError, match=f"holds token id {VOCAB}: ids of this model lie in 0..60"
    ):
        scorer.score([Request((0,), (VOCAB,))])
    with pytest.raises(ConfigError, match="cannot score continuations"):
        Scorer(object(), one_device())


def test_rows_of_branches_are_no_larger_than_attention_can_hold(monkeypatch):
    """A long question and its choices, which would be one row, are a trunk and short rows then."""
    monkeypatch.setattr(scorer_module, "_SCORE_BYTES", 4 * 4 * 32 * 32)
    monkeypatch.setattr(scorer_module, "_ROW_TOKENS", 24)
    model, rng, sizes = model_of("learned"), np.random.default_rng(3), []
    scorer, run, question = Scorer(model, one_device()), forward(model), ids(rng, 50)
    compute = scorer._compute
    monkeypatch.setattr(
        scorer, "_compute",
        lambda rows, above, size, **how: sizes.append((size, how["keep"]))
        or compute(rows, above, size, **how),
    )  # fmt: skip
    requests = [Request(question, ids(rng, n)) for n in (9, 9, 9)]
    for request, found in zip(requests, scorer.score(requests), strict=True):
        log_probabilities, _ = alone(run, request)
        np.testing.assert_allclose(found.log_probabilities, log_probabilities, atol=2e-5)
    assert sizes == [((1, 64), True), ((1, 24), False)]


def test_few_sizes():
    sizes = sorted({padded_length(n) for n in range(1, 1025)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= padded_length(n) < max(n * 1.5, 17) for n in range(1, 1025))


def paths(nodes, above=()):
    """(row, the slots asked on the way to its end) of each leaf, and every node."""
    for node in nodes:
        row = (*above, *node.tokens.tolist())
        yield node, row, len(above)
        yield from paths(node.children, row)


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_holds_every_row_and_asks_every_question_once(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 2, rng.integers(1, 30)).astype(np.int32) for _ in range(60)]
    queries = []
    for i, row in enumerate(rows):
        positions = np.flatnonzero(rng.random(len(row)) < 0.3)
        queries.append(Queries(positions, positions % 7, 100 * i + positions))
    asked = {}
    for node, row, start in paths(prefix_tree(rows, queries, min_shared=4)):
        assert node.start == start
        assert len(node.tokens) >= 4 or not node.children
        assert len(node.children) != 1
        for position, target, slot in zip(
            node.queries.positions, node.queries.targets, node.queries.slots, strict=True
        ):
            assert start <= position < start + len(node.tokens)
            assert slot not in asked
            asked[slot] = row[: position + 1], target
    for i, (row, query) in enumerate(zip(rows, queries, strict=True)):
        for position, target in zip(query.positions, query.targets, strict=True):
            before, found = asked.pop(100 * i + position)
            assert before == tuple(row[: position + 1])
            assert found == target
    assert not asked
