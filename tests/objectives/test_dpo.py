import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from record_cases import (
    CHAT_MARKS,
    Lookup,
    assert_is_of_spec,
    batch_of,
    bytes_tokenizer,
    descend,
    kept,
    log_softmax,
    made,
    sums,
)
from tiny import assert_trees_close, model_section

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.reference import frozen_reference
from llm_jax.models import gpt
from llm_jax.objectives import dpo, sft
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import use_rules
from llm_jax.training.config import resolve
from llm_jax.training.speed import flops_per_token

TOKENIZER = bytes_tokenizer(*CHAT_MARKS)
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
ASK = {"role": "user", "content": "2+2?"}
RECORDS = [
    {"prompt": "a: ", "chosen": "yes", "rejected": "no"},
    {"messages": [ASK], "chosen": "4", "rejected": "five"},
    {"prompt": "b: ", "chosen": "no", "rejected": "yes"},
    {},
]


def objective(**config):
    return dpo.make(parse(dpo.Config, config))


def decoder():
    return made(gpt, gpt.Config(**model_section(vocab_size=272, num_layers=1, max_length=64)))


def trained(network):
    """Keeps its first values, and has left them."""
    network = kept(network)
    rng = np.random.default_rng(1)
    move = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(network, jax.tree.map(move, nnx.state(network, nnx.Param)))
    return network


def log_ratios(network, batch):
    """[B, 2] of chosen and rejected answers."""
    pairs = dpo.interleaved(batch)
    log_p = []
    for each in (network, frozen_reference(network)):
        log_ps = log_softmax(each(pairs).logits)
        at_target = np.take_along_axis(log_ps, np.asarray(pairs["targets"])[..., None], -1)[..., 0]
        log_p.append((at_target * np.asarray(pairs["loss_weights"])).sum(1))
    return (log_p[0] - log_p[1]).reshape(-1, 2)


def test_both_answers_continue_the_prompt():
    made_by = objective()
    batch = batch_of(made_by, RECORDS, TOKENIZER, 24)
    assert_is_of_spec(batch, made_by, 4, 24)
    for side, answer in (("", b"yes"), ("rejected_", b"no")):
        ids = [BOS, *b"a: ", *answer, EOS]
        size = len(ids) - 1
        assert batch[f"{side}tokens"][0, :size].tolist() == ids[:-1]
        assert batch[f"{side}targets"][0, :size].tolist() == ids[1:]
        weights = [0] * 3 + [1] * (len(answer) + 1)
        assert batch[f"{side}loss_weights"][0].tolist() == weights + [0] * (24 - size)
        assert not batch[f"{side}loss_weights"][3].any()
    assert batch["label_weights"].tolist() == [1, 1, 1, 0]


def test_a_chat_is_that_of_sft():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 24)
    for side, answer in (("", "4"), ("rejected_", "five")):
        ids, mask = sft.render([ASK, {"role": "assistant", "content": answer}], TOKENIZER)
        size = len(ids) - 1
        assert batch[f"{side}tokens"][1, :size].tolist() == ids[:-1]
        assert batch[f"{side}loss_weights"][1, :size].tolist() == mask[1:]
    # Whole chats as answers, as in UltraFeedback.
    say = lambda text: [ASK, {"role": "assistant", "content": text}]  # noqa: E731
    whole = [{"prompt": "2+2?", "chosen": say("4"), "rejected": say("five")}]
    again = batch_of(objective(), whole, TOKENIZER, 24)
    for name, value in again.items():
        np.testing.assert_array_equal(value[0], batch[name][1])


def test_plain_prompts_need_no_chat_template():
    batch_of(objective(), RECORDS[:1], bytes_tokenizer(), 24)


def test_loss_is_equation_7():
    batch, beta = batch_of(objective(), RECORDS, TOKENIZER, 24), 0.3
    network = trained(Lookup())
    rewards = beta * log_ratios(network, batch)[:3]
    margin = rewards[:, 0] - rewards[:, 1]
    assert np.abs(margin).min() > 1e-3
    right, swapped = (np.log1p(np.exp(-m)) for m in (margin, -margin))
    made_by = objective(beta=beta, label_smoothing=0.2)
    held_out, training = (sums(network, made_by, batch, train) for train in (False, True))
    assert float(held_out.loss.mean) == pytest.approx(right.mean(), rel=1e-4)
    expected = (0.8 * right + 0.2 * swapped).mean()
    assert float(training.loss.mean) == pytest.approx(expected, rel=1e-4)
    found = {name: float(value.mean) for name, value in training.metrics.items()}
    assert found == pytest.approx(
        {
            "reward_margin": margin.mean(), "accuracy": (margin > 0).mean(),
            "chosen_reward": rewards[:, 0].mean(), "rejected_reward": rewards[:, 1].mean(),
        },
        rel=1e-3,
    )  # fmt: skip


def test_the_gradient_is_that_of_the_loss_written_plainly():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 24)
    graphdef, params, rest = nnx.split(trained(Lookup()), nnx.Param, ...)

    def plain(params):
        network = nnx.merge(graphdef, params, rest)
        pairs = dpo.interleaved(batch)
        log_p = [
            jnp.sum(
                jnp.take_along_axis(jax.nn.log_softmax(m(pairs).logits), pairs["targets"][..., None], -1)[..., 0]
                * pairs["loss_weights"],
                axis=1,
            ).reshape(-1, 2)
            for m in (network, frozen_reference(network))
        ]  # fmt: skip
        margin = 0.5 * ((log_p[0] - log_p[1]) @ jnp.array([1.0, -1.0]))
        each = -0.8 * jax.nn.log_sigmoid(margin) - 0.2 * jax.nn.log_sigmoid(-margin)
        return jnp.sum(each * batch["label_weights"])

    def ours(params):
        made_by = objective(beta=0.5, label_smoothing=0.2)
        network = nnx.merge(graphdef, params, rest)
        return made_by.loss(network, batch, key=None, train=True).loss.sum

    both = jax.jit(lambda p: (jax.value_and_grad(plain)(p), jax.value_and_grad(ours)(p)))
    (value, gradient), (our_value, our_gradient) = both(params)
    assert float(our_value) == pytest.approx(float(value), rel=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0.01
    assert_trees_close(our_gradient, gradient, atol=2e-5, rtol=1e-3)


def test_it_starts_at_log_2_and_learns():
    batch = batch_of(objective(), RECORDS[:2], TOKENIZER, 24)
    losses = descend(kept(decoder()), objective(), batch, rate=0.05)
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6)
    assert losses[-1] < losses[1] < losses[0]


def test_pairs_in_shares_of_a_mesh_give_the_same():
    batch = batch_of(objective(), RECORDS * 2, TOKENIZER, 24)
    network = trained(decoder())
    alone = sums(network, objective(), batch)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices())
    rules = make_rules(MeshConfig(fsdp=4, tensor=2), mesh)
    with use_rules(rules):
        shared = sums(network, objective(), to_global_batch(batch, rules, 8))
    assert float(shared.loss.sum) == pytest.approx(float(alone.loss.sum), rel=1e-5)


def test_a_model_that_forgot_where_it_began():
    batch = batch_of(objective(), RECORDS, TOKENIZER, 24)
    loss = functools.partial(objective().loss, decoder(), key=None, train=True)
    with pytest.raises(ValueError, match=r"the first value of .* is not kept: set transforms = "):
        jax.eval_shape(loss, batch)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"chosen": None}, "field 'chosen' is empty"),
        (
            {"rejected": "x" * 40},
            r"its text, .*, has 44 tokens, more than data.sequence_length = 24",
        ),
        ({"chosen": [ASK]}, "'chosen' must end with a message of role 'assistant'"),
        ({"messages": "a: "}, "message 1: expected a text under 'role'"),
    ],
)
def test_wrong_records(changes, error):
    with pytest.raises(ConfigError, match=error) as caught:
        batch_of(objective(), [RECORDS[0] | changes], TOKENIZER, 24, names=["pairs:4"])
    assert str(caught.value).startswith("pairs:4: ")
    assert "\n" not in str(caught.value)


def test_what_is_too_long_may_be_cut():
    record = RECORDS[0] | {"rejected": "x" * 40}
    batch = batch_of(objective(truncate=True), [record], TOKENIZER, 24)
    assert batch["rejected_targets"][0].tolist() == [*b"a: ", *b"x" * 21]
    assert batch["targets"][0, :7].tolist() == [*b"a: yes", EOS]


@pytest.mark.parametrize(
    "config", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}]
)
def test_wrong_configs(config):
    with pytest.raises(ConfigError):
        parse(dpo.Config, config)


def test_work_counts_both_answers_and_the_reference():
    sections = {
        "model": {"name": "gpt", **model_section(vocab_size=272)},
        "data": {"sequence_length": 16, "tokenizer": {"name": "raw_bytes"},
                 "sources": [{"name": "jsonl", "path": "records.jsonl"}]},
        "train": {"num_steps": 1, "batch_size": 2},
    }  # fmt: skip
    flops = lambda name: flops_per_token(  # noqa: E731
        resolve({**sections, "objective": {"name": name}}), causal_half=False
    )
    assert flops("dpo") == pytest.approx(flops("sft") * (2 * 3 + 2 * 1) / 3)
