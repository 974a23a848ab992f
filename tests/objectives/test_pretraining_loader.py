"""The pretraining objectives behind the real loader, with a SentencePiece model trained on the corpus."""

import itertools

import numpy as np
import pytest

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.pipeline import make_loader, resolve_data
from llm_jax.data.prepare import prepare
from llm_jax.objectives import masked_lm, prefix_lm, span_corruption

T, B = 64, 4
EXTRA = ("[MASK]", *(f"<extra_id_{i}>" for i in range(10)))
OBJECTIVES = {
    "masked": masked_lm.make(masked_lm.Config()),
    "whole words": masked_lm.make(masked_lm.Config(whole_word=True)),
    "next_sentence": masked_lm.make(masked_lm.Config(pairs="next_sentence")),
    "sentence_order": masked_lm.make(masked_lm.Config(pairs="sentence_order")),
    "spans": span_corruption.make(span_corruption.Config()),
    "prefix": prefix_lm.make(prefix_lm.Config()),
}


@pytest.fixture(scope="module")
def loader_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "while", "rain", "fell", "over", "hills,", "reading", "readers"]
    for number in range(60):
        lines = [" ".join(rng.choice(words, 9)) + ".\n" for _ in range(rng.integers(2, 12))]
        (folder / f"{number}.txt").write_text("".join(lines))
    tokenizer = {"name": "sentencepiece", "vocab_size": 305, "split_words": True}
    data = resolve_data(
        {
            "sources": [{"name": "text", "path": str(folder)}],
            "tokenizer": tokenizer | {"extra_tokens": EXTRA},
            "sequence_length": T,
            "held_out_fraction": 0.2,
            "num_workers": 1,
            "num_threads": 1,
        }
    )
    found = prepare(data, folder / "work")

    def make(objective, settings=None, **arguments):
        used = resolve_data(to_dict(data) | (settings or {}))
        arguments = {"tokenizer": found.tokenizer, "batch_size": B} | arguments
        return make_loader(used, workdir=folder / "work", objective=objective, **arguments)

    return make, found.tokenizer


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_are_as_specified_and_resume_exactly(loader_of, name):
    objective = OBJECTIVES[name]
    make, _ = loader_of
    spec = objective.batch_spec(B, T)
    loader = make(objective)
    batches = [next(loader) for _ in range(3)]
    state = loader.get_state()
    batches.append(next(loader))
    for batch in batches:
        assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
            n: (s.shape, s.dtype) for n, s in spec.items()
        }
        assert batch["loss_weights"].sum() > B
    resumed = make(objective)
    resumed.set_state(state)
    shares = [next(make(objective, process_index=i, process_count=2)) for i in (0, 1)]
    for key, value in next(resumed).items():
        np.testing.assert_array_equal(value, batches[3][key], err_msg=key)
        np.testing.assert_array_equal(
            np.concatenate([share[key] for share in shares]), batches[0][key], err_msg=key
        )
    held_out = list(make(objective, split="held_out"))
    assert len(held_out) == make(objective, split="held_out").num_batches
    assert sum(batch["loss_weights"].sum() for batch in held_out) > 50


def test_no_word_of_the_text_is_half_masked(loader_of):
    make, tokenizer = loader_of
    loader = make(OBJECTIVES["whole words"])
    inside, masked = 0, 0
    for _ in range(10):
        batch = next(loader)
        for row in range(B):
            count = int(batch["loss_weights"][row].sum())
            positions, targets = batch["predict_positions"][row], batch["targets"][row]
            tokens = batch["tokens"][row].copy()
            tokens[positions[:count]] = targets[:count]
            texts = [tokenizer.decode([token]) for token in tokens.tolist()]
            is_masked = np.isin(np.arange(T), positions[:count])
            masked += count
            for left, right in itertools.pairwise(range(T)):
                if texts[left][-1:].isalpha() and texts[right][:1].isalpha():
                    assert is_masked[left] == is_masked[right]
                    inside += is_masked[left]
    assert masked > 200
    assert inside > 20


def test_a_stream_has_no_partner_rows(loader_of):
    make, _ = loader_of
    with pytest.raises(ConfigError, match=r"needs data\.mode = 'shards'"):
        make(OBJECTIVES["next_sentence"], settings={"mode": "stream"})
    batch = next(make(OBJECTIVES["sentence_order"], settings={"mode": "stream"}))
    assert batch["label_weights"].sum() > 0
