"""Perplexity of a checkpoint: `python -m llm_jax.evaluate --workdir runs/tiny [--step N]`."""

import jax
from flax import nnx
from rich.console import Console

from llm_jax.checkpoint.load import load_model
from llm_jax.core import flags
from llm_jax.evals.conclude import evaluate, show
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
    arguments = flags.parse(parser)
    xla_flags.apply()
    start_distributed()
    loaded = load_model(arguments.workdir, arguments.step, rules=rules_for)
    rules = rules_for(loaded.run)
    shares = rules.shares("batch")
    batch_size = arguments.batch_size or -(-loaded.run.train.microbatch_size // shares) * shares
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


def rules_for(run: RunConfig) -> AxisRules:
    """The mesh of training where the devices that are here make one, else all of them as "fsdp"."""
    try:
        rules = make_rules(run.mesh, make_mesh(run.mesh))
        rules.length_order(run.data.sequence_length)
        return rules
    except ValueError:
        mesh = MeshConfig(data=1, fsdp=-1)
        return make_rules(mesh, make_mesh(mesh))


def count(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


if __name__ == "__main__":
    flags.run_entry(main)
