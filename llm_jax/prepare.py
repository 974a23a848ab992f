"""Tokenizes a corpus into shards once, before training: `python -m llm_jax.prepare --help`.

Training does the same by itself when shards are missing; this entry lets a machine without an
accelerator do it.
"""

from llm_jax.core import flags
from llm_jax.core.config import component
from llm_jax.data.config import load_with_data
from llm_jax.data.prepare import prepare
from llm_jax.data.progress import make_progress
from llm_jax.training.config import check_vocabulary, resolve


def main() -> None:
    parser = flags.make_parser("prepare", "Tokenizes a corpus into shards.", config=True)
    arguments = flags.parse(parser)
    config = load_with_data(arguments.config, arguments.overrides, arguments.data)
    run = resolve(config)
    examples = component("objectives", run.objective.name).make(run.objective).examples
    progress = make_progress()
    prepared = prepare(run.data, arguments.workdir, examples=examples, progress=progress)
    check_vocabulary(run, prepared.tokenizer.vocab_size)
    print("\n".join([f"tokenizer of {prepared.tokenizer.vocab_size} ids", *prepared.lines()]))
    print(f"in {prepared.folder}")


if __name__ == "__main__":
    flags.run_entry(main)
