"""How well a causal model predicts documents: perplexity per token, bits per byte, file by file.

Long documents are read in windows. Each window but the first begins with `context` tokens whose
targets the window before it has already scored, so that no token is predicted from nothing (the
sliding window of Baevski & Auli 2019, section 4.3). Every token is scored exactly once, the end of
the document included: the sum of nats is the length of a code that a decoder could read back.
"""

import dataclasses
import functools
import gzip
import lzma
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.types import Batch, Model, Tokenizer
from llm_jax.nn.losses import output_nats
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import AxisRules, use_rules


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str

    @functools.cached_property
    def content(self) -> bytes:
        return self.text.encode()


@dataclasses.dataclass(frozen=True)
class DocumentScore:
    """nats: minus log probability of all `tokens` targets of the document."""

    name: str
    bytes: int
    tokens: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """An evaluator of causal models; scores `batch_size` windows at a time.

    context: tokens shared by neighbouring windows, by default half a window.
    """

    documents: Sequence[Document]
    tokenizer: Tokenizer
    sequence_length: int
    batch_size: int
    context: int | None = None

    def __post_init__(self):
        if self.context is not None and not 0 <= self.context < self.sequence_length:
            raise ValueError(
                f"eval.context {self.context} must lie in [0, {self.sequence_length}), the window"
            )

    def run(self, model: Model, rules: AxisRules) -> dict[str, float]:
        """loss (nats per token), perplexity (per token), bits_per_byte, tokens, bytes."""
        return summarize(self.score(model, rules))

    def score(self, model: Model, rules: AxisRules) -> list[DocumentScore]:
        """One score per document, in order."""
        graphdef, state = nnx.split(model)
        nats = np.zeros(len(self.documents))
        tokens = np.zeros(len(self.documents), np.int64)
        for owners, batch in self._batches():
            placed = to_global_batch(batch, rules, self.batch_size)
            sums = jax.device_get(_row_nats(graphdef, state, placed, rules))
            # Rows that fill up the last batch have no owner and no weight.
            np.add.at(nats, owners, sums[: len(owners)])
            np.add.at(tokens, owners, batch["loss_weights"].sum(1).astype(int)[: len(owners)])
        return [
            DocumentScore(d.name, len(d.content), int(n), float(x))
            for d, n, x in zip(self.documents, tokens, nats, strict=True)
        ]

    def _batches(self) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Batches of windows and the document that each of their rows belongs to."""
        shape = (self.batch_size, self.sequence_length)
        positions = np.tile(np.arange(self.sequence_length, dtype=np.int32), (self.batch_size, 1))
        empty = lambda: {  # noqa: E731
            "tokens": np.zeros(shape, np.int32),
            "targets": np.zeros(shape, np.int32),
            "loss_weights": np.zeros(shape, np.float32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": positions,
        }
        owners, batch = [], empty()
        for owner, ids, start in self._windows():
            row, length = len(owners), len(ids) - 1
            batch["tokens"][row, :length] = ids[:-1]
            batch["targets"][row, :length] = ids[1:]
            batch["loss_weights"][row, start:length] = 1
            batch["segment_ids"][row, :length] = 1
            owners.append(owner)
            if len(owners) == self.batch_size:
                yield owners, batch
                owners, batch = [], empty()
        if owners:
            yield owners, batch

    def _windows(self) -> Iterator[tuple[int, np.ndarray, int]]:
        """(document, ids of up to sequence_length + 1, first target not scored before)."""
        context = self.sequence_length // 2 if self.context is None else self.context
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        for owner, document in enumerate(self.documents):
            ids = np.array([bos, *self.tokenizer.encode(document.text), eos], np.int32)
            scored = 0
            while scored < len(ids) - 1:
                first = max(scored - context, 0)
                window = ids[first : first + self.sequence_length + 1]
                yield owner, window, scored - first
                scored = first + len(window) - 1


@functools.partial(jax.jit, static_argnames=("graphdef", "rules"))
def _row_nats(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, rules: AxisRules):
    """Weighted cross entropy summed over each row: [B] float32."""
    with use_rules(rules):
        model = nnx.merge(graphdef, state)
        output, targets = model(batch), batch["targets"]
        nats = output_nats(model, output, targets)
        row_sums = jnp.sum(nats * batch["loss_weights"], axis=1)
    return jax.lax.with_sharding_constraint(row_sums, rules.replicated())


def summarize(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """loss, perplexity, bits_per_byte, tokens and bytes over all documents."""
    nats, tokens = sum(s.nats for s in scores), sum(s.tokens for s in scores)
    size = sum(s.bytes for s in scores)
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bits per byte of one file: by the model, by `gzip -9` and by `xz -9`."""

    name: str
    bytes: int
    model: float
    gzip: float
    xz: float


def compare_with_compressors(
    documents: Sequence[Document], scores: Sequence[DocumentScore]
) -> list[Comparison]:
    """Sets each document's code length beside those of two compressors, headers included."""
    return [
        Comparison(
            document.name,
            score.bytes,
            score.bits_per_byte,
            8 * len(gzip.compress(document.content, 9)) / max(score.bytes, 1),
            8 * len(lzma.compress(document.content, preset=9)) / max(score.bytes, 1),
        )
        for document, score in zip(documents, scores, strict=True)
    ]
