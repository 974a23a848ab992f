"""The tensors of a Hugging Face folder, by the names of a table.

Names may be those of older checkpoints, lack the prefix of the headless class, and stand for tensors
that are tied: see models/hf_table.Architecture. Files are read, not mapped, since mapped pages count as
the process's memory too. Pickles are never read: they run code.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llm_jax.core.config import ConfigError
from llm_jax.models.hf_table import Architecture, Plan

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
_COMPARED = 2**22  # numbers at a time


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies. name: in the file; begin: its first byte there."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def numbers(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """All, or a stretch of them, flat, float32."""
        dtype = np.dtype(_DTYPES[self.dtype])
        count = math.prod(self.shape) - first if count is None else count
        offset = self.begin + first * dtype.itemsize
        return np.fromfile(self.path, dtype, count, offset=offset).astype(np.float32, copy=False)


class Tensors:
    """What a folder has for a plan, read one by one.

    Raises:
      ConfigError: no safetensors, a file that cannot be read, or a tensor that differs from the one
        that config.json ties it to.
    """

    def __init__(self, directory: Path, plan: Plan):
        self._directory, self._plan = directory, plan
        architecture = plan.architecture
        self._shapes = {entry.name: entry.shape for entry in plan.entries}
        known = self._shapes.keys() | architecture.copies.keys()
        self._found: dict[str, _Stored] = {}
        for path in _files(directory):
            for stored in _stored(path):
                name = _known_name(stored.name, architecture, known)
                if name is not None:
                    self._found[name] = stored
        for name, original in architecture.copies.items():
            if name in self._found and name not in self._shapes:
                self._take_copy(name, original)

    def _take_copy(self, name: str, original: str) -> None:
        if original not in self._found and original in self._shapes:
            self._found[original] = self._found.pop(name)
            return
        if original in self._found and not _equal(self._found.pop(name), self._found[original]):
            raise ConfigError(
                f"{self._directory}: {name} differs from {original}, and config.json ties them"
            )

    def read(self, name: str) -> np.ndarray:
        stored = self._found[name]
        return stored.numbers().reshape(stored.shape)

    def stretch(self, name: str, first: int, count: int) -> np.ndarray:
        """`count` of its numbers, flat."""
        return self._found[name].numbers(first, count)

    def check(self, *, fresh_heads: bool = False) -> set[str]:
        """Names of the plan that are not there; with `fresh_heads` heads may be.

        Raises:
          ConfigError: tensors that are missing, extra or misshapen, or not of floating-point numbers.
        """
        prefix, heads = self._plan.architecture.prefix, self._plan.architecture.heads
        is_head = lambda n: heads and (re.fullmatch(heads, n) or re.fullmatch(heads, prefix + n))  # noqa: E731
        absent = {name for name in self._shapes if name not in self._found}
        missing = [n for n in self._shapes if n in absent and not (fresh_heads and is_head(n))]
        extra = [n for n in self._found if n not in self._shapes and not is_head(n)]
        there = {name: self._found[name] for name in self._shapes if name not in absent}
        misshapen = [
            f"{name} is {stored.shape}, not {self._shapes[name]}"
            for name, stored in there.items()
            if stored.shape != self._shapes[name]
        ]
        kinds = {"missing": missing, "extra": extra, "shape of": misshapen}
        wrong = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
        if wrong:
            raise ConfigError(
                f"{self._directory} does not fit {self._plan.architecture.class_name} of its "
                f"config.json: {'; '.join(wrong)}"
            )
        for stored in there.values():
            if stored.dtype not in _DTYPES:
                raise ConfigError(
                    f"{stored.name} is stored as {stored.dtype}; choices: {', '.join(_DTYPES)}"
                )
        return absent


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _known_name(name: str, architecture: Architecture, known: set[str]) -> str | None:
    """The table's name of a tensor in a file; None for what is no parameter."""
    for pattern, replacement in architecture.renames:
        name = re.sub(pattern, replacement, name)
    prefix = architecture.prefix
    if architecture.skipped and re.fullmatch(architecture.skipped, name.removeprefix(prefix)):
        return None
    return prefix + name if name not in known and prefix + name in known else name


def _equal(a: _Stored, b: _Stored) -> bool:
    """Piece by piece: whole embeddings may be the largest tensors of a model."""
    size = math.prod(a.shape)
    return a.shape == b.shape and all(
        np.array_equal(*(x.numbers(i, min(_COMPARED, size - i)) for x in (a, b)), equal_nan=True)
        for i in range(0, size, _COMPARED)
    )


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors file by tensor, and the byte at which its data begin.

    Raises:
      ConfigError: no such file, or one that is damaged.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # the header is sound, and the file as long as it says
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _stored(path: Path) -> Iterator[_Stored]:
    header, data = read_header(path)
    for name, tensor in sorted(header.items()):
        begin = data + tensor["data_offsets"][0]
        yield _Stored(path, name, tensor["dtype"], tuple(tensor["shape"]), begin)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        raise ConfigError(_no_tensors(directory))
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{index} has no weight_map") from None
    names = weight_map.values() if isinstance(weight_map, Mapping) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{index}: weight_map = {weight_map!r}: expected names and files")
    files = [directory / name for name in sorted(set(names))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"{directory} lacks {_some(missing)}, which {INDEX} names")
    return files


def _no_tensors(directory: Path) -> str:
    patterns = ("pytorch_model*.bin", "consolidated*.pth", "model*.pt", "model*.pth")
    pickles = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    if not pickles:
        return f"no {SINGLE} and no {INDEX} in {directory}: no other format is read"
    return (
        f"{directory} has its weights as pickles only ({_some(pickles, 3)}), which may run any code "
        'when they are read: where you trust them, python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{directory}').save_pretrained('NEW_FOLDER')\" "
        f"writes {SINGLE}"
    )
