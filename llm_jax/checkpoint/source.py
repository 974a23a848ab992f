"""Where fine-tuning begins: the model of another run, or of a Hugging Face folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from llm_jax.checkpoint.load import choose_checkpoint, load_model
from llm_jax.checkpoint.manager import read_run_files
from llm_jax.core.config import ConfigError, to_dict
from llm_jax.models import hf_folder
from llm_jax.sharding.rules import AxisRules, shardings_for
from llm_jax.training.config import RunConfig
from llm_jax.training.program import Plain

HF = "hf:"


@dataclasses.dataclass(frozen=True)
class Source:
    """`config.init_from`, taken apart. step: of a run's checkpoint; None: the one `load_model` takes."""

    path: Path
    is_hf: bool
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Reads "hf:FOLDER", "WORKDIR" or "WORKDIR@STEP".

        Raises:
          ConfigError: there is no such folder.
        """
        is_hf, step = text.startswith(HF), None
        folder, _, number = text.rpartition("@")
        if not is_hf and folder and number.isdigit():
            text, step = folder, int(number)
        path = Path(text.removeprefix(HF)).expanduser()
        if not path.is_dir():
            raise ConfigError(
                f"config.init_from: there is no folder {path}; forms: hf:FOLDER, WORKDIR, WORKDIR@STEP"
            )
        return cls(path, is_hf, step)

    def model_section(self) -> dict[str, Any]:
        """The section `model` of the source, whole; touches no devices."""
        if self.is_hf:
            return to_dict(hf_folder.load_config(self.path))
        return read_run_files(*choose_checkpoint(self.path, self.step)).config["model"]

    def load(self, run: RunConfig, plain: Plain, rules: AxisRules) -> Mapping[str, Any]:
        """The source's parameters, float32, a nested dict, in shares by these rules."""
        if self.is_hf:
            shardings = shardings_for(plain.shapes, plain.axes, rules)
            return hf_folder.load_params(self.path, run.model, shardings)
        model = load_model(self.path, self.step, rules=lambda _: rules).model
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))
