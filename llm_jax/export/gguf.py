"""GGUF, the format of llama.cpp and what is built on it: one file with model and tokenizer. Extra: `gguf`.

gguf_models.py says which models llama.cpp computes and how it has them, gguf_vocabulary.py the same of
tokenizers. Matrices become what `dtype` says, rows that q8_0 does not divide (blocks of 32) float16; vectors,
routers and learned positions stay float32. Tensors are written one at a time. Loading back reads the file with
gguf's own reader and rounds nothing more.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export import gguf_models, hf
from llm_jax.export.certificate import EXACT, Tolerances
from llm_jax.export.folder import new_folder
from llm_jax.export.gguf_models import ROPE_FACTORS, Convention, Tensor
from llm_jax.export.gguf_vocabulary import vocabulary_of
from llm_jax.export.probes import Forward, forward_of, host
from llm_jax.export.slabs import slabs
from llm_jax.models.gpt import hf as gpt_hf
from llm_jax.models.hf_folder import build
from llm_jax.models.hf_table import Plan
from llm_jax.training.config import RunConfig, check_vocabulary

FILE = "model.gguf"
Dtype = Literal["f32", "f16", "bf16", "q8_0"]

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight", "norm.weight")
_TOLERANCES = {
    "f32": EXACT,
    "f16": Tolerances(difference=None, kl_divergence=1e-4, equal_tokens=0.98, nats=1e-3),
    "bf16": Tolerances(difference=None, kl_divergence=2e-3, equal_tokens=0.95, nats=5e-3),
    "q8_0": Tolerances(difference=None, kl_divergence=0.02, equal_tokens=0.9, nats=0.02),
}


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "gguf"
    dtype: Dtype = "f16"


class GgufExporter:
    """An Exporter for llama.cpp."""

    claims = ()
    library = "gguf"

    def __init__(self, config: Config, *, say: Callable[[str], None] = print):
        self.config, self._say = config, say
        self.tolerances = _TOLERANCES[config.dtype]

    def export(
        self, model: Model, tokenizer: Tokenizer, config: RunConfig, directory: Path
    ) -> Path:
        """Writes a folder with model.gguf.

        Raises:
          ConfigError: a model or a tokenizer that llama.cpp has no like of, the folder is not empty, or
            gguf is not installed.
        """
        _require()
        with new_folder(directory) as folder:
            check_vocabulary(config, tokenizer.vocab_size)
            if config.model.name != gpt_hf.FAMILY.name:
                raise ConfigError(
                    f"llama.cpp gets no model {config.model.name!r} from here; choices: "
                    f"{', '.join(gguf_models.CONVENTIONS)}"
                )
            architecture = gpt_hf.FAMILY.architecture_for(config.model)
            convention = gguf_models.convention_for(architecture, config.model)
            vocabulary = vocabulary_of(tokenizer).padded(config.model.vocab_size)
            told = gguf_models.metadata(convention, config.model) | vocabulary.metadata(tokenizer)
            params = hf.params_of(model)
            plan = hf.plan_of(gpt_hf.FAMILY, config.model, params)
            size = self._write(folder / FILE, convention, told, plan, params, config.model)
        self._say(f"written: {FILE}, {convention.name}, {self.config.dtype}, {size:,} bytes")
        return Path(directory).resolve()

    def load_back(self, directory: Path) -> Forward:
        return forward_of(load(Path(directory) / FILE, device=host()))

    def usage(self, directory: Path, name: str) -> str:
        del directory
        return f"```\nllama-cli -m {name}/{FILE} -p 'Once upon a time'\n```\n"

    def _write(
        self,
        path: Path,
        convention: Convention,
        told: Mapping[str, Any],
        plan: Plan,
        params: hf.Params,
        config: Any,
    ) -> int:
        import gguf

        writer = gguf.GGUFWriter(path, convention.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[self.config.dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in told.items():
            _add(writer, key, value)
        tensors = list(gguf_models.tensors(convention, plan, config, _names(convention, config)))
        kinds = [_stored_as(gguf, tensor, self.config.dtype) for tensor in tensors]
        factors = gguf_models.rope_factors(config)
        if factors is not None:
            _add_tensor(gguf, writer, ROPE_FACTORS, factors.shape, gguf.GGMLQuantizationType.F32)
        for tensor, kind in zip(tensors, kinds, strict=True):
            _add_tensor(gguf, writer, tensor.name, tensor.shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_quantized(gguf, tensor.of(plan, params), kind))
        writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size


def make(config: Config | None = None, *, say: Callable[[str], None] = print) -> GgufExporter:
    return GgufExporter(config or Config(), say=say)


def load(path: Path, *, device: jax.Device | None = None) -> Model:
    """Our model of a file that this format wrote; parameters are float32.

    Raises:
      ConfigError: a file that cannot be read, or one of an architecture or with tensors that differ.
    """
    _require()
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} cannot be read as GGUF: {error}") from None
    found = {key: field.contents() for key, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        architecture, config = gguf_models.read_config(found, set(stored))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} was written by others: it does not tell {error}") from None
    convention = gguf_models.convention_for(architecture, config)
    _check_factors(path, stored, config)

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def reader_of(plan: Plan) -> Callable[[str], np.ndarray]:
        names = _names(convention, config)
        tensors = list(gguf_models.tensors(convention, plan, config, names))
        _check(path, tensors, stored)
        return gguf_models.read_tensors(tensors, read)

    return build(gpt_hf.FAMILY, architecture, config, reader_of, device=device)


def _check_factors(path: Path, stored: Mapping[str, Any], config: Any) -> None:
    """The file tells a scaling twice: as factors for llama.cpp, and for us by its own values."""
    wanted = gguf_models.rope_factors(config)
    found = stored.get(ROPE_FACTORS)
    if (wanted is None) != (found is None) or (
        wanted is not None and not np.allclose(found.data, wanted, rtol=1e-5)
    ):
        raise ConfigError(f"{path}: {ROPE_FACTORS} is not of the rope scaling that it tells")


def _check(path: Path, tensors: list[Tensor], stored: Mapping[str, Any]) -> None:
    wanted = {tensor.name: tensor.shape for tensor in tensors}
    names = stored.keys() - {ROPE_FACTORS}
    differing = sorted(wanted.keys() ^ names)
    differing += [
        name
        for name, shape in wanted.items()
        if name in names and tuple(stored[name].shape.tolist()) != shape[::-1]
    ]
    if differing:
        raise ConfigError(
            f"{path}: tensors missing, extra or misshapen: {', '.join(differing[:8])}"
        )


def _names(convention: Convention, config: Any) -> Any:
    import gguf

    (arch,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == convention.name)
    return gguf.get_tensor_name_map(arch, config.num_layers)


def _quantized(gguf, x: np.ndarray, kind: Any) -> np.ndarray:
    """x as the file has it, a few rows at a time: never a copy of all of it in float32 beside."""
    out, end = None, 0
    for slab in slabs(x):
        part = gguf.quantize(slab, kind)
        if out is None:
            out = np.empty((len(x), *part.shape[1:]), part.dtype)
        out[end : end + len(part)] = part
        end += len(part)
    return out


def _stored_as(gguf: ModuleType, tensor: Tensor, dtype: Dtype) -> Any:
    types = gguf.GGMLQuantizationType
    if dtype == "f32" or len(tensor.shape) == 1 or tensor.name.endswith(_FLOAT32):
        return types.F32
    if dtype == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16
    return types[dtype.upper()]


def _add_tensor(
    gguf: ModuleType, writer: Any, name: str, shape: tuple[int, ...], kind: Any
) -> None:
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        dtype = np.dtype(plain[kind])
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}  # fmt: skip
    kinds.get(type(value), writer.add_array)(key, value)


def _require() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError('export to GGUF needs: pip install "llm_jax[gguf]"')
