"""The whole array behind an activation's shape on one device, and how it is shared.

The compiler's text has shapes of one device only. What a dimension is follows from its size: of the few
sizes that a step has (rows, length, heads, width ...) each, in shares over its mesh axes, gives one local
size. An array of which a dimension is none of them keeps its local shape alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.memory import sharding_text
from llm_jax.planner.plan import LiveBuffer, Memory
from llm_jax.sharding.rules import RULE_SETS

_OF_TOKENS = ("activations", "logits", "attention", "temporaries")


@dataclasses.dataclass(frozen=True)
class _Dimension:
    """size: of the whole; axes: mesh axes of more than one device that share it."""

    size: int
    axes: tuple[str, ...]
    local: int


def name_shapes(memory: Memory, step: CompiledStep) -> Memory:
    """Memory whose arrays of tokens have their logical shape and sharding, where they are known."""
    known = _dimensions(step)
    named = tuple(_named(buffer, known) for buffer in memory.buffers)
    return dataclasses.replace(memory, buffers=named)


def _named(buffer: LiveBuffer, known: Sequence[_Dimension]) -> LiveBuffer:
    if buffer.logical_shape is not None or buffer.part not in _OF_TOKENS:
        return buffer
    found = _match(buffer.shape, known)
    if found is None:
        return buffer
    return dataclasses.replace(
        buffer,
        logical_shape=tuple(dimension.size for dimension in found),
        sharding=sharding_text(tuple(dimension.axes for dimension in found)),
    )


def _match(shape: Sequence[int], known: Sequence[_Dimension]) -> list[_Dimension] | None:
    """Each dimension's meaning, in the order of `known` where several fit; one of them, once.

    None where a dimension has none, or where one of size 1 may be a share of one thing or another.
    """
    left, found = list(known), []
    shares_of_one = [dimension for dimension in known if dimension.local == 1 < dimension.size]
    if 1 in shape and shares_of_one and (len(shares_of_one) > 1 or list(shape).count(1) > 1):
        return None
    for size in shape:
        fits = next((dimension for dimension in left if dimension.local == size), None)
        if fits is None and size != 1:
            return None
        if fits is not None:
            left.remove(fits)
        found.append(fits or _Dimension(1, (), 1))
    return found


def _dimensions(step: CompiledStep) -> list[_Dimension]:
    """The sizes of a step, those that come first in arrays first."""
    model, train, data = (step.config.get(key, {}) for key in ("model", "train", "data"))
    rules = RULE_SETS[step.config.get("mesh", {}).get("rules", "default")]
    sizes = {axis.name: axis.size for axis in step.mesh}

    def dimension(size: int, *names: str) -> _Dimension:
        axes = tuple(a for name in names for a in _axes(rules.get(name)) if sizes.get(a, 1) > 1)
        shares = math.prod(sizes[axis] for axis in axes)
        return _Dimension(size, axes, size // shares if size % shares == 0 else 0)

    def of_model(key: str, name: str) -> list[_Dimension]:
        size: Any = model.get(key)
        return [dimension(size, name)] if isinstance(size, int) else []

    rows = train.get("batch_size", 0) // train.get("accumulate_steps", 1)
    lengths = _lengths(step) or [data.get("sequence_length", 0)]
    return [
        *of_model("num_layers", "layers"),
        dimension(rows, "batch"),
        *(dimension(length, "length") for length in lengths),
        *(dimension(rows * length, "batch", "length") for length in lengths),
        *of_model("num_heads", "heads"),
        *of_model("num_kv_heads", "kv_heads"),
        *of_model("embed_dim", "activation_embed"),
        *of_model("mlp_dim", "mlp"),
        *of_model("vocab_size", "vocab"),
        *of_model("head_dim", "head_dim"),
    ]


def _lengths(step: CompiledStep) -> list[int]:
    """Of the arrays of a batch, the longest first: of tokens, of an encoder's, of predicted ones."""
    batch = (a.shape for a in step.arguments if a.kind == "batch" and len(a.shape) > 1)
    return sorted({shape[1] for shape in batch}, reverse=True)


def _axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
