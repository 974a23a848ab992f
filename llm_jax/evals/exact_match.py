"""How often the generated text is the target, to the letter: greedily, and by beam search."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from llm_jax.data.held_out import held_out_records
from llm_jax.evals.findings import Findings
from llm_jax.evals.subject import Subject
from llm_jax.generate.beam import BeamConfig
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.training.config import RunConfig

_BATCH = 128


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """An evaluator of models that turn one text into another; needs an objective with `texts`.

    examples: after `run`, (source, text, target), the wrong ones first.
    """

    objective: Any
    config: RunConfig
    workdir: Path
    examples: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def run(self, subject: Subject) -> Findings:
        """exact_match, and exact_match_beams where eval.num_beams is above 1: shares in 0..1.

        Over the first `eval.generate_examples` held-out records.
        """
        records = held_out_records(self.config.data, self.workdir)
        records = itertools.islice(records, self.config.eval.generate_examples)
        pairs = self.objective.texts(list(records))
        if not pairs:
            return Findings({})
        sources, targets = zip(*pairs, strict=True)
        longest = max(len(subject.tokenizer.encode(target)) for target in targets) + 1
        engine = Engine(subject.model, subject.tokenizer, num_slots=_BATCH)
        room = min(longest + longest // 4 + 2, engine.max_length)  # a text too long is wrong anyway
        greedy = engine.generate(sources, SamplingConfig(temperature=0.0, max_tokens=room))
        texts = [completion.text for completion in greedy]
        found = sorted(zip(sources, texts, targets, strict=True), key=lambda row: row[1] == row[2])
        self.examples.extend(found[:20])
        result = {"exact_match": _share(texts, targets), "generated_examples": len(targets)}
        beams = self.config.eval.num_beams
        if beams > 1:
            best = engine.beam_search(sources, BeamConfig(beams, 0.6, "gnmt", max_tokens=room))
            result["exact_match_beams"] = _share([h[0].text for h in best], targets)
        return Findings(result)


def _share(texts, targets) -> float:
    return sum(a == b for a, b in zip(texts, targets, strict=True)) / len(targets)
