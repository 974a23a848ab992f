"""What a linear model can read from hidden states (Alain & Bengio 2016).

Each text becomes the mean of its tokens' hidden states, layer by layer; a logistic regression on those of
one split is tried on another. Where it succeeds, the layer has the property in a form that is easy to use.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.evals.findings import Findings, Items
from llm_jax.evals.records import read_records
from llm_jax.evals.scorer import padded_length
from llm_jax.evals.subject import Subject
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import AxisRules, use_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """train, test: files of JSON lines of labelled texts."""

    train: str
    test: str
    name: str = "linear_probe"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Labelled:
    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """An evaluator of every model that captures "residual": decoders and encoders."""

    train: Sequence[Labelled]
    test: Sequence[Labelled]
    batch_tokens: int = 4096

    def __post_init__(self):
        known = {example.label for example in self.train}
        unknown = sorted({example.label for example in self.test} - known)
        if unknown:
            raise ConfigError(f"label {unknown[0]!r} is tested, but no text to train on has it")
        if len(known) < 2:
            raise ConfigError("a probe needs texts of two labels at least")

    def run(self, subject: Subject) -> Findings:
        """Accuracies in 0..1 on the tested texts: layer/1, layer/2, ... and majority, of the commonest label."""
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ConfigError("a probe needs scikit-learn: pip install 'llm_jax[eval]'") from error

        states, labels = [], []
        for split in (self.train, self.test):
            texts = [example.text for example in split]
            states.append(
                hidden_means(
                    subject.model, texts, subject.tokenizer, subject.rules, self.batch_tokens
                )
            )
            labels.append(np.array([example.label for example in split]))
        items = {}
        for layer in range(states[0].shape[1]):
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(states[0][:, layer], labels[0])
            right = probe.predict(states[1][:, layer]) == labels[1]
            items[f"layer/{layer + 1}"] = Items.of(self.test, right)
        names, counts = np.unique(labels[0], return_counts=True)
        majority = float(np.mean(labels[1] == names[counts.argmax()]))
        return Findings.of_items(items, majority=majority)


def make(config: Config) -> LinearProbe:
    return LinearProbe(read_records(config.train, Labelled), read_records(config.test, Labelled))


def hidden_means(
    model: Model,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    rules: AxisRules,
    batch_tokens: int,
) -> np.ndarray:
    """[N, L, D] float32: the mean over each text's tokens of what every layer gives.

    Texts longer than the model count with their beginning.
    """
    graphdef, state = nnx.split(model)
    most = model.config.max_length
    rows = [[tokenizer.bos_id, *ids][:most] for ids in tokenizer.encode_batch(list(texts))]
    shares = rules.shares("batch")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: dict[int, np.ndarray] = {}
    while order:
        length = min(padded_length(len(rows[order[0]])), most)
        size = -(-max(batch_tokens // length, 1) // shares) * shares
        part, order = order[:size], order[size:]
        batch = {name: np.zeros((size, length), np.int32) for name in ("tokens", "segment_ids")}
        batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (size, 1))
        for row, i in enumerate(part):
            batch["tokens"][row, : len(rows[i])] = rows[i]
            batch["segment_ids"][row, : len(rows[i])] = 1
        means = _means(graphdef, state, to_global_batch(batch, rules, size), rules)
        found |= dict(zip(part, np.asarray(means), strict=False))
    return np.stack([found[i] for i in range(len(rows))])


@functools.partial(jax.jit, static_argnames=("graphdef", "rules"))
def _means(graphdef, state, batch, rules: AxisRules) -> jax.Array:
    with use_rules(rules):
        out = nnx.merge(graphdef, state)(batch, capture=("residual",))
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    states = out.captured["residual"]  # [L, B, T, D]
    means = jnp.einsum(
        "lbtd,bt->bld", states, real.astype(states.dtype), preferred_element_type=jnp.float32
    )
    means /= jnp.maximum(real.sum(axis=1), 1)[:, None, None]
    return jax.lax.with_sharding_constraint(means, rules.replicated())
