"""Fits, how fast, how much: `python -m llm_jax.plan --config configs/gpt_1b.py --topology v5p:4x4x4`.

Compiles the very step that training would run, on any machine; `--help` says the rest. This process
starts no devices and loads no compiler, and imports nothing heavy before the flags are read.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from llm_jax.core import flags
from llm_jax.core.config import ConfigError

STATUSES = """Exit status: 0 if it fits (of several targets: one of them), 2 if it does not, 1 after an
error or an increase over --max_increase, 130 after Ctrl-C or SIGTERM, which keep what was there until then."""


def make_parser() -> argparse.ArgumentParser:
    parser = flags.make_parser("plan", "Says whether a training step fits, how fast it is, why, and what "
                               "training costs; needs no accelerator.", config=True, workdir=False)  # fmt: skip
    parser.epilog = f"{parser.epilog} {STATUSES}"
    parser.error = _refuse
    add = parser.add_argument
    add("--topology", type=_names, default=(), metavar="NAME[,NAME...]", help="TPU slices: v5p:4x4x4, v5e-16, 2xv6e-256; GPUs: h100-8, an estimate; or local: the devices of this machine")  # fmt: skip
    add("--tokens", metavar="N", help="to train on, for days and dollars: 300m, 20b, 1.5t")
    add("--price", type=float, metavar="DOLLARS", help="of a chip for an hour, instead of the dated list price")  # fmt: skip
    add("--search", action="store_true", help="try meshes, remat policies and microbatches on the slices named, or on all of at most --max_chips")  # fmt: skip
    add("--rank", choices=("time", "cost"), default="time", help="what the search is for")
    add("--max_chips", type=int, default=256, metavar="N", help="for a search without names (%(default)s)")  # fmt: skip
    add("--compiles", type=int, default=7, metavar="N", help="the most that a search compiles (%(default)s)")  # fmt: skip
    add("--jobs", type=int, default=2, metavar="N", help="compilations at a time (%(default)s)")
    add("--write_config", type=Path, metavar="FILE.py", help="where the search leaves the best, to train with")  # fmt: skip
    add("--compare", metavar="OTHER", help="a config file as it is, or this config at another commit: both side by side")  # fmt: skip
    add("--max_increase", default="", metavar="memory=5,time=5,communication=5", help="percent over OTHER that are not too much")  # fmt: skip
    add("--json", metavar="FILE", help="all figures; - for standard output")
    add("--html", type=Path, metavar="FILE", help="a page with pictures that needs nothing else")
    add("--cache", type=Path, metavar="DIR", help="of compiled steps (~/.cache/llm_jax/plans)")
    return parser


def main() -> None:
    # So that a CI job's time limit, too, ends the compilers and tidies up after them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = flags.parse(make_parser())
    _check(arguments)
    import jax

    # This process has no need of devices; those that compile choose for themselves.
    jax.config.update("jax_platforms", "cpu")
    from llm_jax.planner.answer import Question, answer
    from llm_jax.planner.compile import default_cache
    from llm_jax.planner.cost import check_price, parse_tokens

    check_price(arguments.price)
    arguments.tokens = parse_tokens(arguments.tokens) if arguments.tokens else None
    arguments.cache = arguments.cache or default_cache()
    sys.exit(answer(Question(**vars(arguments))))


def _check(arguments: argparse.Namespace) -> None:
    """What argparse cannot say: flags that need or exclude one another."""
    if not arguments.topology and not arguments.search:
        raise ConfigError("name a --topology, such as v5p:4x4x4 or local, or use --search")
    if arguments.compare and (arguments.search or len(arguments.topology) != 1):
        raise ConfigError("--compare needs one --topology, and no --search")
    if arguments.max_increase and not arguments.compare:
        raise ConfigError("--max_increase needs --compare OTHER")
    if arguments.write_config and not arguments.search:
        raise ConfigError("--write_config needs --search")
    if arguments.write_config and _is_config(arguments.write_config, arguments.config):
        raise ConfigError(
            f"--write_config {arguments.write_config}: it is the config to begin with"
        )
    if arguments.write_config and arguments.write_config.suffix != ".py":
        raise ConfigError(f"--write_config {arguments.write_config}: expected a .py file")
    ranks = arguments.search and arguments.rank == "cost"
    if arguments.price is not None and not (arguments.tokens or ranks):
        raise ConfigError("--price needs --tokens, or --search --rank cost")
    for name in ("write_config", "html", "json"):  # before anything takes its time
        path = getattr(arguments, name)
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {Path(path).parent}")
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"--{name} {path}: it is a folder; expected a file")
    for name in ("jobs", "compiles", "max_chips"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)} must be at least 1")


def _is_config(path: Path, config: str) -> bool:
    return path.resolve() == Path(config.partition(":")[0]).resolve()


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


if __name__ == "__main__":
    flags.run_entry(main)
