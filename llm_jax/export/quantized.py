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
from safetensors import SafetensorError, safe_open

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.types import Model, Tokenizer
from llm_jax.export import hf
from llm_jax.export.certificate import Tolerances
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import Forward, forward_of, host
from llm_jax.export.safetensors_file import Spec, write_safetensors
from llm_jax.models.hf_folder import build, families
from llm_jax.models.hf_table import Entry, Plan
from llm_jax.models.hf_tensors import INDEX, SINGLE
from llm_jax.training.config import RunConfig, check_vocabulary

Kind = Literal["int8", "int4"]

_KEY = "quantization_config"  # of config.json
_METHOD = "llm_jax"
_LEVELS = {"int8": 127, "int4": 7}
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest value
_AT_ONCE = 2**20  # weights
_TOLERANCES = {
    "int8": Tolerances(difference=None, kl_divergence=0.02, equal_tokens=0.9, nats=0.02),
    "int4": Tolerances(difference=None, kl_divergence=0.3, equal_tokens=0.6, nats=0.3),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """group: neighbours with a scale of their own; None: a whole row. shard_bytes: see export/hf.py."""

    name: str = "quantized"
    kind: Kind = "int8"
    group: int | None = None
    shard_bytes: int = 4 * 10**9

    def __post_init__(self):
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ConfigError(f"group = {self.group}: expected an even number from 2 on, or none")
