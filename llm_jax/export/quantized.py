"""Weights in 8 or 4 bits: a Hugging Face folder whose matrices are codes and scales.

Symmetric rounding, each row of a matrix [out, in] by itself (one scale for each output channel), or each
`group` of neighbours in a row (Dettmers et al. 2022, section 3; Frantar et al. 2022, section 4). Embeddings and
heads stay in 8 bits when the rest has 4; norms, biases, routers and position tables stay float32. In 4 bits the
largest values of a group are cut off where that lessens its squared error.

A matrix NAME is two tensors: NAME.codes, int8 [out, in] or uint8 [out, in / 2] with the earlier of two
neighbours in the low half, shifted by 8; and NAME.scales [out, groups]. Transformers refuses the folder, as it
should; `load` gives it back as our model, `init_from` cannot. Matrices that Hugging Face stores [in, out]
(GPT-2) are turned.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export import hf
from llm_jax.export.certificate import Tolerances
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import Forward, forward_of, host
from llm_jax.export.safetensors_file import DTYPES, Item, Reader, Spec, write_folder
from llm_jax.export.slabs import slabs
from llm_jax.models.hf_folder import Source, build
from llm_jax.models.hf_table import Architecture, Entry, Plan
from llm_jax.training.config import RunConfig, check_vocabulary

Kind = Literal["int8", "int4"]

_KEY = "quantization_config"  # of config.json
_METHOD = "llm_jax"
_LEVELS = {"int8": 127, "int4": 7}
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest value
_TOLERANCES = {
    "int8": Tolerances(difference=None, kl_divergence=0.02, equal_tokens=0.9, nats=0.02),
    "int4": Tolerances(difference=None, kl_divergence=0.3, equal_tokens=0.6, nats=0.3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """group: neighbours with a scale of their own, or "row"; None: "row" in 8 bits, 32 in 4.

    shard_bytes: see export/hf.py.
    """

    name: str = "quantized"
    kind: Kind = "int8"
    group: Literal["row"] | int | None = None
    shard_bytes: int = 4 * 10**9

    def __post_init__(self):
        if self.group is None:
            object.__setattr__(self, "group", "row" if self.kind == "int8" else 32)
        if self.group != "row" and self.group < 2:
            raise ConfigError(f"group = {self.group}: expected at least 2, or row")


class QuantizedExporter:
    """An Exporter of rounded weights."""

    claims = ()
    library = None

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        self.config, self._say = config, say
        self.tolerances = _TOLERANCES[config.kind]

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes the folder; arguments and errors as of export/hf.py."""
        with new_folder(directory) as folder:
            check_vocabulary(config, tokenizer.vocab_size)
            family = hf.family_of(config.model.name)
            tokenizer.save_huggingface(folder)
            told = {"quant_method": _METHOD, "kind": self.config.kind, "group": self.config.group}
            hf.write_configs(folder, family, config.model, tokenizer, **{_KEY: told})
            params = hf.params_of(model)
            plan = hf.plan_of(family, config.model, params)
            schemes = {e.name: _Scheme.of(e, plan.architecture, self.config) for e in plan.entries}
            items = [_item(plan, e, params, schemes[e.name]) for e in plan.entries]
            write_folder(folder, items, self.config.shard_bytes)
        before = sum(x.nbytes for x in params.values())
        after = sum(item.num_bytes for item in items)
        self._say(f"rounded to {self.config.kind}: {before:,} bytes of weights became {after:,}")
        return Path(directory).resolve()

    def load_back(self, directory: Path) -> Forward:
        return forward_of(load(directory, device=host())[0])

    def usage(self, directory: Path, name: str) -> str:
        del directory
        return (
            "```python\nfrom llm_jax.export import quantized\n\n"
            f'model, config = quantized.load("{name}")  # float32, of the rounded weights\n```\n'
        )


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> QuantizedExporter:
    return QuantizedExporter(config or Config(), say=say)


def load(directory: Path, *, device: jax.Device | None = None) -> tuple[Model, Any]:
    """(model, its Config) of a folder that this format wrote; parameters are float32.

    Args:
      device: where they go; None: the default one.

    Raises:
      ConfigError: no such folder, or tensors that are missing or too many.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.pop(_KEY)
        method = told.pop("quant_method")
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"{path} tells of no quantized export") from None
    if method != _METHOD:
        raise ConfigError(f"{path}: quant_method {method!r} cannot be read, only {_METHOD!r}")
    config = parse(Config, told, f"{path}: {_KEY}")
    source = Source.of_content(directory, content)
    reader = lambda plan: _Reading(directory, plan, config)  # noqa: E731
    model = build(source.family, source.architecture, source.config, reader, device=device)
    return model, source.config


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """How a tensor is stored; levels: None as it is. turned: it is [in, out], and stored [out, in]."""

    name: str
    shape: tuple[int, ...]
    levels: int | None
    group: int = 0
    turned: bool = False

    @classmethod
    def of(cls, entry: Entry, architecture: Architecture, config: Config) -> "_Scheme":
        letters = re.findall(r"\w+", entry.row.hf_dims)
        if len(entry.shape) != 2 or "D" not in letters or not set("DNKHFVU3").issuperset(letters):
            return cls(entry.name, entry.shape, None)
        pattern = architecture.inputs_first
        turned = pattern is not None and re.fullmatch(pattern, entry.name) is not None
        shape = entry.shape[::-1] if turned else entry.shape
        kind = "int8" if "V" in letters else config.kind
        group = shape[1] if config.group == "row" else config.group
        return cls(entry.name, shape, _LEVELS[kind], group, turned)

    @property
    def packed(self) -> bool:
        return self.levels == _LEVELS["int4"]

    def specs(self) -> tuple[Spec, ...]:
        if self.levels is None:
            return (Spec(self.name, "F32", self.shape),)
        rows, columns = self.shape
        groups = -(-columns // self.group)
        codes = ("U8", (rows, -(-columns // 2))) if self.packed else ("I8", self.shape)
        # Beside 4 bits a scale's own count; rounded ones do no harm there, since codes are made of them.
        dtype = "BF16" if self.packed and groups > 1 else "F32"
        return (
            Spec(f"{self.name}.codes", *codes),
            Spec(f"{self.name}.scales", dtype, (rows, groups)),
        )

    def encode(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(codes, scales) of [out, in] float32, in any order of axes: a few rows at a time."""
        code_spec, scale_spec = self.specs()
        codes = np.empty(code_spec.shape, DTYPES[code_spec.dtype])
        scales = np.empty(scale_spec.shape, DTYPES[scale_spec.dtype])
        end = 0
        for slab in slabs(matrix):
            rows = slice(end, end + len(slab))
            end = rows.stop
            x = self._groups(slab)
            scales[rows] = self._scales(x).astype(scales.dtype)
            if not np.isfinite(scales[rows].astype(np.float32)).all():
                raise ConfigError(f"{self.name} has values that are not finite: they have no codes")
            rounded = _rounded(x, scales[rows].astype(np.float32), self.levels)
            rounded = rounded.reshape(len(x), -1)[:, : self.shape[1]].astype(np.int8)
            codes[rows] = _packed(rounded) if self.packed else rounded
        return codes, scales

    def decode(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The inverse: float32 [out, in], or [in, out] where it was turned."""
        codes = _unpacked(codes)[:, : self.shape[1]] if self.packed else codes
        x = self._groups(codes.astype(np.float32))
        x *= scales.astype(np.float32)[..., None]
        x = x.reshape(len(x), -1)[:, : self.shape[1]]
        return x.T if self.turned else x

    def _groups(self, x: np.ndarray) -> np.ndarray:
        """[rows, in] to [rows, groups, group], zeros at the end of the last one."""
        missing = -x.shape[1] % self.group
        x = np.pad(x, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(x)
        return x.reshape(len(x), -1, self.group)

    def _scales(self, x: np.ndarray) -> np.ndarray:
        """[rows, groups] float32."""
        largest = np.max(np.abs(x), axis=-1) / self.levels
        if not self.packed:
            return largest
        scales = [largest * share for share in _SHRUNK]
        errors = [np.sum((x - _rounded(x, s, self.levels) * s[..., None]) ** 2, -1) for s in scales]
        return np.take_along_axis(np.stack(scales), np.argmin(np.stack(errors), 0)[None], 0)[0]


def _rounded(x: np.ndarray, scales: np.ndarray, levels: int) -> np.ndarray:
    quotient = x / np.maximum(scales, np.finfo(np.float32).tiny)[..., None]
    return np.clip(np.rint(quotient), -levels, levels)


def _packed(codes: np.ndarray) -> np.ndarray:
    """[rows, n] int8 in -8..7 to [rows, n / 2] uint8."""
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))) + 8
    codes = codes.astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _unpacked(pairs: np.ndarray) -> np.ndarray:
    both = np.stack([pairs & 15, pairs >> 4], axis=-1).astype(np.int8) - 8
    return both.reshape(len(pairs), -1)


def _item(plan: Plan, entry: Entry, params: hf.Params, scheme: _Scheme) -> Item:
    def make() -> Iterator[np.ndarray]:
        tensor = plan.to_hf(entry, params)
        if scheme.levels is None:
            yield tensor
        else:
            yield from scheme.encode(tensor.T if scheme.turned else tensor)

    return Item(scheme.specs(), make)


class _Reading:
    """Hugging Face's tensors by name, out of codes and scales."""

    def __init__(self, directory: Path, plan: Plan, config: Config):
        self._reader = Reader(directory)
        self._schemes = {e.name: _Scheme.of(e, plan.architecture, config) for e in plan.entries}
        wanted = {spec for scheme in self._schemes.values() for spec in scheme.specs()}
        differing = sorted({spec.name for spec in wanted ^ self._reader.specs()})
        if differing:
            raise ConfigError(
                f"{directory}: tensors missing, extra or misshapen: {', '.join(differing[:8])}"
            )

    def __call__(self, name: str) -> np.ndarray:
        scheme = self._schemes[name]
        arrays = [self._reader.read(spec.name) for spec in scheme.specs()]
        return arrays[0] if scheme.levels is None else scheme.decode(*arrays)
