"""A trained model, its config and its tokenizer, from nothing but a checkpoint."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from llm_jax.checkpoint.manager import Checkpointer, read_run_files, steps_in
from llm_jax.core.config import ConfigError, component
from llm_jax.core.types import Model, Tokenizer
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.nn.precision import ComputeDtype, Precision
from llm_jax.sharding.rules import AxisRules, shardings_for
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import axes_of
from llm_jax.transforms import merged, transformed


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """trained: the model as training had it, float32, layers stacked; run: the config it was trained by."""

    trained: Model
    run: RunConfig
    tokenizer: Tokenizer
    step: int

    @functools.cached_property
    def model(self) -> Model:
        """`trained` with plain parameters alone: what transforms added is merged."""
        return merged(self.trained)


def load_model(
    directory: Path,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    rules: Callable[[RunConfig], AxisRules] | None = None,
    compute_dtype: ComputeDtype | None = None,
) -> LoadedModel:
    """The model of a run.

    Args:
      directory: a run's --workdir, or the folder of its checkpoints.
      step: None is the best where the run looked for it (eval.patience), else the newest.
      mesh: where the parameters go, in shares by the default rules; None is the first device.
      rules: in place of `mesh`, makes mesh and rules from the config that the model was trained by.
      compute_dtype: None is that of training.

    Raises:
      ConfigError: no such step (lists those there are), an unreadable checkpoint, or arrays that
        do not fit the model of its own config.
    """
    folder, step = choose_checkpoint(directory, step)
    files = read_run_files(folder, step)
    run = resolve(files.config)
    placing = rules(run) if rules is not None else AxisRules(mesh) if mesh is not None else None
    device = jax.local_devices()[0] if placing is None else placing.mesh.devices.flat[0]
    precision = Precision.on(device.platform, compute_dtype or run.train.compute_dtype)
    make = component("models", run.model.name).make

    def abstract() -> Model:
        model = make(run.model, precision=precision, rngs=nnx.Rngs(0))
        return transformed(model, run.transforms, nnx.Rngs(0))

    graphdef, params, extra = nnx.split(nnx.eval_shape(abstract), nnx.Param, ...)
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        arrays = checkpointer.restore_params(step, _placed(params, extra, placing, device))
    model = nnx.merge(graphdef, nnx.State(arrays["params"]), nnx.State(arrays["extra"]))
    return LoadedModel(model, run, _tokenizer(files.tokenizer), step)


def choose_checkpoint(directory: Path, step: int | None) -> tuple[Path, int]:
    """The folder of a run's checkpoints and which of them is meant; arguments as of `load_model`.

    Touches no devices, so that it may be asked before processes have met.
    """
    folder = _checkpoints(Path(directory)).absolute()
    steps = steps_in(folder)
    if not steps:
        raise ConfigError(f"no finished checkpoint in {folder}")
    if step is None:
        best = read_run_files(folder, steps[-1]).best_step
        return folder, best if best in steps else steps[-1]
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise ConfigError(f"no checkpoint of step {step} in {folder}; steps: {there}")
    return folder, step


def _checkpoints(directory: Path) -> Path:
    """Names of steps are numbers, so a folder that has some is the one meant."""
    inside = directory / "checkpoints"
    holds_steps = directory.is_dir() and any(p.name.isdigit() for p in directory.iterdir())
    return directory if holds_steps and not inside.is_dir() else inside


def _placed(
    params: nnx.State, extra: nnx.State, rules: AxisRules | None, device: jax.Device
) -> dict[str, Any]:
    """Shapes with the shardings to restore onto."""
    states = {"params": params, "extra": extra}
    shapes = {name: nnx.to_pure_dict(state) for name, state in states.items()}
    if rules is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
    else:
        shardings = {
            name: shardings_for(shapes[name], axes_of(state), rules)
            for name, state in states.items()
        }
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return load_tokenizer(Path(folder))
