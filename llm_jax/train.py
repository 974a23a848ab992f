"""Trains a model: `python -m llm_jax.train --config configs/gpt_tiny.py --workdir runs/tiny`.

The same command again goes on where the run stopped.
"""

import functools
import sys
from pathlib import Path

import jax

from llm_jax.checkpoint.begin import final_model, restore_or_init
from llm_jax.checkpoint.manager import Checkpointer, RunFiles, read_folder
from llm_jax.core import flags
from llm_jax.core.config import to_dict
from llm_jax.data.config import load_with_data
from llm_jax.data.pipeline import Loader, make_loader
from llm_jax.data.prepare import Prepared, prepare
from llm_jax.data.progress import Silent, make_progress
from llm_jax.evals.conclude import conclude
from llm_jax.evals.evaluation import ask, make_tasks
from llm_jax.metrics.scores import forget_scores
from llm_jax.metrics.writer import MetricWriter
from llm_jax.planner.explain import check_state, out_of_memory, show_step
from llm_jax.sharding import xla_flags
from llm_jax.sharding.distributed import start_distributed
from llm_jax.sharding.mesh import make_mesh
from llm_jax.sharding.place import row_share
from llm_jax.training.config import RunConfig, check_vocabulary, resolve
from llm_jax.training.guard import EXIT_STATUS, lock_workdir, on_first_process
from llm_jax.training.introduce import introduce
from llm_jax.training.loop import Loop
from llm_jax.training.peers import watching
from llm_jax.training.program import Program, build_program


def main() -> None:
    parser = flags.make_parser("train", __doc__.splitlines()[0], config=True)
    parser.add_argument("--explain_step", action="store_true",
                        help="first print memory, time and communication of the step on these devices")  # fmt: skip
    arguments = flags.parse(parser)
    run = resolve(load_with_data(arguments.config, arguments.overrides, arguments.data))
    xla_flags.apply()
    start_distributed(peer_timeout=run.train.peer_timeout)
    workdir = arguments.workdir
    with watching(run.train.peer_timeout, workdir / "checkpoints"), lock_workdir(workdir):
        try:
            title = Path(arguments.config).stem
            stopped_by = train(run, workdir, title, explain=arguments.explain_step)
        except jax.errors.JaxRuntimeError as error:
            raise out_of_memory(error, run) or error from None
    if stopped_by:
        sys.exit(EXIT_STATUS.get(stopped_by, 1))


def train(run: RunConfig, workdir: Path, title: str, *, explain: bool = False) -> str | None:
    """Runs the experiment to its end, from its newest checkpoint. Returns the signal that ended it."""
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else lambda _: None
    program = build_program(run, make_mesh(run.mesh))
    introduce(run, program, say)
    check_state(program)
    if explain and first:
        show_step(program, run)
    tasks = make_tasks(run.eval.tasks)  # what is wrong with them is said before anything is done
    prepared = prepare_together(run, workdir, examples=program.objective.examples)
    for line in prepared.lines():
        say(line)
    check_vocabulary(run, prepared.tokenizer.vocab_size)
    loaders = functools.partial(open_loader, run, program, prepared, workdir)
    loader = loaders("train", run.train.batch_size)
    checkpointer = Checkpointer(workdir / "checkpoints", run.checkpoint, say=say)
    state, stopping = restore_or_init(run, program, loader, checkpointer, say)
    if first:
        forget_scores(workdir, after=int(state.step))
    files = functools.partial(
        RunFiles, to_dict(run), tokenizer=read_folder(prepared.folder / "tokenizer")
    )
    writer = MetricWriter(
        workdir, num_steps=run.train.num_steps, start_step=int(state.step), enabled=first
    )
    with writer:
        loop = Loop(
            run,
            program,
            loader,
            checkpointer,
            writer,
            files=lambda loader_state: files(loader=loader_state),
            held_out=lambda: loaders("held_out", run.train.microbatch_size),
            ask=lambda step, state: ask(
                tasks,
                step,
                program.model(state),
                prepared.tokenizer,
                run,
                program.rules,
                writer.message,
            ),
            stopping=stopping,
        )
        outcome = loop.fit(state)
    epochs = loader.epochs()
    for line in loader.problems() if run.data.mode == "stream" else ():
        say(line)  # shards told theirs when they were made
    loader.close()
    if outcome.stopped_by:
        say(f"stopped by {outcome.stopped_by}, saved at step {loop.last_saved}; run again to go on")
        checkpointer.close()
        return outcome.stopped_by
    model, step = final_model(outcome, program, checkpointer, say)
    checkpointer.close()
    conclude(
        model, prepared, run, program.rules, workdir, title=title, step=step, epochs=epochs,
        tasks=tasks,
    )  # fmt: skip
    return None


def open_loader(
    run: RunConfig, program: Program, prepared: Prepared, workdir: Path, split: str, batch_size: int
) -> Loader:
    """The batches of a split: this process's share of them."""
    share = row_share(program.rules, batch_size)
    return make_loader(
        run.data,
        workdir=workdir,
        tokenizer=prepared.tokenizer,
        objective=program.objective,
        batch_size=batch_size,
        split=split,
        process_index=share.index,
        process_count=share.count,
    )


def prepare_together(run: RunConfig, workdir: Path, *, examples: bool) -> Prepared:
    """Process 0 makes tokenizer and shards; the others find them made."""
    make = functools.partial(prepare, run.data, workdir, examples=examples)
    prepared = on_first_process(lambda: make(progress=make_progress()))
    return prepared or make(progress=Silent())


if __name__ == "__main__":
    flags.run_entry(main)
