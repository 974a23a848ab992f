"""An objective's own metrics over all held-out batches."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.types import Batch, Objective, Weighted
from llm_jax.data.pipeline import make_loader
from llm_jax.evals.findings import Findings
from llm_jax.evals.subject import Subject
from llm_jax.sharding.place import row_share, to_global_batch
from llm_jax.sharding.rules import AxisRules, use_rules
from llm_jax.training.config import RunConfig
from llm_jax.training.step import evaluation_step


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An evaluator for any objective."""

    objective: Objective
    config: RunConfig
    workdir: Path

    def run(self, subject: Subject) -> Findings:
        """loss and the objective's metrics, each the weighted mean over the whole split.

        Raises:
          ConfigError: nothing is held out.
        """
        rules, batch_size = subject.rules, subject.batch_size
        share = row_share(rules, batch_size)
        loader = make_loader(
            self.config.data,
            workdir=self.workdir,
            tokenizer=subject.tokenizer,
            objective=self.objective,
            batch_size=batch_size,
            split="held_out",
            process_index=share.index,
            process_count=share.count,
        )
        graphdef, params, extra = nnx.split(subject.model, nnx.Param, ...)
        step = jax.jit(functools.partial(_sums, graphdef, self.objective, rules))
        total: dict[str, Weighted] | None = None
        with contextlib.closing(loader):
            for rows in loader:
                batch = to_global_batch(rows, rules, batch_size)
                sums = step(params, extra, batch)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return Findings({name: float(value.mean) for name, value in (total or {}).items()})


def _sums(
    graphdef: nnx.GraphDef,
    objective: Objective,
    rules: AxisRules,
    params: nnx.State,
    extra: nnx.State,
    batch: Batch,
) -> dict[str, Weighted]:
    with use_rules(rules):
        sums = evaluation_step(
            nnx.to_pure_dict(params), nnx.to_pure_dict(extra), batch,
            graphdef=graphdef, objective=objective,
        )  # fmt: skip
    return jax.lax.with_sharding_constraint(sums, rules.replicated())
