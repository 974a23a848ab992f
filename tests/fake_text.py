"""A tokenizer of given pieces, packed rows, and a model whose outputs are given."""

import jax.numpy as jnp
import numpy as np

from llm_jax.core.types import Head, ModelOutput
from llm_jax.nn.precision import Precision

SPECIAL = ("<pad>", "[CLS]", "[SEP]", "[MASK]", "[R]", "[S]", "[X]")
PAD, CLS, SEP, MASK = range(4)


class FakeTokenizer:
    """Special tokens first, then sentinels, then pieces."""

    bos_id, eos_id, pad_id = CLS, SEP, PAD

    def __init__(self, pieces, special=SPECIAL, sentinels=0):
        self.special = [*special, *(f"<extra_id_{i}>" for i in range(sentinels))]
        self.pieces = [p.encode() if isinstance(p, str) else p for p in pieces]
        self.first = len(self.special)
        self.vocab_size = self.first + len(self.pieces)

    def ids(self, *pieces):
        return [self.first + self.pieces.index(p.encode()) for p in pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i - self.first] for i in ids if i >= self.first)

    def token_id(self, piece):
        return self.special.index(piece) if piece in self.special else None


def documents_in_rows(num_rows, length, first_id, vocab_size, *, mean=20, seed=0, padded=True):
    """[B, length] int32: windows of documents of random ids, some of them cut short by padding."""
    rng = np.random.default_rng(seed)
    stream = []
    while len(stream) < num_rows * length:
        text = rng.integers(first_id, vocab_size, 1 + rng.geometric(1 / mean))
        stream += [CLS, *text.tolist(), SEP]
    rows = np.array(stream[: num_rows * length], np.int32).reshape(num_rows, length)
    if padded:
        for row in rows[:: max(num_rows // 5, 1)]:
            row[rng.integers(0, length) :] = -1
        rows[-1] = -1
    return rows


class FakeModel:
    """hidden = an embedding of what stands at each place; class_logits = a function of the row."""

    precision = Precision.on("cpu", "float32")

    def __init__(self, vocab_size, dim=8, pairs=False, seed=0):
        rng = np.random.default_rng(seed)
        self.embedding = jnp.asarray(rng.normal(size=(vocab_size, dim)), jnp.float32)
        self.weights = jnp.asarray(rng.normal(size=(vocab_size, dim)), jnp.float32)
        self.pair = jnp.asarray(rng.normal(size=(dim, 2)), jnp.float32)
        self.pairs = pairs

    def __call__(self, batch, *, train=False, key=None):
        hidden = self.embedding[batch["tokens"]]
        pooled = jnp.mean(hidden, axis=1)
        if "predict_positions" in batch:
            hidden = jnp.take_along_axis(hidden, batch["predict_positions"][..., None], axis=1)
        head = Head(self.weights, "btd,vd->btv")
        return ModelOutput(
            None, hidden, head, class_logits=pooled @ self.pair if self.pairs else None
        )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def make_batch(objective, tokenizer, rows, row_ids=None, partners=None):
    """What the objective's transforms make of rows."""
    element = {"rows": rows, "row_ids": np.arange(len(rows)) if row_ids is None else row_ids}
    if partners is not None:
        element["partners"] = partners
    for transform in objective.transforms(tokenizer):
        element = transform.map(element)
    return element


def shapes_of(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}
