"""Requests that come and go: each gets what it gets alone, whatever schedule, slot or cache it meets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import GPT2, make_model

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer
from llm_jax.generate import batch as batch_module
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.models.encoder_decoder import Config as EncoderDecoderConfig
from llm_jax.models.encoder_decoder import make as make_encoder_decoder
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import AxisRules, logical_axes, shardings_for

GREEDY = SamplingConfig(temperature=0.0, max_tokens=9)
WAYS = (
    GREEDY,
    SamplingConfig(temperature=0.9, seed=3, max_tokens=14),
    SamplingConfig(temperature=1.3, top_k=20, seed=4, max_tokens=5),
    SamplingConfig(top_p=0.8, min_p=0.01, seed=5, max_tokens=21),
    SamplingConfig(repetition_penalty=1.4, seed=6, max_tokens=12),
    SamplingConfig(temperature=0.0, repetition_penalty=1.7, max_tokens=16),
    SamplingConfig(logit_bias={65: 6.0, 66: 5.5, 67: -9.0}, top_k=9, seed=7, max_tokens=11),
    SamplingConfig(temperature=2.0, seed=8, max_tokens=40, stops=("\x00", "a")),
)
VARIANTS = {
    "rotary": {"num_kv_heads": 2},
    "learned": GPT2,
    "windows": {"attention_window": 5, "global_every": 2, "attention_soft_cap": 20.0},
    "experts": {"experts": MoeConfig(num_experts=4, mlp_dim=32)},
}


def tiny_model(**changes):
    """A model of the 259 ids of raw_bytes, sure enough of them that rounding decides nothing."""
    return make_model(**{"vocab_size": 259, "max_length": 64, "init_stddev": 0.3, **changes})


def prompts(count: int, seed: int = 0, longest: int = 24) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def run(engine: Engine, schedule=()) -> dict[int, list]:
    """Steps until nothing is left; `schedule`: what to call before each of the first steps."""
    events, schedule = {}, list(schedule)
    while engine.has_work or schedule:
        if schedule:
            schedule.pop(0)()
        for event in engine.step():
            events.setdefault(event.row, []).append(event)
    return events


def tokens_of(events) -> list[int]:
    return [event.token for event in events]


def solo(engine: Engine, prompt, sampling, number=0) -> list[int]:
    request = engine.submit(prompt, sampling, number=number)
    return tokens_of(run(engine)[request])


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """So that caches grow and shrink within short texts."""
    monkeypatch.setattr(batch_module, "SMALLEST_RINGS", (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gets_the_same_in_any_schedule(engine, seed):
    """Random submissions and cancellations, of eight ways to draw, in four slots."""
    rng = np.random.default_rng(seed)
    jobs = [(p, WAYS[i % len(WAYS)], i) for i, p in enumerate(prompts(20, seed))]
    wanted = [solo(engine, *job) for job in jobs]
    ids: dict[int, int] = {}
    cancelled: dict[int, int] = {}
    events: dict[int, list] = {}
    left = list(range(len(jobs)))
    while left or engine.has_work:
        for _ in range(rng.integers(0, 3)):
            if left:
                job = left.pop(0)
                prompt, sampling, number = jobs[job]
                ids[engine.submit(prompt, sampling, number=number)] = job
        if ids and rng.random() < 0.15:
            victim = int(rng.choice(list(ids)))
            engine.cancel(victim)
            cancelled.setdefault(victim, len(events.get(victim, [])))
        assert engine.num_running <= engine.num_slots
        for event in engine.step():
            events.setdefault(event.row, []).append(event)
    assert len(cancelled) > 1
    for request, job in ids.items():
        got = tokens_of(events.get(request, []))
        if request in cancelled:
            assert len(got) == cancelled[request]  # nothing after the cancellation
        else:
            assert [e.stop_reason for e in events[request]][-1] is not None
            assert len(got) == len(wanted[job])
        assert got == wanted[job][: len(got)]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), RawBytesTokenizer(), num_slots=4, chunk_tokens=16)


@pytest.mark.parametrize(
    "variant",
    [n if n == "rotary" else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS],
)
def test_every_kind_of_model_goes_on_as_its_full_forward(variant):
    """Prompts in pieces, behind shared beginnings, in a ring that goes round: greedy is the argmax."""
    model = tiny_model(**VARIANTS[variant])
    engine = Engine(model, RawBytesTokenizer(), num_slots=2, chunk_tokens=16)
    shared = prompts(1, 1, longest=45)[0] + list(range(40, 60))
    asked = [shared[:40], *prompts(3), [*shared[:36], 7, 8]]
    ids = [engine.submit(p, dataclasses.replace(GREEDY, max_tokens=18)) for p in asked]
    events = run(engine)
    rows = [p + tokens_of(events[i]) for p, i in zip(asked, ids, strict=True)]
    batch = {"tokens": jnp.asarray([row + [0] * (64 - len(row)) for row in rows])}
    batch["segment_ids"] = jnp.asarray([[1] * len(row) + [0] * (64 - len(row)) for row in rows])
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda s, b: nnx.merge(graphdef, s)(b).logits)(state, batch)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    for row, prompt, i, one in zip(rows, asked, ids, log_p, strict=True):
        one = one[len(prompt) - 1 : len(row) - 1]
        np.testing.assert_allclose(
            [e.log_probability for e in events[i]], one.max(-1), atol=2e-4, rtol=1e-4
        )
        assert tokens_of(events[i]) == one.argmax(-1).tolist()
    assert engine.reused_tokens >= 32


@pytest.mark.slow
def test_chunks_and_slots_change_nothing(engine):
    jobs = [(p, WAYS[i % len(WAYS)], i) for i, p in enumerate(prompts(6, 5, longest=40))]
    wanted = [solo(engine, *job) for job in jobs]
    for slots, chunk, kept in ((1, 64, 0), (8, 32, 64)):
        other = Engine(
            tiny_model(),
            RawBytesTokenizer(),
            num_slots=slots,
            chunk_tokens=chunk,
            prefix_tokens=kept,
        )
        ids = [other.submit(p, s, number=n) for p, s, n in jobs]
        events = run(other)
        assert [tokens_of(events[i]) for i in ids] == wanted
        assert kept or not other.reused_tokens


def test_a_chat_goes_on_from_the_keys_of_its_last_turn(engine):
    long = dataclasses.replace(GREEDY, max_tokens=24)
    prompt = prompts(1, 9, longest=30)[0]
    first = solo(engine, prompt, long)
    before = engine.reused_tokens
    turn = [*prompt, *first, 3, 4]
    request = engine.submit(turn, GREEDY)
    assert tokens_of(run(engine)[request]) == solo(
        Engine(tiny_model(), RawBytesTokenizer(), prefix_tokens=0), turn, GREEDY
    )
    assert engine.reused_tokens - before == (len(prompt) + len(first) - 1) // 16 * 16


def test_a_full_store_forgets_what_was_not_used_for_longest():
    engine = Engine(tiny_model(), RawBytesTokenizer(), num_slots=2, prefix_tokens=48)
    one = dataclasses.replace(GREEDY, max_tokens=1)
    texts = [[n] * 33 for n in range(5)]  # two whole blocks each
    wanted = {n: solo(Engine(tiny_model(), RawBytesTokenizer(), prefix_tokens=0), texts[n], one)
              for n in range(5)}  # fmt: skip
    rng = np.random.default_rng(0)
    for n in rng.integers(0, 5, 30):
        assert solo(engine, texts[n], one) == wanted[n]
    assert 0 < engine.reused_tokens < 30 * 32
    solo(engine, texts[0], one)
    reused = engine.reused_tokens
    solo(engine, texts[0], one)
    assert engine.reused_tokens == reused + 32


def test_long_prompts_do_not_hold_up_a_text(engine):
    """Between two pieces of the long prompt the short text gets a token."""
    short = engine.submit([1, 2], dataclasses.replace(GREEDY, max_tokens=12))
    while not engine.step():
        pass
    long = engine.submit([9] * 60, GREEDY)
    seen = []
    while not any(event.row == long for event in seen):
        seen += engine.step()
    assert sum(event.row == short for event in seen) >= 3  # pieces of 16
    run(engine)


def test_prompt_log_probabilities(engine):
    prompt = prompts(1, 4, 60)[0] + [5, 6, 7]
    model = tiny_model()
    out = jax.jit(functools.partial(lambda m, t: m({"tokens": t}).logits, model))(
        jnp.asarray([prompt])
    )
    wanted = np.asarray(jax.nn.log_softmax(out))[0, np.arange(len(prompt) - 1), prompt[1:]]
    ids = [engine.submit(prompt, GREEDY, prompt_log_probabilities=True),
           engine.submit([3], GREEDY, prompt_log_probabilities=True),
           engine.submit(prompt, GREEDY)]  # fmt: skip
    events = run(engine)
    first = events[ids[0]][0].prompt_log_probabilities
    np.testing.assert_allclose(first, wanted, atol=2e-4)
    assert events[ids[1]][0].prompt_log_probabilities == ()
    assert events[ids[2]][0].prompt_log_probabilities == ()
    assert all(not event.prompt_log_probabilities for event in events[ids[0]][1:])


def test_counts_and_cancellation(engine):
    ids = [engine.submit([n + 1], GREEDY) for n in range(6)]
    assert (engine.num_running, engine.num_waiting, engine.has_work) == (0, 6, True)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 2)
    engine.cancel(ids[0])  # running
    engine.cancel(ids[5])  # waiting
    engine.cancel(ids[5])
    engine.cancel(10**9)
    assert (engine.num_running, engine.num_waiting) == (3, 1)
    events = run(engine)
    assert set(events) == set(ids[1:5])
    assert (engine.num_running, engine.num_waiting, engine.has_work) == (0, 0, False)
    assert engine.step() == []


def test_first_come_first_served(engine):
    ids = [engine.submit([n + 1] * (40 if n == 4 else 2), GREEDY) for n in range(9)]
    first = {}
    while engine.has_work:
        for event in engine.step():
            first.setdefault(event.row, len(first))
    assert sorted(first, key=first.get) == ids


def test_generate_wants_an_engine_to_itself(engine):
    request = engine.submit([1], GREEDY)
    with pytest.raises(ConfigError, match="1 requests are not over"):
        engine.generate([[2]], GREEDY)
    engine.cancel(request)
    for _ in engine.stream([[1], [2]], GREEDY):
        break
    assert not engine.has_work  # a stream that is left cancels what it asked for


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (SamplingConfig(logit_bias={259: 1.0}), "logit_bias holds token id 259"),
        (SamplingConfig(logit_bias={-1: 1.0}), "logit_bias holds token id -1"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(engine, sampling, words):
    with pytest.raises(ConfigError, match=words):
        engine.submit("a", sampling)
    with pytest.raises(ConfigError, match=r"the prompt has 70 tokens.*max_length 64"):
        engine.submit([1] * 70, GREEDY)
    with pytest.raises(ConfigError, match="the prompt holds token id 999"):
        engine.submit([999], GREEDY)
    assert not engine.has_work


@pytest.mark.parametrize("chunk", [8, 48])
def test_chunks_are_powers_of_two(chunk):
    with pytest.raises(ConfigError, match=f"chunk_tokens {chunk} must be a power of two"):
        Engine(tiny_model(), RawBytesTokenizer(), chunk_tokens=chunk)


@pytest.mark.slow
def test_encoder_decoders_come_and_go():
    config = EncoderDecoderConfig(
        vocab_size=259, embed_dim=32, num_layers=2, num_decoder_layers=2, num_heads=4, mlp_dim=64,
        max_length=64, init_stddev=0.3,
    )  # fmt: skip
    model = make_encoder_decoder(config, precision=Precision(), rngs=nnx.Rngs(0))
    engine = Engine(model, RawBytesTokenizer(), num_slots=4)
    jobs = [(p, WAYS[i % len(WAYS)], i) for i, p in enumerate(prompts(9, 2, 50))]
    wanted = [solo(engine, *job) for job in jobs]
    ids: list[int] = []
    later = [
        lambda job=job: ids.append(engine.submit(job[0], job[1], number=job[2])) for job in jobs
    ]
    events = run(engine, later)
    assert [tokens_of(events[i]) for i in ids] == wanted


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device(engine):
    model = tiny_model(num_kv_heads=2, vocab_size=272)
    one = Engine(model, RawBytesTokenizer(), num_slots=4, chunk_tokens=16)
    rules = AxisRules(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    placed = jax.device_put(params, shardings_for(params, logical_axes(state), rules))
    spread = Engine(
        nnx.merge(graphdef, nnx.State(placed)), RawBytesTokenizer(), num_slots=4, chunk_tokens=16
    )
    jobs = [(p, WAYS[i % 4], i) for i, p in enumerate(prompts(6, 8, 40))]
    got = []
    for engine in (one, spread):
        ids = [engine.submit(p, s, number=n) for p, s, n in jobs]
        events = run(engine)
        got.append([tokens_of(events[i]) for i in ids])
    assert got[0] == got[1]
    keys = spread._batch._cache.keys[0]
    assert keys.sharding.spec[0] == "tensor"


def test_a_step_that_fails_loses_its_requests_and_no_others(engine, monkeypatch):
    """The cache was donated to a program whose result never came."""
    greedy = SamplingConfig(temperature=0.0, max_tokens=6)
    expected = solo(engine, [5, 6, 7], greedy)
    lost = engine.submit([5, 6, 7], greedy)
    engine.submit([8, 9], greedy)
    step = engine._programs.step

    def failing(*arguments):
        step(*arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._programs, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    monkeypatch.setattr(engine._programs, "step", step)
    assert not engine.has_work
    assert engine.num_running == engine.num_waiting == 0
    engine.cancel(lost)
    assert solo(engine, [5, 6, 7], greedy) == expected


def test_an_open_stream_has_the_engine_to_itself(engine):
    stream = engine.stream([[5, 6]], SamplingConfig(temperature=0.0, max_tokens=4))
    first = next(stream)
    with pytest.raises(ConfigError, match="a stream is open"):
        engine.submit([7], SamplingConfig())
    rest = list(stream)
    assert [event.index for event in (first, *rest)] == [0, 1, 2, 3]
    engine.cancel(engine.submit([7], SamplingConfig()))


def test_greedy_texts_pay_no_longer_for_a_neighbour_that_has_ended(engine):
    engine.submit([5, 6], SamplingConfig(temperature=0.0, max_tokens=12))
    engine.submit([7], SamplingConfig(top_k=3, top_p=0.5, max_tokens=2), top_alternatives=4)
    events = run(engine)
    assert sorted(map(len, events.values())) == [2, 12]
    assert not engine._batch._method.drawn
    assert engine._batch._num_best == 0


def test_an_encoder_reads_no_more_than_its_model():
    config = EncoderDecoderConfig(
        vocab_size=259, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_length=32
    )
    model = make_encoder_decoder(config, precision=Precision(), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="whose encoder reads no more"):
        Engine(model, RawBytesTokenizer(), max_length=64)
