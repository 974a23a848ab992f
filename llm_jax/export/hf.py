"""Hugging Face folders, written: safetensors, config.json, tokenizer files.

What they hold is said by one table per model family, `llm_jax/models/<family>/hf.py`; models/hf_folder.py
reads them. What is unusual: an export is read back and compared bit for bit before it gets its name, so a
folder that exists is whole and right; and writing and comparing hold no more than the model and a tensor.
Neither torch nor transformers is needed.
"""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export.certificate import EXACT
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import Forward, forward_of, host
from llm_jax.export.safetensors_file import Item, Spec, write_folder
from llm_jax.export.slabs import slabs
from llm_jax.models.hf_folder import Source, families, load, load_config, load_params
from llm_jax.models.hf_table import Entry, Family, Plan
from llm_jax.models.hf_tensors import Tensors
from llm_jax.sharding.rules import path_name
from llm_jax.training.config import RunConfig, check_vocabulary

__all__ = ["Config", "HuggingFaceExporter", "load", "load_config", "load_params", "make"]

Params = Mapping[str, np.ndarray]  # by dotted path
_READERS = 2  # threads


@dataclasses.dataclass(frozen=True)
class Config:
    """shard_bytes: limit of one file; a tensor above it has a file of its own."""

    name: str = "hf"
    shard_bytes: int = 4 * 10**9


class HuggingFaceExporter:
    """An Exporter for `transformers`: 5.x, and the later 4.x."""

    tolerances = EXACT
    claims = ("every tensor reads back bit for bit",)
    library = "transformers"

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
        with new_folder(directory) as folder:
            if not hasattr(tokenizer, "save_huggingface"):
                raise ConfigError(f"{type(tokenizer).__name__} cannot be written for Hugging Face")
            check_vocabulary(config, tokenizer.vocab_size)
            family = family_of(config.model.name)
            tokenizer.save_huggingface(folder)
            write_configs(folder, family, config.model, tokenizer)
            params = params_of(model)
            plan = plan_of(family, config.model, params)
            items = items_of(plan, params)
            files = write_folder(folder, items, self.config.shard_bytes)
            _verify(folder, family, plan, params, config.model)
        count = sum(math.prod(entry.shape) for entry in plan.entries)
        self._say(f"verified: {count:,} parameters in {files} file(s), read back bit for bit")
        return Path(directory).resolve()

    def load_back(self, directory: Path) -> Forward:
        return forward_of(load(directory, device=host())[0])

    def usage(self, directory: Path, name: str) -> str:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        cls = config["architectures"][0]
        return (
            f"```python\nfrom transformers import AutoTokenizer, {cls}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f'model = {cls}.from_pretrained("{name}")\n```\n\n'
            f"To train on from it with llm_jax: `--config.init_from=hf:{name}`.\n"
        )


def make(
    config: Config | None = None, *, say: Callable[[str], None] = print
) -> HuggingFaceExporter:
    return HuggingFaceExporter(config or Config(), say=say)


def family_of(name: str) -> Family:
    if name not in families():
        raise ConfigError(
            f"model {name!r} has no Hugging Face format; models with one: {', '.join(families())}"
        )
    return families()[name]


def params_of(model: Model) -> dict[str, np.ndarray]:
    """By dotted path, on the host: views, where they are there already."""
    state = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def plan_of(family: Family, config: Any, params: Params) -> Plan:
    shapes = {path: x.shape for path, x in params.items()}
    return Plan.of(family.architecture_for(config), family.sizes(config), shapes)


def write_configs(
    directory: Path, family: Family, config: Any, tokenizer: Tokenizer, **keys: Any
) -> None:
    """config.json, with these keys besides, and generation_config.json."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    content = family.hf_config(config, **{f"{role}_id": i for role, i in ids.items()})
    _write_json(directory / "config.json", content | keys)
    generation = {f"{role}_token_id": i for role, i in ids.items()}
    if "decoder_start_token_id" in content:
        generation["decoder_start_token_id"] = content["decoder_start_token_id"]
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def items_of(plan: Plan, params: Params) -> list[Item]:
    """What the files hold, each tensor made when it is its turn."""

    def item(entry: Entry) -> Item:
        make = lambda: (plan.to_hf(entry, params) for _ in range(1))  # noqa: E731
        return Item((Spec(entry.name, "F32", entry.shape),), make)

    return [item(entry) for entry in plan.entries]


def _verify(directory: Path, family: Family, plan: Plan, params: Params, config: Any) -> None:
    """Raises RunError unless the folder reads back as the model that was written."""
    source = Source.of(directory)
    differences = family.differences(plan.architecture, config, source.config)
    if source.architecture != plan.architecture or differences:
        raise RunError(f"the export's config.json reads back otherwise: {differences}")
    tensors = Tensors(directory, plan)
    tensors.check()

    def differs(entry: Entry) -> bool:
        at = 0
        for slab in slabs(plan.to_hf(entry, params)):
            found = tensors.stretch(entry.name, at, slab.size)
            at += slab.size
            # As bits, so that a NaN is equal to itself.
            if slab.dtype != np.float32 or not np.array_equal(
                found.view(np.uint32), slab.reshape(-1).view(np.uint32)
            ):
                return True
        return False

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for entry, different in zip(plan.entries, pool.map(differs, plan.entries), strict=True):
            if different:
                raise RunError(f"the export's {entry.name} does not read back as it was")
