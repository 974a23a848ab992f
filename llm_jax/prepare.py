"""Tokenizes a corpus into shards once, before training: `python -m llm_jax.prepare --help`.

Training does the same by itself when shards are missing; this entry lets a machine without an
accelerator do it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_jax.core.config import ConfigError, load
from llm_jax.data.config import DataConfig, resolve_data
from llm_jax.data.prepare import prepare
from llm_jax.data.progress import make_progress
from llm_jax.data.sources import source_for


def main(argv: Sequence[str] | None = None) -> int:
    flags, overrides = parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        data = data_config(flags.config, overrides, flags.data)
        prepared = prepare(data, flags.workdir, progress=make_progress())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"tokenizer of {prepared.tokenizer.vocab_size} ids", *prepared.lines()]))
    print(f"in {prepared.folder}")
    return 0


def data_config(config: str, overrides: Sequence[str], path: str | None) -> DataConfig:
    """The `data` section of a config file; `path` replaces its sources."""
    section = load(config, overrides).get("data")
    if path is not None:
        section.sources = (source_for(path),)
    return resolve_data(section)


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags and the overrides `--config.section.key=value`, the latter without their prefix."""
    parser = argparse.ArgumentParser("python -m llm_jax.prepare", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py with get_config()")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument(
        "--data", help="a file, folder, glob, URL, tfds:NAME or hf:ID to use instead"
    )
    prefix = "--config."
    overrides = [a.removeprefix(prefix) for a in argv if a.startswith(prefix)]
    return parser.parse_args([a for a in argv if not a.startswith(prefix)]), overrides


if __name__ == "__main__":
    sys.exit(main())
