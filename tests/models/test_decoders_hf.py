"""Padding, packing, windows and generation of every decoder, against transformers on plain rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import config_of, export, our_logits, random_model, tokens
from flax import nnx

from llm_jax.data.tokenizers import raw_bytes
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.nn.transformer import unstack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KINDS = ("gpt2", "mistral", "gemma2", "gemma3_scaled", "olmo2", "qwen3_moe")
LENGTH = 24


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our model, theirs) of one case."""
    model = random_model(config_of(request.param))
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export(model, folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logits(model, ids, **options):
    with torch.no_grad():
        options = {name: torch.tensor(x) for name, x in options.items()}
        return model(torch.tensor(ids), **options).logits.numpy()


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_padding_on_either_side(pair):
    ours, theirs = pair
    ids = tokens(ours.config.vocab_size, LENGTH)
    there = np.ones_like(ids)
    there[0, :5] = 0
    there[1, -9:] = 0
    positions = np.maximum(np.cumsum(there, 1) - 1, 0)
    found = our_logits(ours, ids, segment_ids=there, positions=positions)
    wanted = their_logits(theirs, ids, attention_mask=there, position_ids=positions)
    close(found[there > 0], wanted[there > 0])


def test_packed_documents_against_separate_runs(pair):
    ours, theirs = pair
    ids = tokens(ours.config.vocab_size, LENGTH)
    lengths = (10, 3, 11)
    segments = np.repeat([[1, 2, 3]] * 2, lengths, axis=1)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (2, 1))
    found = our_logits(ours, ids, segment_ids=segments, positions=positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        close(found[:, part], their_logits(theirs, ids[:, part]))
        start += length


@nnx.jit
def step(model, batch, cache):
    return model(batch, cache=cache)


def test_cached_decode_against_the_full_pass(pair):
    ours, theirs = pair
    ids = tokens(ours.config.vocab_size, LENGTH)
    model, cache, parts = unstack(ours), ours.init_cache(2, LENGTH), []
    for place in range(LENGTH):
        part = jnp.asarray(ids[:, place : place + 1], jnp.int32)
        out = step(model, {"tokens": part, "positions": jnp.full_like(part, place)}, cache)
        cache = out.cache
        parts.append(out.logits)
    close(np.concatenate(parts, 1), their_logits(theirs, ids))


@pytest.mark.parametrize("pair", ["gpt2", "gemma3_scaled"], indirect=True)
def test_greedy_generation_against_transformers(pair):
    ours, theirs = pair
    tokenizer = raw_bytes.make(raw_bytes.Config())
    prompt = tokens(tokenizer.vocab_size, 9)[:1]
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(
        torch.tensor(prompt),
        attention_mask=torch.ones(1, 9),
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=list(range(tokenizer.vocab_size, ours.config.vocab_size)),
    )
    config = SamplingConfig(temperature=0.0, max_tokens=12)
    (found,) = Engine(ours, tokenizer).generate([prompt[0].tolist()], config)
    assert list(found.tokens) == wanted[0, 9:].tolist()


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_a_window_ends_where_the_config_says(case):
    config = dataclasses.replace(config_of(case), num_layers=1)
    model, ids = random_model(config), tokens(config.vocab_size, LENGTH)
    last = our_logits(model, ids)[:, -1]
    for distance, seen in ((config.attention_window - 1, True), (config.attention_window, False)):
        changed = ids.copy()
        changed[:, LENGTH - 1 - distance] += 1
        changed %= config.vocab_size
        assert np.array_equal(our_logits(model, changed)[:, -1], last) != seen, distance
