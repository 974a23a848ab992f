"""The sections of an experiment, parsed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError, nearest, parse, parse_component, plain, to_dict
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
    keep_best: a score, such as "bits_per_byte": besides those, the checkpoint that did best by it, in
    evaluations of the run itself or of jobs beside it (docs/evaluation.md).
    """

    save_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: str | None = None

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
    patience: evaluations in a row without a better `metric` after which training ends, the best step
    being kept and used; None: training goes on to its last step, which is used (training/stopping.py).
    final_bytes: about how much held-out text the evaluation of a checkpoint reads; None for all.
    context: tokens a window of a document shares with the one before it; None for half a window.
    tasks: further evaluators, sections whose `name` picks a module of evals/ (docs/evaluation.md). They are
    asked at the end; tasks_every: and every so many steps on the way, None for not.
    sample_prompts: completed at the end, sample_tokens each.
    generate_examples: held-out records whose targets are generated where an objective turns one text into
    another; with num_beams above 1 by beam search, too.
    """

    every: int | None = None
    max_batches: int = 16
    patience: int | None = None
    metric: str = "loss"
    final_bytes: int | None = 4_000_000
    context: int | None = None
    tasks: tuple[Mapping[str, Any], ...] = ()
    tasks_every: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 128
    generate_examples: int = 1000
    num_beams: int = 1

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(map(plain, self.tasks)))
        for field in ("every", "max_batches", "patience", "final_bytes", "tasks_every",
                      "sample_tokens", "generate_examples", "num_beams"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"eval.{field} = {value} must be at least 1")
        if self.tasks_every is not None and not self.tasks:
            raise ValueError(f"eval.tasks_every = {self.tasks_every}, but eval.tasks is empty")
        if self.patience is not None and self.every is None and self.tasks_every is None:
            raise ValueError(
                f"eval.patience = {self.patience} counts evaluations: set eval.every, too"
            )

    @property
    def labels(self) -> set[str]:
        """What the figures of tasks begin with."""
        return {str(task.get("label") or task.get("name")) for task in self.tasks}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """An experiment. `model`, `objective` and each of `transforms` are the Config of what they name.

    init_from: where the first parameters come from (checkpoint/source.py): "hf:FOLDER" of Hugging Face,
    or a run's workdir, "WORKDIR" or "WORKDIR@STEP"; None: random ones.
    """

    model: Any
    objective: Any
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mesh: MeshConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    transforms: tuple[Any, ...] = ()
    init_from: str | None = None


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
    init_from = config.get("init_from")
    for name in ("model", "data", "train"):
        if name not in config and (name != "model" or init_from is None):
            raise ConfigError(f"config.{name} is missing: every experiment needs it")
    objective = config.get("objective") or {"name": "causal_lm"}
    sections = {
        name: parse(cls, config.get(name), f"config.{name}")
        for name, cls in fields.items()
        if dataclasses.is_dataclass(cls) and cls is not DataConfig
    }
    run = RunConfig(
        model=parse_component("models", _model_section(config, init_from), "config.model"),
        objective=parse_component("objectives", objective, "config.objective"),
        data=resolve_data(config["data"]),
        transforms=_parse_transforms(config.get("transforms")),
        init_from=init_from,
        **sections,
    )
    _check_joint(run)
    return run


def _model_section(config: Mapping, init_from: Any) -> Mapping:
    """The section `model`; without a name it holds what differs from the model of `init_from`."""
    if init_from is not None and (not isinstance(init_from, str) or not init_from):
        raise ConfigError(f"config.init_from = {init_from!r}: expected 'hf:FOLDER' or a workdir")
    section = config.get("model") or {}
    if init_from is None or not hasattr(section, "keys") or "name" in section:
        return section
    # Here, since checkpoints know configs, and since a complete config needs neither Orbax nor files.
    from llm_jax.checkpoint.source import Source

    return {**Source.parse(init_from).model_section(), **section}


def _parse_transforms(sections: Any) -> tuple[Any, ...]:
    if not isinstance(sections, list | tuple | None):
        raise ConfigError(f"config.transforms = {sections!r}: expected a list of sections")
    return tuple(
        parse_component("transforms", section, f"config.transforms.{number}")
        for number, section in enumerate(sections or ())
    )


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
    sections: dict[str, Any] = {}
    for name, section in to_dict(run).items():
        several = isinstance(section, list)
        sections |= (
            {f"{name}.{i}": s for i, s in enumerate(section)} if several else {name: section}
        )
    lines = []
    for name, section in sections.items():
        if isinstance(section, Mapping):
            section = " ".join(f"{key}={value!r}" for key, value in section.items())
        if section is not None:
            lines.append(f"config.{name}: {section}")
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
