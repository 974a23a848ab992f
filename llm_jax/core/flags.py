"""What the entry points share: flags, `--config.a.b=value` overrides, and errors in one line."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_jax.core.config import ConfigError, nearest

INTERRUPTED = 128 + signal.SIGINT


class RunError(RuntimeError):
    """Something went wrong in a run that the user can act on; the message is one line."""


def first_line(error: BaseException) -> str:
    """What an error says, or its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def make_parser(
    module: str, description: str, *, config: bool, workdir: bool = True
) -> argparse.ArgumentParser:
    """A parser with --workdir, and --config and --data for entries that read a config file.

    Args:
      workdir: whether there is a run to work on; without one there are neither --workdir nor --data.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m llm_jax.{module}",
        description=description,
        allow_abbrev=False,
        epilog="--config.section.key=value overrides any key of the config." if config else None,
    )
    if config:
        parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]",
                            help="experiment, e.g. configs/gpt_tiny.py")  # fmt: skip
    if config and workdir:
        parser.add_argument("--data", metavar="PATH_OR_ID", help="own text: a file, a folder, a glob, tfds:NAME, hf:ID or gs://...")  # fmt: skip
    if workdir:
        parser.add_argument("--workdir", required=True, type=Path, help="where the run lives")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses; `.overrides` holds the `--config.*` flags as "section.key=value".

    Raises:
      ConfigError: an unknown flag; suggests the nearest.
    """
    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = []
    rest = list(rest)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config.") or "config" not in arguments:
            known = [o for action in parser._actions for o in action.option_strings]
            raise ConfigError(
                f"unknown flag {flag!r}{nearest(flag.partition('=')[0], known)}; "
                f"flags: {', '.join(known)}"
            )
        override = flag.removeprefix("--config.")
        if "=" not in override:  # `--config.a.b value`
            if not rest:
                raise ConfigError(f"{flag} needs a value: {flag}=VALUE")
            override += "=" + rest.pop(0)
        arguments.overrides.append(override)
    return arguments


def run_entry(main: Callable[[], None]) -> None:
    """Runs an entry point; what a user caused ends in one line and exit status 1, not a traceback.

    Ctrl-C ends it with INTERRUPTED.

    A ValueError counts as the user's when this package raised it. LLM_JAX_TRACEBACK=1 shows all.
    """
    show_all = os.environ.get("LLM_JAX_TRACEBACK")
    if not show_all:
        # Orbax logs the traceback of a failed write before it raises what we then say in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`... | head`); keep the exit silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RunError, ValueError, OSError) as error:
        if show_all or not _for_the_user(error):
            raise
        sys.exit(f"error: {error}")


def _for_the_user(error: Exception) -> bool:
    if isinstance(error, ConfigError | RunError | OSError):
        return True
    package = str(Path(__file__).resolve().parents[1])
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(package)
