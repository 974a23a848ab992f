"""Hugging Face folders, written and read: safetensors, config.json, tokenizer files.

What they hold is said by one table per model family, `llm_jax/models/<family>/hf.py`. What is unusual:
an export is read back and compared bit for bit before it gets its name, so a folder that exists is
whole and right; and neither direction holds more than the model and one file's worth of tensors.
Neither torch nor transformers is needed.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax import models
from llm_jax.checkpoint.manager import tree_differences
from llm_jax.core.config import ConfigError, component
from llm_jax.core.flags import RunError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.nn.precision import ComputeDtype, Precision
from llm_jax.sharding.rules import path_name
from llm_jax.training.config import RunConfig, check_vocabulary

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclasses.dataclass(frozen=True)
class Config:
    """shard_bytes: limit of one file; a tensor above it has a file of its own."""

    name: str = "hf"
    shard_bytes: int = 4 * 10**9


class HuggingFaceExporter:
    """An Exporter for `transformers`: 5.x, and the later 4.x."""

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        self.config, self._say = config, say

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes a folder for `from_pretrained`, in float32.

        Args:
          model: with its layers stacked, as training and `load_model` have them.
          directory: absent or empty.

        Raises:
          ConfigError: no Hugging Face architecture fits, the folder is not empty, or the tokenizer
            has more ids than the model.
          RunError: what was written does not read back as it was.
        """
        directory = Path(directory).resolve()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{directory} is there and not empty: choose another folder")
        if not hasattr(tokenizer, "save_huggingface"):
            raise ConfigError(f"{type(tokenizer).__name__} cannot be written for Hugging Face")
        check_vocabulary(config, tokenizer.vocab_size)
        family = _family(config.model.name)
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        try:
            temporary.mkdir(parents=True)
            tokenizer.save_huggingface(temporary)
            _write_configs(temporary, family, config.model, tokenizer)
            plan = _Plan.of(family, config.model, jax.device_get(_params(model)))
            files = _write_tensors(temporary, plan, self.config.shard_bytes)
            _verify(temporary, plan)
            os.replace(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        count = sum(math.prod(entry.shape) for entry in plan.entries)
        self._say(f"verified: {count:,} parameters in {files} file(s), read back bit for bit")
        return directory


def make(
    config: Config | None = None, *, say: Callable[[str], None] = print
) -> HuggingFaceExporter:
    return HuggingFaceExporter(config or Config(), say=say)


def load(directory: Path, *, compute_dtype: ComputeDtype = "float32") -> tuple[Model, Any]:
    """(model, its Config) of a folder with config.json and safetensors, e.g. a download of GPT-2.

    Parameters become float32 on the default device, whatever they are stored in.

    Raises:
      ConfigError: an architecture or option that we cannot compute; no safetensors; tensors that
        are missing, extra or misshapen, with their names.
    """
    directory = Path(directory)
    family, config = _read_config(directory)
    precision = Precision.on(jax.default_backend(), compute_dtype)
    make_model = component("models", config.name).make
    abstract = nnx.eval_shape(lambda: make_model(config, precision=precision, rngs=nnx.Rngs(0)))
    graphdef, _, extra = nnx.split(abstract, nnx.Param, ...)
    plan = _Plan.of(family, config, _params(abstract))
    params = {path: jnp.asarray(array) for path, array in _read_tensors(directory, plan)}
    return nnx.merge(graphdef, nnx.State(unflatten_dict(params, sep=".")), extra), config


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of Hugging Face: a row of the table at one layer."""

    row: Any
    layer: Any  # an index into the stacked parameters; ... for what is not stacked
    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What goes where. params: host arrays to write, or shapes to read, by dotted path."""

    family: ModuleType
    config: Any
    params: Mapping[str, Any]
    entries: tuple[_Entry, ...]

    @classmethod
    def of(cls, family: ModuleType, config: Any, params: Mapping[str, Any]) -> "_Plan":
        """Raises ValueError where a parameter has no row in the architecture's table."""
        architecture, sizes = family.architecture_for(config), family.sizes(config)
        rows = [row for row in architecture.tensors if params.keys() >= set(row.paths.split())]
        left = params.keys() - {path for row in rows for path in row.paths.split()}
        if left:
            raise ValueError(f"no {architecture.class_name} name for {', '.join(sorted(left))}")
        entries = []
        for stacked, group in itertools.groupby(rows, key=lambda row: row.stacked):
            group = list(group)
            for layer in range(config.num_layers) if stacked else (...,):
                entries += [
                    _Entry(row, layer, row.name.format(layer), row.shape(sizes)) for row in group
                ]
        return cls(family, config, params, tuple(entries))

    @property
    def architecture(self) -> Any:
        return self.family.architecture_for(self.config)

    def tensor(self, entry: _Entry) -> np.ndarray:
        parts = [self.params[path][entry.layer] for path in entry.row.paths.split()]
        return entry.row.to_hf(parts, self.family.sizes(self.config))

    def name_of(self, path: str) -> str | None:
        return next((e.name for e in self.entries if e.row.paths == path), None)


class _Files:
    """The tensors of a folder, by the names of the table.

    Names may lack the architecture's prefix. Buffers are left out, and so is a copy of tied
    embeddings.
    """

    def __init__(self, directory: Path, plan: _Plan):
        prefix, buffers = plan.architecture.prefix, plan.architecture.buffers
        wanted = {entry.name for entry in plan.entries}
        self._found: dict[str, tuple[Any, str]] = {}
        for path in _tensor_files(directory):
            try:
                file = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
            for name in sorted(file.keys()):
                if not buffers.fullmatch(name.removeprefix(prefix)):
                    known = name not in wanted and prefix + name in wanted
                    self._found[prefix + name if known else name] = (file, name)
        if plan.name_of("head") is None and "lm_head.weight" in self._found:
            self._drop_tied_copy(directory, plan.name_of("embed"))

    def _drop_tied_copy(self, directory: Path, embed: str) -> None:
        if embed in self._found and not np.array_equal(
            self.read("lm_head.weight"), self.read(embed), equal_nan=True
        ):
            raise ConfigError(
                f"{directory}: lm_head.weight differs from {embed}, and config.json ties them"
            )
        del self._found["lm_head.weight"]

    def read(self, name: str) -> np.ndarray:
        file, stored_name = self._found[name]
        return file.get_tensor(stored_name).astype(np.float32)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Raises ConfigError for a tensor that is not of floating-point numbers."""
        shapes = {}
        for name, (file, stored_name) in self._found.items():
            header = file.get_slice(stored_name)
            if header.get_dtype() not in FLOATS:
                raise ConfigError(
                    f"{stored_name} is stored as {header.get_dtype()}; choices: {', '.join(FLOATS)}"
                )
            shapes[name] = jax.ShapeDtypeStruct(header.get_shape(), jnp.float32)
        return shapes


def _tables() -> dict[str, ModuleType]:
    """The families that have a table, by name."""
    families = (f"{models.__name__}.{m.name}" for m in pkgutil.iter_modules(models.__path__))
    return {
        family.rpartition(".")[2]: importlib.import_module(f"{family}.hf")
        for family in families
        if importlib.util.find_spec(f"{family}.hf")
    }


def _family(name: str) -> ModuleType:
    tables = _tables()
    if name not in tables:
        raise ConfigError(
            f"model {name!r} has no Hugging Face format; models with one: {', '.join(tables)}"
        )
    return tables[name]


def _read_config(directory: Path) -> tuple[ModuleType, Any]:
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config.json in {directory}: not a Hugging Face model") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    tables = _tables()
    for family in tables.values():
        if content.get("model_type") in family.ARCHITECTURES:
            return family, family.config_from_hf(content)
    choices = ", ".join(name for family in tables.values() for name in family.ARCHITECTURES)
    raise ConfigError(
        f"{path}: model_type {content.get('model_type')!r} cannot be read; choices: {choices}"
    )


def _params(model: Model) -> dict[str, Any]:
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _write_configs(directory: Path, family: ModuleType, config: Any, tokenizer: Tokenizer) -> None:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    content = family.hf_config(config, **{f"{role}_id": i for role, i in ids.items()})
    _write_json(directory / "config.json", content)
    generation = {f"{role}_token_id": i for role, i in ids.items()}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tensors(directory: Path, plan: _Plan, limit: int) -> int:
    """Writes the parameters, one file at a time; returns the number of files."""
    shards = _shards(plan.entries, limit)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE if len(shards) == 1 else name
        tensors = {entry.name: plan.tensor(entry) for entry in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        size = sum(map(_num_bytes, plan.entries))
        _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    return len(shards)


def _num_bytes(entry: _Entry) -> int:
    return 4 * math.prod(entry.shape)


def _shards(entries: Sequence[_Entry], limit: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + _num_bytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _num_bytes(entry)
    return shards


def _tensor_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise ConfigError(f"no {SINGLE} and no {INDEX} in {directory}: no other format is read")
        return [directory / SINGLE]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    files = [directory / name for name in sorted(set(names))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(f"{directory} lacks {', '.join(missing)}, which {INDEX} names")
    return files


def _read_tensors(directory: Path, plan: _Plan) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters, float32, one or a few at a time."""
    files = _Files(directory, plan)
    wanted = {e.name: jax.ShapeDtypeStruct(e.shape, jnp.float32) for e in plan.entries}
    differences = tree_differences(wanted, files.shapes())
    if differences:
        raise ConfigError(f"{directory} does not fit its config.json: " + "; ".join(differences))
    sizes = plan.family.sizes(plan.config)
    by_row: dict[Any, list[_Entry]] = {}
    for entry in plan.entries:
        by_row.setdefault(entry.row, []).append(entry)
    for row, entries in by_row.items():
        paths = row.paths.split()
        arrays = [np.empty(plan.params[path].shape, np.float32) for path in paths]
        for entry in entries:
            parts = row.from_hf(files.read(entry.name), sizes)
            for array, part in zip(arrays, parts, strict=True):
                array[entry.layer] = part
        yield from zip(paths, arrays, strict=True)


def _verify(directory: Path, plan: _Plan) -> None:
    """Raises RunError unless the folder reads back as the model that was written."""
    _, config = _read_config(directory)
    # They change no logits, and not all survive.
    neutral = {"dropout": 0.0, "remat": "none", "scan_unroll": 1}
    wanted, found = (dataclasses.replace(c.transformer(), **neutral) for c in (plan.config, config))
    if wanted != found:
        raise RunError(f"the export's config.json reads back as {found}, not {wanted}")
    for path, array in _read_tensors(directory, dataclasses.replace(plan, config=config)):
        written = plan.params[path]
        if written.dtype != np.float32 or not np.array_equal(
            written.view(np.uint32), array.view(np.uint32)
        ):
            raise RunError(f"the export's {path} does not read back as it was")
