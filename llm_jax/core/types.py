"""The few types that every layer shares: batches, model outputs, losses and the protocols.

Reserved batch keys, all host arrays of a batch have the global batch size B as first dimension:

| key            | shape          | dtype   | meaning                                                       |
|----------------|----------------|---------|---------------------------------------------------------------|
| tokens         | [B, T]         | int32   | input token ids                                               |
| targets        | [B, T]         | int32   | the id to predict at each position                            |
| loss_weights   | [B, T]         | float32 | 0 where a position has no target (padding, document borders)  |
| segment_ids    | [B, T]         | int32   | 1, 2, ... one per packed document; 0 is padding               |
| positions      | [B, T]         | int32   | position inside the document, from 0                          |
| prefix         | [B, T]         | int32   | 1 for tokens that their whole segment sees (prefix LM)        |
| visible        | [B, T, S]      | bool    | gpt: False where a query must not see a key of its own segment|
| encoder_tokens | [B, S]         | int32   | input of an encoder; also encoder_segment_ids, _positions     |
| token_types    | [B, T]         | int32   | 0 and 1: the first and the second text of a pair (BERT)       |
| predict_positions | [B, P]      | int32   | where the targets are, if not everywhere: targets and         |
|                |                |         | loss_weights are [B, P] then, and so is the model's `hidden`  |
| images         | [B, Y, X, C]   | float32 | pixels in 0..1                                                |
| labels         | [B]            | int32   | class of a whole example                                      |
| label_weights  | [B]            | float32 | 0 where a row is padding                                      |
| answer_start, answer_end | [B]  | int32   | first and last token of an answer in the row                  |
| answer_places  | [B, T]         | float32 | 1 where an answer may stand                                   |
| rejected_*     |                |         | tokens, targets ... of the worse of two answers (DPO)         |
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """From hidden states to logits: `einsum(spec, hidden, weights) + bias`, then the soft cap.

    weights:  [V, D] with spec "btd,vd->btv" (the embedding again), [D, V] with "btd,dv->btv".
    bias:     [V] float32 (BERT), or None.
    soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, section 2).
    """

    weights: jax.Array
    spec: str = dataclasses.field(metadata={"static": True})
    bias: jax.Array | None = None
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What every model returns.

    logits:   [B, T, V] float32, or None where the model stops at `hidden`. Under jit they cost
              nothing where only `hidden` and `head` are used.
    hidden:   [B, T, D] in the compute dtype, after the final norm.
    head:     what makes the logits of `hidden`, for losses that do without them.
    cache:    the advanced generation cache, if one was given.
    class_logits: [B, C] float32, of a head over whole examples.
    aux_loss: scalar added to the objective's loss (router losses).
    metrics:  what else a step reports, such as the experts' load.
    captured: tensors asked for by `capture=(name, ...)`.
    """

    logits: jax.Array | None
    hidden: jax.Array | None = None
    head: Head | None = None
    cache: Any = None
    class_logits: jax.Array | None = None
    aux_loss: jax.Array | float = 0.0
    metrics: "dict[str, Weighted]" = dataclasses.field(default_factory=dict)
    captured: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Weighted(NamedTuple):
    """A sum and its weight: adding two of them is exact, under accumulation and sharding alike."""

    sum: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self.sum / jnp.maximum(self.weight, 1e-9)


class LossOutput(NamedTuple):
    loss: Weighted
    metrics: dict[str, Weighted]

    @classmethod
    def of(
        cls,
        output: ModelOutput,
        loss_sum: jax.Array,
        weight: jax.Array,
        metrics: dict[str, Weighted],
        *,
        train: bool,
    ) -> "LossOutput":
        """An objective's sums, with what the model reports and, in training, its own loss."""
        aux_loss = output.aux_loss if train else 0.0
        return cls(Weighted(loss_sum + aux_loss * weight, weight), metrics | output.metrics)


class Source(Protocol):
    """Documents by index, hence shuffled globally and resumed exactly.

    `source[i]` is a dict with at least "text": str or bytes. An index is stable for the life of the
    underlying files. The document's name, if it has one, is under "name".
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Tokenizer(Protocol):
    """Text to ids and back.

    `bos_id` starts every document and `eos_id` ends it; they may be the same id (GPT-2), which then
    stands once between documents. `encode` never yields either of them from plain text.
    `decode(encode(text)) == text` for every str without lone surrogates.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of these ids; a lone piece of a UTF-8 character stays as it is."""

    def id_to_piece(self, token_id: int) -> str:
        """How to show one token to a person."""

    def token_id(self, piece: str) -> int | None:
        """The id of a special token by its text, such as "[MASK]"; None if there is none."""

    def save(self, directory: Path) -> None:
        """Writes the files `load_tokenizer(directory)` needs."""


class Model(Protocol):
    """The same call for every family; an nnx.Module.

    precision: the llm_jax.nn.precision.Precision of its matmuls.
    """

    precision: Any

    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        cache: Any = None,
        capture: tuple[str, ...] = (),
    ) -> ModelOutput: ...


class Objective(Protocol):
    """A task: how its examples are made on the host, and its loss on the device.

    examples: False for rows of packed text, as here; True for records (`ExampleObjective`).
    partner_rows: whether each row needs another, unrelated one of the same split.
    evaluators: what is measured at the end, by the names of evals/conclude.py.

    A step's work is taken to be the model's over one batch; an objective for which it is more says how
    many times by `model_passes`.
    """

    examples: bool
    partner_rows: bool
    evaluators: tuple[str, ...]

    def row_length(self, sequence_length: int) -> int:
        """Tokens of packed text that one row of `sequence_length` positions needs."""

    def transforms(self, tokenizer: Tokenizer) -> list:
        """Grain transformations from {"rows", "row_ids"} to the reserved keys, a batch at a time.

        rows: [B, row_length] int32, -1 where a row ended early; row_ids: [B] int64, the rows'
        numbers in the run, from which any randomness is seeded. With `partner_rows` also partners:
        [B, row_length] int32, which depend on row_ids alone.
        """

    def batch_spec(
        self, batch_size: int, sequence_length: int
    ) -> dict[str, jax.ShapeDtypeStruct]: ...

    def loss(
        self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool
    ) -> LossOutput: ...


class ExampleObjective(Protocol):
    """An objective whose examples are records of the sources instead of rows; `examples` is True.

    Its other half, `batch_spec` and `loss`, is that of `Objective`. examples_per_row: records in a row.
    """

    examples: bool
    examples_per_row: int
    evaluators: tuple[str, ...]

    def transforms(self, tokenizer: Tokenizer, sequence_length: int) -> list:
        """Grain transformations from {"examples", "names", "row_ids"} to the reserved keys.

        A batch at a time. examples: list of B * examples_per_row dicts, a record's fields; {} is padding, which only the
        end of the held-out split has. names: as many str, of the records, for messages; the field
        "name" is that too where a record has none of its own. row_ids: as many int64, the records' numbers in the run.

        Raises:
          ConfigError: on the way, where a record lacks a field or holds something else there.
        """

    def batch_spec(
        self, batch_size: int, sequence_length: int
    ) -> dict[str, jax.ShapeDtypeStruct]: ...

    def loss(
        self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool
    ) -> LossOutput: ...
