"""The stacks of layers of a model, whatever its family, as arithmetic sees them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llm_jax.core.config import component
from llm_jax.nn.block import TransformerConfig
from llm_jax.sharding.rules import AxisRules
from llm_jax.training.config import RunConfig

# On the first token of a row alone.
_OF_FIRST = ("pooler", "class_head")
_OF_MEMORY = ("cross_attention.key", "cross_attention.value")


@dataclasses.dataclass(frozen=True)
class StackShape:
    """path: of its module. length: tokens of a row that pass through it.

    memory: tokens of a row that it attends to across, 0 without. prefix: whether tokens see ahead in one.
    """

    path: str
    transformer: TransformerConfig
    length: int
    memory: int = 0
    prefix: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether only the reference kernel serves its self-attention."""
        return self.transformer.relative_bias is not None or self.prefix

    @property
    def needs_whole_sequences(self) -> bool:
        relative = self.transformer.relative_bias is not None
        return relative or self.memory > 0 or not self.transformer.attention.spec.causal

    @property
    def needs_one_stage(self) -> bool:
        config = self.transformer
        return self.is_plain or config.local is not None or config.cross_attention


def stacks_of(model: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[StackShape, ...]:
    """Of a model's config and the arrays of a batch."""
    length = shapes["tokens"].shape[1]
    if hasattr(model, "transformer"):
        return (StackShape("stack", model.transformer(), length, prefix="prefix" in shapes),)
    source = shapes["encoder_tokens"].shape[1]
    return (
        StackShape("encoder", model.encoder(), source),
        StackShape("decoder", model.decoder(), length, memory=source),
    )


def batch_shapes(run: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    objective = component("objectives", run.objective.name).make(run.objective)
    return objective.batch_spec(run.train.batch_size, run.data.sequence_length)


def run_stacks(run: RunConfig) -> tuple[StackShape, ...]:
    return stacks_of(run.model, batch_shapes(run))


def head_length(model: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Tokens of a row that the head over the vocabulary sees; 0 of a model without one."""
    if getattr(model, "head", "masked_lm") not in ("masked_lm", "pretraining"):
        return 0
    return shapes.get("predict_positions", shapes["tokens"]).shape[1]


def length_at(path: str, stacks: Sequence[StackShape], head: int) -> int:
    """Tokens of a row that meet a parameter; head: those that the head over the vocabulary sees."""
    if path.partition(".")[0] in _OF_FIRST:
        return 1
    stack = next((one for one in stacks if path.startswith(f"{one.path}.")), None)
    if stack is None:
        return head or stacks[-1].length
    return stack.memory if any(f".{name}." in f"{path}." for name in _OF_MEMORY) else stack.length


def is_known(model: Any) -> bool:
    """Whether `stacks_of` knows the model's family."""
    return hasattr(model, "transformer") or (
        hasattr(model, "encoder") and hasattr(model, "decoder")
    )


def check_mesh(stacks: Sequence[StackShape], rules: AxisRules) -> None:
    """Refuses what the models and nn/transformer.py refuse when they are traced.

    Raises:
      ValueError: sequences or layers in shares that must be whole.
    """
    if rules.shares("length") > 1 and any(stack.needs_whole_sequences for stack in stacks):
        raise ValueError("this model needs whole sequences: use a mesh with context=1")
    if rules.shares("stage") > 1 and any(stack.needs_one_stage for stack in stacks):
        raise ValueError("this model cannot be split into stages: use a mesh with pipeline=1")
