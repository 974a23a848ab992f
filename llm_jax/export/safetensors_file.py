"""Writes a safetensors file tensor by tensor, so that one at a time is in memory.

The package's own `save_file` wants all of them at once. The format: eight bytes with the length of the header,
the header (JSON: name to dtype, shape and place), the tensors' little-endian bytes in a row.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I8": np.int8, "U8": np.uint8}


class Spec(NamedTuple):
    """dtype: a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize * math.prod(self.shape)


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
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            del tensor  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
