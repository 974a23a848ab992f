"""Tokenizes a corpus into shards once, before training: `python -m llm_jax.prepare --help`.

Training does the same by itself when shards are missing; this entry lets a machine without an
accelerator do it.
"""

import argparse

from llm_jax.core import flags
from llm_jax.core.config import ConfigError, load
from llm_jax.data.config import DataConfig, resolve_data
from llm_jax.data.prepare import prepare
from llm_jax.data.progress import make_progress
from llm_jax.data.sources import source_for


def main() -> None:
    parser = flags.make_parser("prepare", "Tokenizes a corpus into shards.", config=True)
    arguments = flags.parse(parser)
    prepared = prepare(data_config(arguments), arguments.workdir, progress=make_progress())
    print("\n".join([f"tokenizer of {prepared.tokenizer.vocab_size} ids", *prepared.lines()]))
    print(f"in {prepared.folder}")


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The `data` section of the config file, with --data in place of its sources."""
    section = load(arguments.config, arguments.overrides).get("data")
    if section is None:
        raise ConfigError(f"{arguments.config} has no section data")
    if arguments.data is not None:
        section.sources = (source_for(arguments.data),)
    return resolve_data(section)


if __name__ == "__main__":
    flags.run_entry(main)
