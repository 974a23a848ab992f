"""Hugging Face folders, read: config.json and safetensors, in one file or many.

What a folder holds is said by the table of its model family, models/<family>/hf.py. Unusual: no tensor
stays in the host's memory. Each is read, cut and written into its place on the devices that hold it, so
that memory grows by the model and one tensor. Neither torch nor transformers is needed.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding, SingleDeviceSharding

from llm_jax import models
from llm_jax.core.config import ConfigError, component
from llm_jax.core.types import Model
from llm_jax.models.hf_table import Architecture, Entry, Family, Plan, Row
from llm_jax.models.hf_tensors import Tensors
from llm_jax.nn.precision import ComputeDtype, Precision


def load(
    directory: Path,
    *,
    compute_dtype: ComputeDtype = "float32",
    device: jax.Device | None = None,
) -> tuple[Model, Any]:
    """(model, its Config) of a folder with config.json and safetensors, e.g. a download of GPT-2.

    Parameters become float32, whatever they are stored in.

    Args:
      device: where they go; None: the default one.

    Raises:
      ConfigError: an architecture or option that we cannot compute; no safetensors; tensors that
        are missing, extra or misshapen, with their names.
    """
    source = Source.of(directory)

    def reader(plan: Plan) -> Callable[[str], np.ndarray]:
        tensors = Tensors(source.directory, plan)
        tensors.check()
        return tensors.read

    model = build(
        source.family, source.architecture, source.config, reader,
        compute_dtype=compute_dtype, device=device,
    )  # fmt: skip
    return model, source.config


def build(
    family: Family,
    architecture: Architecture,
    config: Any,
    reader: Callable[[Plan], Callable[[str], np.ndarray]],
    *,
    compute_dtype: ComputeDtype = "float32",
    device: jax.Device | None = None,
) -> Model:
    """The model of this config with the tensors that `reader(plan)` gives by their Hugging Face names.

    Args:
      reader: what it returns is asked for every tensor of the plan once, in turn.
      device: where parameters go; None: the default one.
    """
    device = device or jnp.zeros(()).device
    precision = Precision.on(device.platform, compute_dtype)
    graphdef, params, extra = _abstract(config, precision)
    shapes = _shapes(params)
    plan = Plan.of(architecture, family.sizes(config), shapes)
    places = dict.fromkeys(shapes, SingleDeviceSharding(device))
    arrays = _assembled(plan, places, reader(plan), plan.entries)
    return nnx.merge(graphdef, nnx.State(unflatten_dict(arrays, sep=".")), extra)


def load_config(directory: Path) -> Any:
    """The model's Config of a folder's config.json.

    Raises:
      ConfigError: an architecture or option that we cannot compute.
    """
    return Source.of(directory).config


def load_params(directory: Path, config: Any, shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters to start training from.

    Args:
      config: of the model that is to have them. It computes what the folder's does; what changes
        only training, such as dropout, is free, and so is what the family's table calls a head.
      shardings: a Sharding for each parameter, in nested dicts as TrainState.params.

    Returns:
      Nested dicts of float32 arrays with these shardings. They lack what is to be initialized: heads
      that the folder does not have.

    Raises:
      ConfigError: as of `load`; a field of the config by which it computes something else.
    """
    source = Source.of(directory)
    _, params, _ = _abstract(config, Precision())
    architecture = source.architecture_for(config)
    plan = Plan.of(architecture, source.family.sizes(config), _shapes(params))
    places = flatten_dict(shardings, sep=".")
    tensors = Tensors(source.directory, plan)
    absent = tensors.check(fresh_heads=True)
    entries = [entry for entry in plan.entries if entry.name not in absent]
    return unflatten_dict(_assembled(plan, places, tensors.read, entries), sep=".")


@dataclasses.dataclass(frozen=True)
class Source:
    """What config.json says."""

    directory: Path
    family: Family
    architecture: Architecture
    config: Any

    @classmethod
    def of(cls, directory: Path) -> "Source":
        directory = Path(directory)
        path = directory / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no config.json in {directory}: not a Hugging Face model") from None
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds {type(content).__name__}, not keys and values")
        return cls.of_content(directory, content)

    @classmethod
    def of_content(cls, directory: Path, content: Mapping[str, Any]) -> "Source":
        """The same of a config.json that has been read."""
        for family in families().values():
            if content.get("model_type") in family.model_types:
                config = family.config_from_hf(content)
                return cls(directory, family, family.architecture_of(content), config)
        choices = ", ".join(name for f in families().values() for name in f.model_types)
        raise ConfigError(
            f"{directory / 'config.json'}: model_type {content.get('model_type')!r} cannot be read; "
            f"choices: {choices}"
        )

    def architecture_for(self, config: Any) -> Architecture:
        """Of a model that is to start from this one; ConfigError where it computes otherwise."""
        if not isinstance(config, self.family.config):
            raise ConfigError(
                f"{self.directory} holds {self.architecture.class_name}, which is "
                f"model.name = {self.family.name!r}, not {config.name!r}"
            )
        architecture = self.architecture
        if architecture.obstacles(config):
            architecture = self.family.architecture_for(config)
        differences = self.family.differences(architecture, config, self.config)
        if differences:
            found = ", ".join(
                f"model.{k} = {a!r} (it has {b!r})" for k, (a, b) in differences.items()
            )
            raise ConfigError(f"the model computes something else than {self.directory}: {found}")
        return architecture


@functools.cache
def families() -> dict[str, Family]:
    """The families that have a table, by the name of their model."""
    packages = (
        m.name for m in pkgutil.iter_modules(models.__path__, f"{models.__name__}.") if m.ispkg
    )
    modules = (f"{package}.hf" for package in packages)
    found = [importlib.import_module(m).FAMILY for m in modules if importlib.util.find_spec(m)]
    return {family.name: family for family in found}


def _abstract(config: Any, precision: Precision) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    make = component("models", config.name).make
    abstract = nnx.eval_shape(lambda: make(config, precision=precision, rngs=nnx.Rngs(0)))
    return nnx.split(abstract, nnx.Param, ...)


def _shapes(params: nnx.State) -> dict[str, tuple[int, ...]]:
    return {k: x.shape for k, x in flatten_dict(nnx.to_pure_dict(params), sep=".").items()}


def _assembled(
    plan: Plan,
    places: Mapping[str, Sharding],
    read: Callable[[str], np.ndarray],
    entries: Iterable[Entry],
) -> dict[str, jax.Array]:
    """Our parameters by dotted path, of these entries' tensors."""
    by_row: dict[Row, list[Entry]] = {}
    for entry in entries:
        by_row.setdefault(entry.row, []).append(entry)
    arrays: dict[str, jax.Array] = {}
    for row, of_row in by_row.items():
        pieces = {p: _Pieces(plan.shapes[p], places[p]) for p in row.paths.split()}
        for entry in of_row:
            for path, part in plan.from_hf(entry, read(entry.name)).items():
                pieces[path].put(entry.index, part)
        arrays |= {path: piece.array() for path, piece in pieces.items()}
    return arrays


class _Pieces:
    """One parameter in the making: what each of this process's devices holds of it."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding):
        self._shape, self._sharding = shape, sharding
        indices = sharding.addressable_devices_indices_map(shape)
        self._ranges = {
            device: [range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
            for device, index in indices.items()
        }
        self._held: dict[jax.Device, jax.Array] = {}

    def put(self, index: tuple[int, ...], part: np.ndarray) -> None:
        """Writes one layer, or one expert of it, or, with the index (), everything."""
        depth = len(index)
        for device, ranges in self._ranges.items():
            if any(i not in held for i, held in zip(index, ranges, strict=False)):
                continue
            mine = part[tuple(slice(r.start, r.stop) for r in ranges[depth:])]
            mine = jax.device_put(np.ascontiguousarray(mine, np.float32), device)
            if depth:
                start = [i - held.start for i, held in zip(index, ranges, strict=False)]
                start = np.array(start + [0] * mine.ndim, np.int32)
                if device not in self._held:
                    shape = tuple(map(len, ranges))
                    self._held[device] = jnp.zeros(shape, jnp.float32, device=device)
                mine = _write(self._held[device], mine.reshape((1,) * depth + mine.shape), start)
            self._held[device] = mine
        # Else tensors would wait for the devices in the host's memory.
        jax.block_until_ready(list(self._held.values()))

    def array(self) -> jax.Array:
        held = list(self._held.values())
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, held)


@functools.partial(jax.jit, donate_argnums=0)
def _write(held: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(held, piece, start)
