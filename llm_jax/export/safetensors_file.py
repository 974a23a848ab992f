"""Safetensors written and read tensor by tensor, so that one at a time is in memory.

The package's own `save_file` wants all of a file at once. The format: eight bytes with the length of the header,
the header (JSON: name to dtype, shape and place), the tensors' little-endian bytes in a row. A folder has one
file, or several and an index, under the names that transformers looks for.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.export.slabs import slabs
from llm_jax.models.hf_tensors import INDEX, SINGLE, read_header

DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I32": np.int32, "I8": np.int8,
    "U8": np.uint8,
}  # fmt: skip


def tensor_kind(x: np.ndarray) -> str:
    """The key of DTYPES of an array."""
    return {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}[x.dtype]


class Spec(NamedTuple):
    """dtype: a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize * math.prod(self.shape)


class Item(NamedTuple):
    """Tensors that stay in one file. make: gives them, in the order of their specs."""

    specs: Sequence[Spec]
    make: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def write_folder(directory: Path, items: Sequence[Item], limit: int) -> int:
    """Writes the items into files of at most `limit` bytes, or one item; returns how many files."""
    shards = _shards(items, limit)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE if len(shards) == 1 else name
        specs = [spec for item in shard for spec in item.specs]
        tensors = itertools.chain.from_iterable(item.make() for item in shard)
        write_safetensors(directory / name, specs, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys((spec.name for spec in specs), name)
    if len(shards) > 1:
        size = sum(item.num_bytes for item in items)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _shards(items: Sequence[Item], limit: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    return shards


def write_safetensors(
    path: Path,
    specs: Sequence[Spec],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes the file and waits until it is on the disk.

    Args:
      tensors: one for each spec, in the same order, of its dtype and shape; asked for one at a time.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        tensors = iter(tensors)
        for spec in specs:
            tensor = next(tensors)
            if tensor.dtype != DTYPES[spec.dtype] or tensor.shape != spec.shape:
                raise ValueError(f"{spec} is not {tensor.dtype} {tensor.shape}")
            for slab in slabs(tensor):
                file.write(slab.reshape(-1).view(np.uint8).data)
            del tensor, slab  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


class Reader:
    """The tensors of a folder.

    Raises:
      ConfigError: a file that cannot be read.
    """

    def __init__(self, directory: Path):
        single = directory / SINGLE
        paths = [single] if single.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))
        if not paths:
            raise ConfigError(f"no {SINGLE} in {directory}")
        self._found = {spec.name: (path, spec, at) for path in paths for spec, at in _header(path)}

    def specs(self) -> set[Spec]:
        return {spec for _, spec, _ in self._found.values()}

    def read(self, name: str) -> np.ndarray:
        path, spec, begin = self._found[name]
        flat = np.fromfile(path, DTYPES[spec.dtype], math.prod(spec.shape), offset=begin)
        return flat.reshape(spec.shape)


def _header(path: Path) -> Iterator[tuple[Spec, int]]:
    """Each tensor of a file and its first byte there."""
    header, data = read_header(path)
    for name, tensor in header.items():
        if tensor["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: {name} is {tensor['dtype']}; choices: {', '.join(DTYPES)}")
        spec = Spec(name, tensor["dtype"], tuple(tensor["shape"]))
        yield spec, data + tensor["data_offsets"][0]
