"""Evaluates checkpoints: `python -m llm_jax.evaluate --workdir runs/tiny [--step N]`.

With `--watch` every new one while a run trains, with `--tasks hellaswag,my_task.yaml` what
lm-evaluation-harness asks (extra `eval`), with `--compare RUN_A RUN_B` two runs beside each other.
"""

import argparse
import functools
import signal
import sys
from pathlib import Path

import jax
from rich.console import Console

from llm_jax.checkpoint.claims import PATIENCE
from llm_jax.checkpoint.load import choose_checkpoint
from llm_jax.core import flags
from llm_jax.core.config import ConfigError
from llm_jax.evals import harness
from llm_jax.evals.compare import compare
from llm_jax.evals.job import Job
from llm_jax.evals.show import show
from llm_jax.evals.watch import Watcher, measured, publish
from llm_jax.sharding import xla_flags
from llm_jax.sharding.distributed import start_distributed


def parser() -> argparse.ArgumentParser:
    p = flags.make_parser("evaluate", "Scores of a run's checkpoints.", config=False, workdir=False)
    p.add_argument("--workdir", type=Path, help="where the run lives")
    p.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    p.add_argument("--watch", action="store_true",
                   help="score each checkpoint that has no scores, until training has ended")  # fmt: skip
    p.add_argument("--once", action="store_true",
                   help="score those that are there and have no scores, then end: for cron")  # fmt: skip
    p.add_argument("--takeover_after", type=float, metavar="SECONDS",
                   help=f"another job that is silent for so long is dead; default: {PATIENCE:.0f}")  # fmt: skip
    p.add_argument("--config", metavar="FILE[:ARGUMENT]",
                   help="its section eval replaces the run's; --config.eval.KEY=VALUE sets a key")  # fmt: skip
    p.add_argument("--batch_size", type=int, help="windows at a time; default: as in training")
    p.add_argument("--tasks", metavar="NAME_OR_YAML,...", help="of lm-evaluation-harness")
    p.add_argument("--num_fewshot", type=int, help="examples before each item; default: the task's")
    p.add_argument("--limit", type=int, help="items of each task; default: all")
    p.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"),
                   help="two runs by their scores: workdirs, or DIR@STEP")  # fmt: skip
    return p


def main() -> None:
    arguments = flags.parse(parser())
    _check(arguments)
    if arguments.compare:
        width = None if sys.stdout.isatty() else 120
        compare(*arguments.compare, Console(width=width))
        return
    job = Job(
        arguments.workdir,
        _harness(arguments),
        arguments.batch_size,
        arguments.config,
        tuple(arguments.overrides),
    )
    xla_flags.apply()
    start_distributed()
    if arguments.watch or arguments.once:
        watch(job, once=arguments.once, patience=arguments.takeover_after or PATIENCE)
    elif job.harness is not None:
        ask_harness(job, arguments.step)
    else:
        score(job, arguments.step)


def _check(arguments: argparse.Namespace) -> None:
    """Before anything is loaded."""
    if (arguments.workdir is None) == (arguments.compare is None):
        raise flags.RunError("say what to evaluate: --workdir DIR, or --compare RUN_A RUN_B")
    watched, tasks = arguments.watch or arguments.once, arguments.tasks is not None
    alone = vars(arguments) | {"compare": None, "overrides": arguments.overrides or None}
    if arguments.compare and any(value not in (None, False) for value in alone.values()):
        raise flags.RunError("--compare takes two runs, DIR or DIR@STEP, and no other flag")
    needs = {
        "num_fewshot": ("--tasks", tasks),
        "limit": ("--tasks", tasks),
        "takeover_after": ("--watch or --once", watched),
        "step": ("one checkpoint: leave out --watch and --once", not watched),
    }
    for name, (other, given) in needs.items():
        if getattr(arguments, name) is not None and not given:
            raise flags.RunError(f"--{name} goes with {other}")
    for name in ("batch_size", "takeover_after"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise flags.RunError(f"--{name} {value} must be at least 1")


def _harness(arguments: argparse.Namespace) -> harness.Harness | None:
    if arguments.tasks is None:
        return None
    names = tuple(name.strip() for name in arguments.tasks.split(",") if name.strip())
    if not names:
        raise flags.RunError(f"--tasks {arguments.tasks!r} names no task")
    try:
        return harness.make(harness.Config(names, arguments.num_fewshot, arguments.limit))
    except ConfigError as error:
        raise flags.RunError(f"--{error}") from None


def watch(job: Job, *, once: bool, patience: float) -> None:
    """Scores checkpoints as they come; SIGTERM gives the step free that is being scored."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda _: None
    labels = () if job.harness is None else ("harness",)
    watcher = Watcher(job.workdir, job.score, say, patience=patience, labels=labels)
    watcher.run(once=once)
    if watcher.failed:
        steps = ", ".join(map(str, watcher.failed))
        raise flags.RunError(f"steps that could not be scored: {steps}")


def score(job: Job, step: int | None) -> None:
    """One checkpoint, with a table."""
    step = choose_checkpoint(job.workdir, step)[1]
    evaluation = measured(job.score(step), job.workdir)
    if jax.process_index() == 0:
        show(evaluation, Console())
        print(f"step {step}, scores {publish(job.workdir, evaluation)}")


def ask_harness(job: Job, step: int | None) -> None:
    """One checkpoint by the harness alone, in its own format and with its own table."""
    from llm_jax.evals import harness_model

    if jax.process_count() > 1:
        raise flags.RunError("tasks run in one process: with one, its devices are used together")
    results, cut, path = job.ask_harness(step)
    harness_model.save(results, path)
    print(harness_model.table(results))
    if cut:
        print(f"{cut} requests were longer than the model and lost their left side")
    print(f"scores {path}")


if __name__ == "__main__":
    flags.run_entry(main)
