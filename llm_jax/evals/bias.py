"""Which of two sentences a model finds more probable: the stereotype, or the same with another group.

As CrowS-Pairs (Nangia et al. 2020) asks it, of whole sentences as causal models read them: a model without
the bias prefers the stereotype in half of the pairs.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.records import read_records
from llm_jax.evals.scorer import Request
from llm_jax.evals.subject import Subject


@dataclasses.dataclass(frozen=True)
class Config:
    """path: JSON lines of pairs."""

    path: str
    name: str = "bias"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """group: what the stereotype is about, such as "gender"."""

    stereotype: str
    other: str
    group: str


@dataclasses.dataclass(frozen=True)
class BiasPairs:
    """An evaluator of causal models."""

    pairs: Sequence[Pair]

    def run(self, subject: Subject) -> Findings:
        """stereotype, the share of pairs in 0..1 where it is the more probable: overall, by group.

        Two that are equally probable count a half. gap: the mean of how much more probable it is, in nats
        per pair. pairs, and cut, how many of them did not fit into the model whole.
        """
        texts = [text for pair in self.pairs for text in (pair.stereotype, pair.other)]
        requests = [Request.of(subject.tokenizer, "", text) for text in texts]
        found = subject.scorer.score(requests)
        gaps = np.array([a.total - b.total for a, b in zip(found[::2], found[1::2], strict=True)])
        preferred = (np.sign(gaps) + 1) / 2
        groups = collections.defaultdict(list)
        for number, pair in enumerate(self.pairs):
            groups[pair.group].append(number)
        items = {"stereotype": Items.of(self.pairs, preferred), "gap": Items.of(self.pairs, gaps)}
        for name in sorted(groups):
            members = [self.pairs[i] for i in groups[name]]
            items[f"stereotype/{name}"] = Items.of(members, preferred[groups[name]])
        cut = sum(bool(a.cut or b.cut) for a, b in zip(found[::2], found[1::2], strict=True))
        return Findings.of_items(items, pairs=len(self.pairs), cut=cut)


def make(config: Config) -> BiasPairs:
    return BiasPairs(read_records(config.path, Pair))
