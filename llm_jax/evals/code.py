"""Whether generated programs pass their tests: pass@k (Chen et al. 2021, section 2.1)."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.records import read_records
from llm_jax.evals.sandbox import run_code
from llm_jax.evals.subject import Subject
from llm_jax.generate.sampler import SamplingConfig

# What ends a function at the left margin (Chen et al. 2021, section 3.2).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")

SAMPLING = SamplingConfig(temperature=0.2, top_p=0.95, max_tokens=256)


@dataclasses.dataclass(frozen=True)
class Config:
    """path: JSON lines of problems; the rest as of PassAtK."""

    path: str
    sampling: SamplingConfig = SAMPLING
    num_samples: int = 1
    ks: tuple[int, ...] = (1,)
    seconds: int = 5
    name: str = "code"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """prompt: the beginning of a program. tests: code behind it that raises where it is wrong."""

    prompt: str
    tests: str


@dataclasses.dataclass(frozen=True)
class PassAtK:
    """An evaluator of models that write programs; runs what they write, see `sandbox`.

    num_samples: programs per problem, at least the largest of `ks`.
    """

    problems: Sequence[Problem]
    sampling: SamplingConfig
    num_samples: int = 1
    ks: tuple[int, ...] = (1,)
    seconds: int = 5

    def __post_init__(self):
        wrong = [k for k in self.ks if not 1 <= k <= self.num_samples]
        if wrong:
            raise ConfigError(f"pass@{wrong[0]}: k must lie in 1..num_samples, {self.num_samples}")

    def run(self, subject: Subject) -> Findings:
        """pass@k for each k, in 0..1, and the number of problems."""
        repeated = [problem for problem in self.problems for _ in range(self.num_samples)]
        sampling = dataclasses.replace(self.sampling, stops=(*self.sampling.stops, *STOPS))
        completions = subject.engine.generate([p.prompt for p in repeated], sampling)
        programs = [
            f"{problem.prompt}{completion.text}\n{problem.tests}\n"
            for problem, completion in zip(repeated, completions, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = pool.map(lambda code: run_code(code, seconds=self.seconds).passed, programs)
            counts = np.array(list(passed), int).reshape(-1, self.num_samples).sum(axis=1)
        items = {
            f"pass@{k}": Items.of(
                self.problems, [pass_at_k(self.num_samples, int(c), k) for c in counts]
            )
            for k in self.ks
        }
        return Findings.of_items(items, problems=len(self.problems))


def pass_at_k(n: int, c: int, k: int) -> float:
    """How probable it is that one of k samples passes, when c of n did: 1 - C(n - c, k) / C(n, k)."""
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def make(config: Config) -> PassAtK:
    return PassAtK(
        read_records(config.path, Problem),
        config.sampling,
        config.num_samples,
        config.ks,
        config.seconds,
    )
