"""`python -m llm_jax.export --workdir DIR --format hf --out OUT`: a trained model for other programs.

`--verify OUT` checks what lies in a folder against its certificate, without the run.
"""

import argparse
import functools
from pathlib import Path

from llm_jax.checkpoint.load import load_model
from llm_jax.core.config import component, parse, set_override
from llm_jax.core.flags import RunError, make_parser, run_entry
from llm_jax.core.flags import parse as parse_flags
from llm_jax.export import certificate
from llm_jax.export.certificate import Exporter
from llm_jax.export.certified import export_certified
from llm_jax.export.probes import host
from llm_jax.sharding import xla_flags
from llm_jax.sharding.mesh import MeshConfig, make_mesh


def main() -> None:
    arguments = parse_flags(_parser())
    _check(arguments)
    xla_flags.apply()
    if arguments.verify is not None:
        content = certificate.verify(arguments.verify)
        print(f"{arguments.verify} is what was certified: {certificate.summary(content)}")
        return
    exporter = _exporter(arguments.format, arguments.option)
    device = host()
    load = functools.partial(
        load_model,
        arguments.workdir,
        arguments.step,
        mesh=None if device is None else make_mesh(MeshConfig(), [device]),
        compute_dtype="float32",
    )
    # Where the run's data and scores are, if its folder of checkpoints was given.
    workdir = arguments.workdir
    workdir = workdir if (workdir / "checkpoints").is_dir() else workdir.parent
    path = export_certified(exporter, load, arguments.out, workdir=workdir)
    print(f"exported to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "export", "Writes a trained model for other programs.", config=False, workdir=False
    )
    parser.add_argument("--workdir", type=Path, help="where the run lives")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--format", default="hf", help="see docs/export.md; hf by default")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="of the format; may come several times")  # fmt: skip
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--verify", type=Path, metavar="FOLDER",
                        help="check an export against its certificate instead")  # fmt: skip
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.verify is not None:
        other = {"--workdir": arguments.workdir, "--out": arguments.out, "--step": arguments.step}
        given = [flag for flag, value in other.items() if value is not None]
        if given or arguments.option:
            raise RunError(
                f"--verify takes no {(given or ['--option'])[0]}: it needs the folder only"
            )
        return
    for flag in ("workdir", "out"):
        if getattr(arguments, flag) is None:
            raise RunError(f"--{flag} is missing: an export needs --workdir and --out")


def _exporter(name: str, options: list[str]) -> Exporter:
    module = component("export", name)
    section = {}
    for option in options:
        set_override(section, option)
    if "name" in section:
        raise RunError("--option name: the format is --format's")
    return module.make(parse(module.Config, section, f"--option of {name}"))


if __name__ == "__main__":
    run_entry(main)
