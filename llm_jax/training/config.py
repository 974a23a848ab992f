"""The sections of an experiment, parsed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError, nearest, parse, parse_component, to_dict
from llm_jax.data.config import DataConfig, resolve_data
from llm_jax.nn.kernels.spec import Kernel
from llm_jax.nn.low_precision import MatmulDtype
from llm_jax.nn.precision import ComputeDtype
from llm_jax.optim.make import OptimizerConfig
from llm_jax.optim.schedule import ScheduleConfig, make_schedule
from llm_jax.sharding.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """batch_size: rows of the global batch, over all devices and microbatches.

    accumulate_steps: microbatches one optimizer step sums over, each batch_size / accumulate_steps
    rows; the result equals one big batch, but for dropout and the balance of experts, which are each
    microbatch's own. log_every: steps between two records of the metrics.
    reduce_dtype: in which devices add their gradients of a block's weights; bfloat16 halves the bytes.
    matmul_dtype: "int8" or "fp8" multiplies activations and weights of blocks in 8 bits (extra lowp).
    attention_kernel: how training computes attention; "auto" takes the fastest that the backend has.
    peer_timeout: seconds of silence after which a process of the job counts as lost and the others end.
    """

    num_steps: int
    batch_size: int
    accumulate_steps: int = 1
    log_every: int = 10
    seed: int = 0
    compute_dtype: ComputeDtype = "bfloat16"
    reduce_dtype: ComputeDtype = "float32"
    matmul_dtype: MatmulDtype | None = None
    attention_kernel: Kernel = "auto"
    peer_timeout: float = 60.0

    def __post_init__(self):
        for field in ("num_steps", "batch_size", "accumulate_steps", "log_every", "peer_timeout"):
            if getattr(self, field) < 1:
                raise ValueError(f"train.{field} = {getattr(self, field)} must be at least 1")
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of "
                f"train.accumulate_steps {self.accumulate_steps}"
            )

    @property
    def microbatch_size(self) -> int:
        """Rows that pass through the model at once: evaluation must not need more memory."""
        return self.batch_size // self.accumulate_steps


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """save_every: steps between checkpoints; the last step is always saved.

    keep_last: newest checkpoints kept; keep_every: besides those, every multiple of so many steps.
    """

    save_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None

    def __post_init__(self):
        for field in ("save_every", "keep_last"):
            if getattr(self, field) < 1:
                raise ValueError(f"checkpoint.{field} = {getattr(self, field)} must be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} must be at least 1, or None"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training, and what is shown after it.

    every: steps between evaluations on the way, None for none; each reads max_batches batches.
    final_bytes: about how much held-out text the evaluation of a checkpoint reads; None for all.
    context: tokens a window of a document shares with the one before it; None for half a window.
    sample_prompts: completed at the end, sample_tokens each.
    """

    every: int | None = None
    max_batches: int = 16
    final_bytes: int | None = 4_000_000
    context: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 128

    def __post_init__(self):
        for field in ("every", "max_batches", "final_bytes", "sample_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"eval.{field} = {value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """An experiment. `model` and `objective` are the Config of the component they name."""

    model: Any
    objective: Any
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mesh: MeshConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig


def resolve(config: Mapping) -> RunConfig:
    """Parses every section; checks what joins them.

    Raises:
      ConfigError: an unknown section or key, a value of the wrong type, sections that disagree.
    """
    fields = {f.name: f.type for f in dataclasses.fields(RunConfig)}
    for name in config:
        if name not in fields:
            raise ConfigError(
                f"config.{name}: unknown section{nearest(name, fields)}; "
                f"sections: {', '.join(fields)}"
            )
    for name in ("model", "data", "train"):
        if name not in config:
            raise ConfigError(f"config.{name} is missing: every experiment needs it")
    objective = config.get("objective") or {"name": "causal_lm"}
    plain = {
        name: parse(cls, config.get(name), f"config.{name}")
        for name, cls in fields.items()
        if name not in ("model", "objective", "data")
    }
    run = RunConfig(
        model=parse_component("models", config["model"], "config.model"),
        objective=parse_component("objectives", objective, "config.objective"),
        data=resolve_data(config["data"]),
        **plain,
    )
    _check_joint(run)
    return run


def _check_joint(run: RunConfig) -> None:
    length, limit = run.data.sequence_length, getattr(run.model, "max_length", None)
    if limit is not None and length > limit:
        raise ConfigError(
            f"config.data.sequence_length {length} exceeds config.model.max_length {limit}"
        )
    context = run.eval.context
    if context is not None and not 0 <= context < length:
        raise ConfigError(
            f"config.eval.context {context} must lie in [0, {length}), config.data.sequence_length"
        )
    wanted = getattr(run.data.tokenizer, "vocab_size", None)
    if wanted is not None:
        check_vocabulary(run, wanted)
    try:
        make_schedule(run.schedule, run.train.num_steps)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None


def check_vocabulary(run: RunConfig, tokenizer_size: int) -> None:
    """Raises ConfigError when token ids would fall outside the model's embedding."""
    if tokenizer_size > run.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size {run.model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer_size}: set it to at least {tokenizer_size}"
        )


def describe(run: RunConfig) -> str:
    """The resolved config, a line per section."""
    lines = []
    for section, values in to_dict(run).items():
        text = " ".join(f"{key}={value!r}" for key, value in values.items())
        lines.append(f"config.{section}: {text}")
    return "\n".join(lines)


def changes_since(saved: Mapping, run: RunConfig) -> list[str]:
    """What differs from the config of a checkpoint, keys that it did not have yet at their defaults."""
    try:
        saved = to_dict(resolve(saved))
    except ConfigError:  # of another version
        saved = dict(saved)
    return differences(saved, to_dict(run))


def differences(old: Mapping, new: Mapping, where: str = "config") -> list[str]:
    """`config.a.b: old -> new` for each key whose value differs."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        name, before, after = f"{where}.{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, name)
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
