"""Generated text and programs against figures counted by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.evals.code import PassAtK, Problem, pass_at_k
from llm_jax.evals.generation import Generation, Prompt, exact_match, word_f1
from llm_jax.generate.sampler import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)


class Writer:
    """Answers each prompt with the next of its texts for it."""

    def __init__(self, texts):
        self.texts = {prompt: itertools.cycle(answers) for prompt, answers in texts.items()}

    def generate(self, prompts, config):
        return [SimpleNamespace(text=next(self.texts[prompt])) for prompt in prompts]


def asked(writer):
    return SimpleNamespace(engine=writer)


def test_words_decide():
    assert exact_match("The Cat!", "a cat") == 1
    assert exact_match("cats", "a cat") == 0
    assert word_f1("the big red cat", "a red cat sat") == pytest.approx(2 * 2 / 6)
    assert word_f1("", "") == 1
    assert word_f1("", "cat") == 0


def test_scores_of_a_corpus():
    pytest.importorskip("sacrebleu")
    prompts = [Prompt("a:", ("the cat sat on the mat", "a cat")), Prompt("b:", ("dogs",))]
    writer = Writer({"a:": ["the cat sat on the mat"], "b:": ["birds fly"]})
    scores = Generation(prompts, GREEDY).run(asked(writer)).summary
    assert scores["exact_match"] == scores["f1"] == 0.5
    assert scores["generated"] == 2
    # Unigrams 6 of 8, bigrams 5 of 6, trigrams 4 of 4, 4-grams 3 of 3; 8 words against 7: no penalty.
    assert scores["bleu"] == pytest.approx(100 * (6 / 8 * 5 / 6) ** 0.25)
    assert 0 < scores["chrf"] < 100
    perfect = Writer({"a:": ["a cat"], "b:": ["dogs"]})
    assert Generation(prompts, GREEDY).run(asked(perfect)).summary["exact_match"] == 1


def test_words_that_nobody_knows_how_to_cut():
    pytest.importorskip("sacrebleu")
    with pytest.raises(ConfigError, match=r"bleu_words 'latin'; choices: .*13a"):
        Generation([Prompt("a:", ("b",))], GREEDY, bleu_words="latin")
    with pytest.raises(ConfigError, match="has no reference"):
        Prompt("a:", ())


def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 1), (3, 2, 2)]:
        passed = np.arange(n) < c
        subsets = list(itertools.combinations(passed, k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_programs_are_run():
    prompt = "def f(x):\n"
    problems = [Problem(prompt, "assert f(2) == 4"), Problem("def g():\n", "assert g() is None")]
    right, wrong = "    return x * x", "    return x + 1"
    writer = Writer({prompt: [wrong, right, wrong, wrong], "def g():\n": ["    pass"] * 4})
    scores = PassAtK(problems, GREEDY, num_samples=4, ks=(1, 2, 4)).run(asked(writer)).summary
    assert scores == {"pass@1": 0.625, "pass@2": 0.75, "pass@4": 1.0, "problems": 2}
    with pytest.raises(ConfigError, match=r"pass@2: k must lie in 1\.\.num_samples, 1"):
        PassAtK(problems, GREEDY, ks=(1, 2))
