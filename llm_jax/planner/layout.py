"""How a step's arrays and mesh lie on the devices: what a planner must know before it reads HLO."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.planner.compiled import Argument, ArgumentKind, MeshAxis, Span
from llm_jax.training.program import Program

_KINDS: dict[str, ArgumentKind] = {
    "params": "parameter",
    "opt_state": "optimizer",
    "extra": "extra",
}


def arguments_of(program: Program) -> tuple[Argument, ...]:
    """Every array that `program.step` takes, in the order of the program's parameters."""
    leaves = jax.tree_util.tree_leaves_with_path
    shardings = jax.tree.leaves(program.state_shardings)
    found = [
        _argument(path, "state", leaf, sharding)
        for (path, leaf), sharding in zip(leaves(program.abstract_state), shardings, strict=True)
    ]
    found += [_argument(path, "batch", x, x.sharding) for path, x in leaves(program.batch_spec)]
    return tuple(found)


def _argument(path: tuple, tree: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Argument:
    keys = [_key(entry) for entry in path]
    kind = "batch" if tree == "batch" else _KINDS.get(keys[0], "other")
    shape, dtype = leaf.shape, leaf.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, leaf)
        shard, dtype = data.shape, data.dtype
        shape = data.shape
    else:
        shard = sharding.shard_shape(shape)
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    return Argument(
        path=".".join([tree, *keys] if tree == "batch" else keys),
        name=tree + jax.tree_util.keystr(path),
        kind=kind,
        shape=tuple(shape),
        dtype=np.dtype(dtype).name,
        spec=tuple(_axes(entry) for entry in spec[: len(shape)]),
        shard_shape=tuple(shard),
        bytes=math.prod(shard) * np.dtype(dtype).itemsize,
    )


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_axes(mesh: Mesh, wrap: Sequence[bool] = (False,) * 3) -> tuple[MeshAxis, ...]:
    """What each axis of a mesh runs over, from where its devices are.

    wrap: which dimensions of the torus close to a ring. GPUs of a host are behind a switch, where each
    can send all it has to any other: as good as a ring.
    """
    places = _places(mesh.devices)
    is_switched = mesh.devices.flat[0].platform == "gpu"
    flat = places.reshape(-1, _COLUMNS)
    whole = (np.ptp(flat[:, :3], axis=0) + 1).tolist()
    axes = []
    for number, name in enumerate(mesh.axis_names):
        lines = np.moveaxis(places, number, 0).reshape(places.shape[number], -1, _COLUMNS)
        spans = _spans(_slowest(lines), wrap, whole)
        if is_switched:
            spans = tuple(
                dataclasses.replace(s, ring=True, stride=1) if s.kind == "link" else s
                for s in spans
            )
        axes.append(MeshAxis(name, len(lines), spans))
    return tuple(axes)


def _slowest(lines: np.ndarray) -> np.ndarray:
    """Of lines [n, m, 5], one that crosses the most slices or hosts: a collective waits for it."""
    hosts = np.sort(lines[:, :, 4], axis=0)
    return lines[:, np.argmax(np.count_nonzero(np.diff(hosts, axis=0), axis=0))]


# Of a place: x, y and z on the torus or within the host, device of the chip, slice or process.
_COLUMNS = 5


def _places(devices: np.ndarray) -> np.ndarray:
    """[..., 5] integers."""
    ranks: dict[int, int] = {}  # of a device within its process
    in_process: dict[int, int] = collections.Counter()
    for device in sorted(devices.flat, key=lambda d: d.id):
        ranks[device.id] = in_process[device.process_index]
        in_process[device.process_index] += 1
    places = []
    for device in devices.flat:
        if getattr(device, "coords", None) is not None and device.platform == "tpu":
            core = getattr(device, "core_on_chip", None) or 0
            places.append((*device.coords, core, getattr(device, "slice_index", None) or 0))
        elif device.platform == "gpu":
            places.append((ranks[device.id], 0, 0, 0, device.process_index))
        else:
            places.append((0, 0, 0, ranks[device.id], device.process_index))
    return np.array(places).reshape(*devices.shape, _COLUMNS)


def _spans(line: np.ndarray, wrap: Sequence[bool], whole: Sequence[int]) -> tuple[Span, ...]:
    """Of the places along an axis, [n, 5]. whole: size of each dimension of the torus."""
    counts = [len(np.unique(line[:, column])) for column in range(_COLUMNS)]
    varying = [column for column in range(_COLUMNS) if counts[column] > 1]
    varying.sort(key=lambda column: -int(np.argmax(line[:, column] != line[0, column])))
    if math.prod(counts) == len(line):
        return tuple(_span(column, line[:, column], wrap, whole) for column in varying)
    # A line that turns corners: its chips are still neighbours, one after the other. Or one that crosses
    # hosts unevenly.
    apart = [_span(column, line[:, column], wrap, whole) for column in varying if column >= 3]
    chips = -(-len(line) // math.prod(span.size for span in apart))
    return (*apart, *([Span("link", 0, chips, False)] if chips > 1 else []))


def _span(column: int, places: np.ndarray, wrap: Sequence[bool], whole: Sequence[int]) -> Span:
    size = len(np.unique(places))
    if column >= 3:
        return Span("core" if column == 3 else "network", 0, size, False)
    stride = round(np.ptp(places) / (size - 1))
    return Span("link", column, size, bool(wrap[column]) and size * stride == whole[column], stride)
