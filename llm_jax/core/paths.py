"""Parameters by their dotted paths, such as "stack.layers.attention.query"."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from llm_jax.core.config import ConfigError, nearest


def flat(tree: Mapping) -> dict[str, Any]:
    """The leaves of a nested dict by dotted path."""
    return {".".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def pick(tree: Mapping, paths: Iterable[str]) -> dict:
    """The nested dict of these leaves alone."""
    wanted = set(paths)
    leaves = flatten_dict(tree).items()
    return unflatten_dict({p: x for p, x in leaves if ".".join(map(str, p)) in wanted})


def matching(pattern: str, paths: Iterable[str], where: str) -> list[str]:
    """The paths that a shell pattern matches; `*` matches dots, too.

    Raises:
      ConfigError: it matches none; suggests the nearest that does.
    """
    paths = list(paths)
    found = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
    if found:
        return found
    parents = {path[:i] + ".*" for path in paths for i, c in enumerate(path) if c == "."}
    near = nearest(pattern, [*paths, *sorted(parents)])
    first = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths))
    raise ConfigError(f"{where} {pattern!r} matches no parameter{near}; they begin with: {first}")


def is_head(path: str) -> bool:
    """Whether a parameter belongs to what stands after the last block: heads and poolers."""
    return any("head" in part.split("_") or part == "pooler" for part in path.split("."))
