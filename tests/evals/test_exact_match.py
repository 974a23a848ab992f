"""Shares of right texts, by a model that always writes the same."""

from types import SimpleNamespace

import pytest

from llm_jax.data.tokenizers import raw_bytes
from llm_jax.evals import exact_match
from llm_jax.generate.beam import Hypothesis


class Parrot:
    """Writes its source, and by beams the source in reverse."""

    max_length = 64

    def __init__(self, model, tokenizer, *, num_slots):
        pass

    def generate(self, prompts, config):
        return [SimpleNamespace(text=prompt) for prompt in prompts]

    def beam_search(self, prompts, config):
        return [
            [Hypothesis((), prompt[::-1], 0.0), Hypothesis((), prompt, -1.0)] for prompt in prompts
        ]


@pytest.mark.parametrize("beams", [1, 4])
def test_shares_of_right_texts(monkeypatch, beams):
    pairs = [("ab", "ab"), ("cd", "dc"), ("ef", "fe"), ("gg", "gg"), ("unseen", "unseen")]
    monkeypatch.setattr(exact_match, "Engine", Parrot)
    monkeypatch.setattr(exact_match, "held_out_records", lambda data, workdir: iter(pairs))
    run = SimpleNamespace(data=None, eval=SimpleNamespace(generate_examples=4, num_beams=beams))
    objective = SimpleNamespace(texts=lambda records: records)
    evaluator = exact_match.ExactMatch(objective, run, None)
    subject = SimpleNamespace(model=None, tokenizer=raw_bytes.make(raw_bytes.Config()))
    found = evaluator.run(subject).summary
    expected = {"exact_match": 0.5, "generated_examples": 4}
    assert found == expected | ({"exact_match_beams": 0.75} if beams > 1 else {})
    assert evaluator.examples[:2] == [("cd", "cd", "dc"), ("ef", "ef", "fe")]
