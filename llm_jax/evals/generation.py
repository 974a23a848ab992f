"""Generated text against references: exact match, F1 of words, BLEU and chrF."""

import collections
import dataclasses
import re
import string
from collections.abc import Sequence

from llm_jax.core.config import ConfigError
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.records import read_records
from llm_jax.evals.subject import Subject
from llm_jax.generate.sampler import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """path: JSON lines of prompts. sampling: greedy by default. bleu_words: see Generation."""

    path: str
    sampling: SamplingConfig = GREEDY
    bleu_words: str = "13a"
    name: str = "generation"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """text: what the model goes on from. references: right answers, one at least."""

    text: str
    references: tuple[str, ...]

    def __post_init__(self):
        if not self.references:
            raise ConfigError(f"the prompt {self.text[-60:]!r} has no reference")


@dataclasses.dataclass(frozen=True)
class Generation:
    """An evaluator of models that generate.

    bleu_words: sacrebleu's way to cut words, such as "13a", "zh", "char".
    """

    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    bleu_words: str = "13a"

    def __post_init__(self):
        _sacrebleu(self.bleu_words)  # before hours of generation, not after

    def run(self, subject: Subject) -> Findings:
        """exact_match and f1, means in 0..1 of the best over an answer's references; bleu, chrf in 0..100."""
        texts = [prompt.text for prompt in self.prompts]
        completions = subject.engine.generate(texts, self.sampling)
        answers = [completion.text.strip() for completion in completions]
        references = [prompt.references for prompt in self.prompts]
        best = {
            name: [max(score(a, r) for r in rs) for a, rs in zip(answers, references, strict=True)]
            for name, score in (("exact_match", exact_match), ("f1", word_f1))
        }
        return Findings.of_items(
            {name: Items.of(self.prompts, values) for name, values in best.items()},
            **corpus_scores(answers, references, self.bleu_words),
            generated=len(answers),
        )


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same words, see `words_of`."""
    return float(words_of(answer) == words_of(reference))


def word_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of words (SQuAD: Rajpurkar et al. 2016, section 6.1)."""
    ours, theirs = words_of(answer), words_of(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def words_of(text: str) -> list[str]:
    """Words as SQuAD's script compares them: lower case, without punctuation and English articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def corpus_scores(
    answers: Sequence[str], references: Sequence[tuple[str, ...]], bleu_words: str
) -> dict[str, float]:
    """bleu and chrf of a whole corpus in 0..100 (Post 2018; Popović 2015).

    Raises:
      ConfigError: no sacrebleu, or words that it does not know how to cut.
    """
    sacrebleu = _sacrebleu(bleu_words)
    # sacrebleu takes the first reference of all answers, then the second; None where there is none.
    most = max(map(len, references), default=0)
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return {
        "bleu": sacrebleu.corpus_bleu(answers, columns, tokenize=bleu_words).score,
        "chrf": sacrebleu.corpus_chrf(answers, columns).score,
    }


def _sacrebleu(bleu_words: str):
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError("BLEU and chrF need sacrebleu: pip install 'llm_jax[eval]'") from error

    known = sacrebleu.BLEU.TOKENIZERS
    if bleu_words not in known:
        raise ConfigError(f"bleu_words {bleu_words!r}; choices: {', '.join(known)}")
    return sacrebleu


def make(config: Config) -> Generation:
    return Generation(read_records(config.path, Prompt), config.sampling, config.bleu_words)
