"""Perplexity of a checkpoint: `python -m llm_jax.evaluate --workdir runs/tiny [--step N]`.

With `--tasks hellaswag,my_task.yaml` what lm-evaluation-harness asks instead (extra `eval`).
"""

import argparse
import importlib.util
import re
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console

from llm_jax.checkpoint.load import LoadedModel, load_model
from llm_jax.core import flags
from llm_jax.evals.conclude import evaluate, show
from llm_jax.evals.scorer import Scorer
from llm_jax.generate.engine import Engine
from llm_jax.sharding import xla_flags
from llm_jax.sharding.distributed import start_distributed
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig


def main() -> None:
    parser = flags.make_parser(
        "evaluate", "Perplexity and bits per byte on the held-out documents.", config=False
    )
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--batch_size", type=int, help="windows at a time; default: as in training")
    parser.add_argument(
        "--tasks", help="of lm-evaluation-harness, with commas: names or paths of YAML files"
    )
    parser.add_argument(
        "--num_fewshot", type=int, help="examples before each item; default: the task's"
    )
    parser.add_argument("--limit", type=int, help="items of each task; default: all")
    arguments = flags.parse(parser)
    _check(arguments)
    xla_flags.apply()
    start_distributed()
    choose = scoring_rules_for if arguments.tasks else rules_for
    # A task's figures are compared with those of others, who load the export: in float32.
    dtype = "float32" if arguments.tasks else None
    loaded = load_model(arguments.workdir, arguments.step, rules=choose, compute_dtype=dtype)
    rules = choose(loaded.run)
    shares = rules.shares("batch")
    batch_size = arguments.batch_size or -(-loaded.run.train.microbatch_size // shares) * shares
    if arguments.tasks:
        run_tasks(arguments, loaded, rules)
        return
    evaluation = evaluate(
        loaded.trained,
        loaded.tokenizer,
        loaded.run,
        rules,
        arguments.workdir,
        loaded.step,
        batch_size,
    )
    if evaluation is not None and not evaluation.summary:
        raise flags.RunError("; ".join(evaluation.problems))
    if evaluation is None:
        raise flags.RunError(
            f"{arguments.workdir} has no held-out documents: see data.held_out_fraction"
        )
    if jax.process_index() == 0:
        show(evaluation, Console())
        print(f"step {loaded.step}, {count(loaded.model):,} parameters")
        print(f"scores {evaluation.save(arguments.workdir)}")


def _check(arguments: argparse.Namespace) -> None:
    """Before anything is loaded."""
    if arguments.tasks is None:
        wrong = [name for name in ("num_fewshot", "limit") if getattr(arguments, name) is not None]
        if wrong:
            raise flags.RunError(f"--{wrong[0]} goes with --tasks")
        return
    if not _names(arguments.tasks):
        raise flags.RunError(f"--tasks {arguments.tasks!r} names no task")
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise flags.RunError(f"--{name} {value} must be at least {least}")
    if importlib.util.find_spec("lm_eval") is None:
        raise flags.RunError("--tasks needs lm-evaluation-harness: pip install 'llm_jax[eval]'")


def _names(tasks: str) -> list[str]:
    return [task.strip() for task in tasks.split(",") if task.strip()]


def run_tasks(arguments: argparse.Namespace, loaded: LoadedModel, rules: AxisRules) -> Path:
    """Tasks of the harness; writes its results, which `_results_path` names, and prints its table."""
    from llm_jax.evals import harness

    if jax.process_count() > 1:
        raise flags.RunError("tasks run in one process: with one, its devices are used together")
    rows = arguments.batch_size or rules.shares("batch") * 8
    length = min(loaded.run.data.sequence_length, 512)
    scorer = Scorer(loaded.model, rules, batch_tokens=rows * length)

    def make_engine() -> Engine:
        return Engine(loaded.model, loaded.tokenizer, max_length=scorer.max_length)

    model = harness.HarnessModel(scorer, make_engine, loaded.tokenizer)
    results = harness.run_tasks(
        model,
        _names(arguments.tasks),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
    )
    path = _results_path(arguments, loaded.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    harness.save(results, path)
    print(harness.table(results))
    if model.cut:
        print(f"{model.cut} requests were longer than the model and lost their left side")
    print(f"scores {path}")
    return path


def _results_path(arguments: argparse.Namespace, step: int) -> Path:
    """WORKDIR/evals/tasks_<step>_<tasks>[_<k>shot][_limit<n>].json: another question, another file."""
    tasks = "-".join(re.sub(r"\W+", "_", Path(name).stem) for name in _names(arguments.tasks))
    name = f"tasks_{step}_{tasks[:100]}"
    if arguments.num_fewshot is not None:
        name += f"_{arguments.num_fewshot}shot"
    if arguments.limit is not None:
        name += f"_limit{arguments.limit}"
    return arguments.workdir / "evals" / f"{name}.json"


def rules_for(run: RunConfig) -> AxisRules:
    """The mesh of training where the devices that are here make one, else all of them as "fsdp"."""
    try:
        rules = make_rules(run.mesh, make_mesh(run.mesh))
        rules.length_order(run.data.sequence_length)
        return rules
    except ValueError:
        return _in_shares()


def scoring_rules_for(run: RunConfig) -> AxisRules:
    """The same, but no activation is cut along a sequence: a Scorer's are of many lengths."""
    rules = rules_for(run)
    cut = rules.shares("length") > 1 or run.mesh.rules == "sequence"
    return _in_shares() if cut else rules


def _in_shares() -> AxisRules:
    mesh = MeshConfig(data=1, fsdp=-1)
    return make_rules(mesh, make_mesh(mesh))


def count(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


if __name__ == "__main__":
    flags.run_entry(main)
