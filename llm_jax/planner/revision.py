"""Plans of other versions of this code: read from JSON, or made by a commit's own planner.

Another version may know more or fewer fields: what is unknown is left out, what is missing takes its
default, and where it has none the plan cannot be read.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.planner.plan import Plan

# What the planner's exit status says: done, and done but it does not fit.
_ANSWERS = (0, 2)


def plan_from_dict(content: Mapping[str, Any]) -> Plan:
    """The plan of `Plan.to_dict`, also after JSON.

    Raises:
      ConfigError: a field is missing.
    """
    return _build(Plan, content, "plan")


def other_commit(
    ref: str,
    config: str,
    overrides: Sequence[str],
    target: str,
    arguments: Sequence[str] = (),
    *,
    folder: Path | None = None,
) -> Plan:
    """The plan that another commit makes, by its own planner from its own files.

    Args:
      ref: what git takes for a commit.
      config: FILE[:ARGUMENT]; the commit's own file of that name where it has one, else the one here.
      overrides: "section.key=value".
      arguments: further flags of `python -m llm_jax.plan`.
      folder: in the repository; by default the current one.

    Raises:
      ConfigError: no such commit, or one without a planner.
      RunError: its planner fails.
    """
    folder = folder or Path.cwd()
    root, commit = _resolve(ref, folder)
    with tempfile.TemporaryDirectory(prefix="llm_jax_plan_") as temporary:
        tree = Path(temporary) / "tree"
        _export(root, commit, tree, ref)
        command = [
            sys.executable, "-m", "llm_jax.plan",
            "--config", _config_in(tree, root, folder, config), "--topology", target,
            *(f"--config.{override}" for override in overrides), *arguments,
        ]  # fmt: skip
        try:
            return plan_from_dict(_answer(command, tree, Path(temporary) / "plan.json"))
        except RunError as error:
            raise RunError(
                f"--compare {ref!r}: the planner of commit {commit[:12]} failed: {error}"
            ) from None


def _answer(command: Sequence[str], tree: Path, file: Path) -> Mapping[str, Any]:
    """What a planner writes as JSON; RunError with its last line where it does not."""
    done = subprocess.run(
        [*command, "--json", str(file)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in _ANSWERS and file.is_file():
        return _one_plan(json.loads(file.read_text()))
    said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    raise RunError(said.splitlines()[-1])


def _resolve(ref: str, folder: Path) -> tuple[Path, str]:
    """(root of the repository, full hash)."""
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        raise ConfigError(
            f"--compare {ref!r}: no config file of that name, and {folder} is in no git repository"
        )
    # With --end-of-options, what starts with a dash is a name that does not exist, not a flag.
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    if commit is None:
        raise ConfigError(
            f"--compare {ref!r}: no config file of that name, and no commit of {root.decode().strip()}"
        )
    return Path(root.decode().strip()), commit.decode().strip()


def _export(root: Path, commit: str, tree: Path, ref: str) -> None:
    archive = _git(root, "archive", "--format=tar", commit)
    if archive is None:
        raise RunError(f"git cannot export commit {commit[:12]} of {root}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tree, filter="data")
    if not (tree / "llm_jax" / "plan.py").is_file():
        raise ConfigError(
            f"--compare {ref!r}: commit {commit[:12]} has no planner (llm_jax/plan.py)"
        )


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _config_in(tree: Path, root: Path, folder: Path, config: str) -> str:
    file, colon, argument = config.partition(":")
    path = (folder / file).resolve()
    if path.is_relative_to(root.resolve()):
        own = tree / path.relative_to(root.resolve())
        path = own if own.is_file() else path
    return f"{path}{colon}{argument}"


def _one_plan(content: Any) -> Mapping[str, Any]:
    """Of a file that holds one plan or several."""
    plans = content.get("plans", content) if isinstance(content, Mapping) else content
    return plans[0] if isinstance(plans, list) else plans


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_build(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(hint):
        hints, fields = typing.get_type_hints(hint), dataclasses.fields(hint)
        for field in fields:
            if field.name not in value and field.default is dataclasses.MISSING:
                raise ConfigError(f"{where} lacks {field.name}: it is of another version")
        known = {field.name for field in fields} & set(value)
        return hint(**{n: _build(hints[n], value[n], f"{where}.{n}") for n in known})
    return dict(value) if isinstance(value, Mapping) else value
