"""Beam search against transformers' own, for decoders and encoder-decoders, and against all texts there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_model, run

from llm_jax.core.config import ConfigError
from llm_jax.export.hf import load
from llm_jax.generate.beam import BeamConfig
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, EOS, PAD = 23, 2, 0
PROMPTS = [[5, 7, 11], [4], [9, 9, 3, 6, 8, 20, 21]]


class Ids:
    """A tokenizer of which only the ids matter."""

    vocab_size, bos_id, eos_id, pad_id = VOCAB, 1, EOS, PAD

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, eos_token_id=EOS,
        pad_token_id=PAD, decoder_start_token_id=PAD, initializer_factor=4.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def marian():
    config = transformers.MarianConfig(
        vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.4,
        eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=PAD, forced_eos_token_id=None,
        activation_function="relu", scale_embedding=True,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


@pytest.fixture(scope="module", params=[gpt2, t5, marian], ids=["gpt2", "t5", "marian"])
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    theirs = request.param().eval()
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return Engine(load(folder)[0], Ids(), max_length=64), theirs


@pytest.mark.parametrize(
    ("beams", "penalty", "max_tokens"), [(1, 1.0, 6), (3, 1.0, 8), (4, 0.0, 5), (2, 2.0, 12)]
)
def test_texts_and_scores_are_those_of_transformers(pair, beams, penalty, max_tokens):
    engine, theirs = pair
    config = BeamConfig(beams, penalty, max_tokens=max_tokens)
    found = engine.beam_search(PROMPTS, config)
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        start = 1 if theirs.config.is_encoder_decoder else len(prompt)
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, length_penalty=penalty,
            max_new_tokens=max_tokens, num_return_sequences=beams, do_sample=False,
            return_dict_in_generate=True, output_scores=True, pad_token_id=PAD,
        )  # fmt: skip
        rows = [_until_eos(row[start:].tolist()) for row in expected.sequences]
        assert [list(h.tokens) for h in hypotheses][:1] == rows[:1]
        if beams > 1:
            scores = expected.sequences_scores.numpy()
            np.testing.assert_allclose([h.score for h in hypotheses], scores, atol=1e-4)
            assert [list(h.tokens) for h in hypotheses] == rows


def _until_eos(ids):
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def test_one_beam_is_greedy(pair):
    engine, _ = pair
    greedy = engine.generate(PROMPTS, SamplingConfig(temperature=0.0, max_tokens=8))
    beams = engine.beam_search(PROMPTS, BeamConfig(1, max_tokens=8))
    assert [c.tokens for c in greedy] == [h[0].tokens for h in beams]


def test_a_prompt_does_not_depend_on_its_batch(pair):
    engine, _ = pair
    config = BeamConfig(3, max_tokens=6)
    alone = [engine.beam_search([prompt], config)[0] for prompt in PROMPTS]
    for a, b in zip(alone, engine.beam_search(PROMPTS, config), strict=True):
        assert [h.tokens for h in a] == [h.tokens for h in b]


@pytest.mark.parametrize(("penalty", "normalization"), [(0.0, "length"), (3.0, "gnmt")])
def test_as_many_beams_as_tokens_find_the_best_of_all_texts(penalty, normalization):
    model = make_model(vocab_size=VOCAB)
    engine = Engine(model, Ids(), max_length=32)
    config = BeamConfig(VOCAB, penalty, normalization, max_tokens=2)
    found = engine.beam_search([[5, 7]], config)[0]
    best = found[0]
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    tokens = np.array([[5, 7, *pair] for pair in pairs], np.int32)
    log_probs = np.asarray(jax.nn.log_softmax(run(model, {"tokens": tokens}).logits))
    texts = {(EOS,): log_probs[0, 1, EOS]}
    for row, (first, second) in enumerate(pairs):
        if first != EOS:
            texts[first, second] = log_probs[row, 1, first] + log_probs[row, 2, second]
    texts = {t: x / float(config.divisor(jnp.array(len(t)))) for t, x in texts.items()}
    assert {h.tokens for h in found} <= texts.keys()
    assert best.tokens == max(texts, key=texts.get)
    np.testing.assert_allclose(best.score, max(texts.values()), atol=1e-5)


def test_the_gnmt_divisor():
    lengths = jnp.array([1, 7])
    np.testing.assert_allclose(
        BeamConfig(length_penalty=0.6, normalization="gnmt").divisor(lengths), [1.0, 2.0**0.6]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_beams": 0}, "num_beams 0"), ({"normalization": "mean"}, "choices: length, gnmt")],
)
def test_wrong_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        BeamConfig(**change)


def test_a_prompt_that_leaves_no_room():
    engine = Engine(make_model(vocab_size=VOCAB), Ids(), max_length=16)
    with pytest.raises(ConfigError, match="prompt 0 leaves room for 13 tokens"):
        engine.beam_search([[3, 4, 5]], BeamConfig(2, max_tokens=14))
