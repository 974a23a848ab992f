"""Cached generation against the full forward pass, and a row against any batch it may be in."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GPT2, LLAMA, QWEN3, make_model

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.raw_bytes import BOS, PAD, RawBytesTokenizer
from llm_jax.generate import batch as batch_module
from llm_jax.generate.engine import Engine
from llm_jax.generate.events import RowStream
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.nn.precision import Precision, with_precision
from llm_jax.nn.transformer import unstack
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules, logical_axes, shardings_for

GREEDY = SamplingConfig(temperature=0.0, max_tokens=12)
SAMPLED = SamplingConfig(top_p=0.9, max_tokens=12)
VARIANTS = {"rotary": {}, "learned": GPT2, "grouped": LLAMA, "qk_norm": QWEN3}
PROMPTS = ["def main(", "", "a longer prompt than any other", "héllo"]


def tiny_model(**changes):
    """A model of the 259 ids of raw_bytes, sure enough of them that rounding decides nothing."""
    return make_model(**{"vocab_size": 259, "max_length": 64, "init_stddev": 0.3, **changes})


@pytest.fixture(scope="module")
def engine():
    """Shared, because what takes time here is compiling; its model has ids that mean nothing."""
    return Engine(tiny_model(vocab_size=272), RawBytesTokenizer(), num_slots=4)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, batch, cache=None):
    return nnx.merge(graphdef, state)(batch, cache=cache)


@pytest.mark.parametrize(
    ("variant", "stacked"), [*((name, False) for name in VARIANTS), ("rotary", True)]
)
def test_cached_logits_equal_the_full_forward(variant, stacked):
    model = tiny_model(**VARIANTS[variant])
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    full = run(*nnx.split(model), {"tokens": tokens}).logits
    split = nnx.split(model if stacked else unstack(model))
    cache, parts = model.init_cache(2, 6), []
    for start, stop in itertools.pairwise([0, 5, 6, 7, 12]):
        cache = cache if start != 6 else cache.grown(16)
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        out = run(*split, {"tokens": tokens[:, start:stop], "positions": positions}, cache)
        cache = out.cache
        parts.append(out.logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5, rtol=1e-5)


def check_greedy(model, completions):
    """Every token is the most probable of the full forward pass over all that came before it."""
    rows = [done.prompt_tokens + done.tokens for done in completions]
    batch = jnp.asarray([row + (0,) * (64 - len(row)) for row in rows])
    logits = run(*nnx.split(model), {"tokens": batch}).logits[..., : PAD + 1]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    for row, done in zip(log_p, completions, strict=True):
        row = row[len(done.prompt_tokens) - 1 :][: len(done.tokens)]
        np.testing.assert_array_equal(done.tokens, np.argmax(row, axis=-1))
        np.testing.assert_allclose(done.log_probabilities, row.max(-1), atol=1e-4)
        best = np.argsort(-row, axis=-1)[:, :3]
        assert [[a.token for a in step] for step in done.alternatives] == best.tolist()
        found = [[a.log_probability for a in step] for step in done.alternatives]
        np.testing.assert_allclose(found, np.take_along_axis(row, best, -1), atol=1e-4)


def test_greedy_is_the_argmax_of_the_full_forward(engine):
    done = engine.generate(PROMPTS, GREEDY, top_alternatives=3)
    check_greedy(tiny_model(vocab_size=272), done)


def test_greedy_with_learned_positions():
    model = tiny_model(**VARIANTS["learned"])
    done = Engine(model, RawBytesTokenizer()).generate(PROMPTS, GREEDY, top_alternatives=3)
    check_greedy(model, done)


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(engine, config):
    together = engine.generate(PROMPTS, config, top_alternatives=3)
    for row, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], config, row_numbers=[row], top_alternatives=3)[0]
        assert alone.tokens == together[row].tokens
    assert len({c.tokens for c in together}) == len(PROMPTS)
    backwards = engine.generate(PROMPTS[::-1], config, row_numbers=[3, 2, 1, 0], top_alternatives=3)
    assert [c.tokens for c in backwards[::-1]] == [c.tokens for c in together]


def test_more_prompts_than_a_batch_holds(engine):
    done = engine.generate([*PROMPTS, "héllo"], SAMPLED, top_alternatives=3)
    fifth = engine.generate(["héllo"], SAMPLED, row_numbers=[4], top_alternatives=3)[0]
    assert done[4].tokens == fifth.tokens
    four = engine.generate(PROMPTS, SAMPLED, top_alternatives=3)
    assert [c.tokens for c in done[:4]] == [c.tokens for c in four]


def test_seeds_and_rows_differ(engine):
    prompts = [PROMPTS[2]] * 4
    first = engine.generate(prompts, SAMPLED, top_alternatives=3)
    assert len({c.tokens for c in first}) == 4
    again = engine.generate(prompts, SAMPLED, top_alternatives=3)
    assert [c.tokens for c in again] == [c.tokens for c in first]
    other = engine.generate(prompts, dataclasses.replace(SAMPLED, seed=1), top_alternatives=3)
    assert not {c.tokens for c in first} & {c.tokens for c in other}


def test_a_cache_that_grows_changes_nothing(engine, monkeypatch):
    wanted = engine.generate(["abc"], GREEDY, top_alternatives=3)[0]
    monkeypatch.setattr(batch_module, "SMALLEST_RINGS", (1, 1))
    growing = Engine(tiny_model(vocab_size=272), engine.tokenizer)
    assert growing.generate(["abc"], GREEDY)[0].tokens == wanted.tokens


def test_each_row_stops_at_its_eos(engine, monkeypatch):
    free = engine.generate(PROMPTS, GREEDY, top_alternatives=3)
    eos = free[0].tokens[4]
    monkeypatch.setattr(engine.tokenizer, "eos_id", eos)
    stopped = engine.generate(PROMPTS, GREEDY, top_alternatives=3)
    for before, after in zip(free, stopped, strict=True):
        end = before.tokens.index(eos) + 1 if eos in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:end]
        assert after.stop_reason == ("eos" if eos in before.tokens else "max_tokens")
    assert {c.stop_reason for c in stopped} == {"eos", "max_tokens"}


def test_stops_at_max_length_and_says_so(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "eos_id", -1)
    config = dataclasses.replace(GREEDY, max_tokens=60)
    done = engine.generate(PROMPTS, config, top_alternatives=3)
    assert [len(c.tokens) for c in done] == [54, 60, 33, 57]
    reasons = ["length_limit", "max_tokens", "length_limit", "length_limit"]
    assert [c.stop_reason for c in done] == reasons


def test_streamed_text_is_the_final_text(engine):
    """Most random bytes are broken UTF-8: the pieces must still join to what decode gives."""
    events = []
    config = dataclasses.replace(SAMPLED, temperature=20.0, max_tokens=40)
    done = engine.generate(PROMPTS, config, on_token=events.append, top_alternatives=3)
    for row, completion in enumerate(done):
        mine = [event for event in events if event.row == row]
        assert [event.index for event in mine] == list(range(len(completion.tokens)))
        assert "".join(event.text for event in mine) == completion.text
        assert completion.text == engine.tokenizer.decode(completion.tokens)
        assert [event.stop_reason for event in mine][-1] == completion.stop_reason
        assert all(event.stop_reason is None for event in mine[:-1])
    seen = {token for c in done for token in c.tokens}
    offered = {a.token for c in done for step in c.alternatives for a in step}
    assert len(seen) > 60
    assert max(seen | offered) <= PAD


def test_text_prompts_get_a_bos_and_ids_are_taken_as_they_are(engine):
    prompts = ["ab", [BOS, 97, 98], "", [], [97, 98]]
    text, ids, empty, nothing, bare = engine.generate(prompts, GREEDY, top_alternatives=3)
    assert text == ids
    assert text.prompt_tokens == (BOS, 97, 98)
    assert empty == nothing
    assert empty.prompt_tokens == (BOS,)
    assert bare.prompt_tokens == (97, 98)
    assert engine.generate([], GREEDY) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_weights_cast_once_give_what_weights_cast_at_each_use_give(batch_size):
    """As on an accelerator, where the engine keeps bfloat16."""
    model = tiny_model(qk_norm=True, num_kv_heads=2)
    model = with_precision(model, Precision("bfloat16", wide_output=False))
    prompts = [[5], [6]][:batch_size]
    done = Engine(model, RawBytesTokenizer()).generate(prompts, GREEDY)
    split = nnx.split(unstack(model))
    cache, tokens = model.init_cache(batch_size, 256), np.asarray(prompts)
    for position in range(GREEDY.max_tokens):
        positions = jnp.full((batch_size, 1), position)
        out = run(*split, {"tokens": tokens[:, -1:], "positions": positions}, cache)
        rows, cache = np.asarray(jax.nn.log_softmax(out.logits[:, -1])), out.cache
        tokens = np.concatenate([tokens, rows.argmax(-1)[:, None]], axis=1)
        found = [completion.log_probabilities[position] for completion in done]
        np.testing.assert_allclose(found, rows.max(-1), atol=1e-6)
    assert [completion.tokens for completion in done] == [tuple(row[1:]) for row in tokens.tolist()]


def test_on_cpu_a_bfloat16_model_generates_in_float32():
    done = [
        Engine(tiny_model(compute_dtype=dtype), RawBytesTokenizer()).generate([[5, 6]], GREEDY)
        for dtype in ("bfloat16", "float32")
    ]
    assert done[0] == done[1]


def test_a_model_on_a_mesh_generates_the_same(engine):
    model = tiny_model(vocab_size=272)
    rules = AxisRules(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    placed = jax.device_put(params, shardings_for(params, logical_axes(state), rules))
    spread = Engine(nnx.merge(graphdef, nnx.State(placed)), engine.tokenizer, num_slots=4)
    wanted = engine.generate(PROMPTS, GREEDY, top_alternatives=3)
    got = spread.generate(PROMPTS, GREEDY)
    assert [c.tokens for c in got] == [c.tokens for c in wanted]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda e: e.stream(["x" * 80], GREEDY), "prompt 0 has 81 tokens.*max_length 64"),
        (lambda e: e.stream(["a", [5, 259]], GREEDY), "prompt 1 holds token id 259.*0..258"),
        (lambda e: e.stream(["a"], GREEDY, row_numbers=[1, 2]), "2 row_numbers for 1 prompts"),
        (lambda e: e.stream(["a"], GREEDY, top_alternatives=-1), "top_alternatives -1"),
        (
            lambda e: Engine(tiny_model(position="learned"), e.tokenizer, max_length=65),
            "max_length 65 exceeds the 64 learned positions",
        ),
        (lambda e: Engine(tiny_model(vocab_size=258), e.tokenizer), "tokenizer has 259 ids"),
        (lambda e: Engine(tiny_model(), e.tokenizer, num_slots=0), "num_slots 0 must be"),
        (lambda e: Engine(tiny_model(), e.tokenizer, max_length=1), "max_length 1 must be"),
        (lambda e: Engine(tiny_model().stack, e.tokenizer), "Stack cannot generate"),
    ],
)
def test_errors_are_one_line_and_come_before_the_first_event(engine, make, words):
    with pytest.raises(ValueError, match=words) as error:
        make(engine)
    assert "\n" not in str(error.value)


class OneLetter:
    """A token is a letter; 0 ends."""

    eos_id = 0

    def decode_bytes(self, ids):
        return bytes(ids)


def stream_of(text, stops, room=100):
    """The events of a row that the model goes on with `text`."""
    row = RowStream(0, OneLetter(), max_tokens=room, room=room, stops=stops)
    events = []
    for token in text.encode():
        events.append(row.event(token, 0.0, ()))
        if row.stopped:
            break
    return events


@pytest.mark.parametrize(
    ("text", "stops", "shown", "reason"),
    [
        ("one two three", (" t",), "one", "stop"),
        ("one two three", ("three", "two"), "one ", "stop"),
        ("aab aac", ("aac",), "aab ", "stop"),
        ("你好。再见", ("。",), "你好", "stop"),
        ("a\n\nb", ("\n\n", "b"), "a", "stop"),
        ("end \0", ("end of",), "end ", "eos"),
    ],
)
def test_a_text_ends_before_the_first_stop(text, stops, shown, reason):
    events = stream_of(text, stops)
    assert "".join(event.text for event in events) == shown
    assert events[-1].stop_reason == reason


def test_what_may_begin_a_stop_waits_and_nothing_is_lost():
    events = stream_of("12END34E", ("END!",), room=8)
    assert [event.text for event in events] == ["1", "2", "", "", "", "END3", "4", "E"]
    assert events[-1].stop_reason == "max_tokens"


def test_the_engine_stops_at_a_string(engine):
    (whole,) = engine.generate(["def main("], GREEDY)
    stop = whole.text[3:5]
    (cut,) = engine.generate(["def main("], dataclasses.replace(GREEDY, stops=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.stop_reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    with pytest.raises(ConfigError, match="must not hold an empty string"):
        SamplingConfig(stops=("",))


def test_models_that_differ_in_their_parameters_share_programs():
    """In a training loop each evaluation has an engine of its own."""
    tokenizer, traced = RawBytesTokenizer(), []

    class Model(type(tiny_model())):
        def __call__(self, batch, **arguments):
            traced.append(batch["tokens"].shape)
            return super().__call__(batch, **arguments)

    def text_of(seed):
        model = tiny_model(seed=seed)
        model.__class__ = Model
        return Engine(model, tokenizer).generate(["ab"], GREEDY)[0].text

    first, second = text_of(0), text_of(1)
    once = len(traced)
    assert text_of(0) == first != second
    assert once == len(traced) == 2  # a prompt's program and a step's
