"""A bidirectional encoder and the heads on it (Devlin et al. 2018, section 3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal, param, zeros
from llm_jax.core.types import Batch, Head, ModelOutput
from llm_jax.models.bert.config import Config
from llm_jax.nn.head import head_logits
from llm_jax.nn.mask import Places
from llm_jax.nn.mlp import activate
from llm_jax.nn.norm import Norm
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import Stack, dropout
from llm_jax.sharding.rules import active_rules, constrain


class Bert(nnx.Module):
    """Reads `tokens`, with optional `segment_ids`, `positions`, `token_types`, `predict_positions`.

    Output: logits and `head` of heads over tokens, class_logits of heads over the whole row; with the head
    "none" hidden [B, T, D] alone.
    """

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        init, width = normal(config.init_stddev), config.embed_dim
        makers = {"precision": precision, "rngs": rngs}
        self.embed = param(rngs, (config.vocab_size, width), ("vocab", "embed"), init)
        table = lambda rows: param(rngs, (rows, width), ("position", "embed"), init)  # noqa: E731
        self.position_embed = table(config.num_positions)
        self.type_embed = table(config.num_token_types)
        self.embed_norm = Norm(width, config.norm, **makers)
        self.stack = Stack(config.transformer(), **makers)
        if config.pooler:
            self.pooler = Dense(config, width, "features", **makers)
        if config.num_classes is not None:
            self.class_head = Dense(config, config.num_classes, "labels", **makers)
        if config.head in ("masked_lm", "pretraining"):
            self.mlm_head = MlmHead(config, **makers)
        if config.num_token_classes is not None:
            self.token_head = Dense(config, config.num_token_classes, "labels", **makers)

    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> ModelOutput:
        """hidden is [B, P, D], and logits [B, P, V], where the batch has predict_positions [B, P]."""
        config, tokens = self.config, batch["tokens"]
        if tokens.shape[1] > config.max_length:
            raise ValueError(
                f"sequence length {tokens.shape[1]} exceeds the model's max_length {config.max_length}"
            )
        rules = active_rules()
        if rules is not None and rules.shares("length") > 1:
            raise ValueError("this encoder needs whole sequences: use a mesh with context=1")
        places = Places.of(tokens, batch.get("segment_ids"), batch.get("positions"))
        keys = jax.random.split(key, 3) if train and key is not None else (None,) * 3
        x = self._embedded(tokens, places, batch.get("token_types"), keys[0])
        with jax.named_scope("stack"):
            out = self.stack(x, places, key=keys[1], capture=capture)
        class_logits = None
        if config.num_classes is not None:
            class_logits = self._class_logits(out.x, keys[2])
        hidden, head = self._token_head(out.x, batch.get("predict_positions"), keys[2])
        logits = None if head is None else head_logits(self.precision, hidden, head)
        return ModelOutput(logits, hidden, head, class_logits=class_logits, captured=out.captured)

    @jax.named_scope("embed")
    def _embedded(self, tokens, places, token_types, key):
        # Gathered whole over "fsdp" before the lookup: see models/gpt/model.py.
        x = constrain(self.embed[...], "vocab", None)[tokens]
        x = x + self.position_embed[...][places.positions + self.config.position_offset]
        x = x + self._type_embedded(token_types)
        x = dropout(self.embed_norm(self.precision.cast(x)), self.config.dropout, key)
        return constrain(x, "batch", "residual_length", "activation_embed")

    def _type_embedded(self, token_types):
        """[B, T, D], or [D] where all tokens are of one type.

        Not looked up: the derivative would add all tokens of the batch to two rows, one by one.
        """
        table = constrain(self.type_embed[...], "position", None)
        if token_types is None or len(table) == 1:
            return table[0]
        types = token_types[..., None]
        return sum(jnp.where(types == number, row, 0) for number, row in enumerate(table))

    def _class_logits(self, x: jax.Array, key) -> jax.Array:
        """[B, T, D] to [B, C] float32, from the first token."""
        with jax.named_scope("pooler"):
            x = jnp.tanh(self.pooler(x[:, :1]).astype(jnp.float32)).astype(x.dtype)
        if self.config.head == "sequence_classification":
            x = dropout(x, self.config.dropout, key)
        with jax.named_scope("class_head"):
            return self.class_head(x)[:, 0].astype(jnp.float32)

    def _token_head(self, x, predict_positions, key):
        """(hidden, head) of a head over tokens, or (x, None)."""
        config = self.config
        if config.head in ("masked_lm", "pretraining"):
            if predict_positions is not None:
                x = jnp.take_along_axis(x, predict_positions[..., None], axis=1)
            bias = self.mlm_head.bias[...]
            return self.mlm_head(x), Head(self.embed[...], "btd,vd->btv", bias=bias)
        if config.num_token_classes is None:
            return x, None
        if config.head == "token_classification":
            x = dropout(x, config.dropout, key)
        layer = self.token_head
        return x, Head(layer.weight[...], "btd,dv->btv", bias=layer.bias[...])


class Dense(nnx.Module):
    """[B, T, D] to [B, T, F] with a bias, in the compute dtype."""

    def __init__(
        self, config: Config, size: int, axis: str, *, precision: Precision, rngs: nnx.Rngs
    ):
        self.precision = precision
        shape = (config.embed_dim, size)
        self.weight = param(rngs, shape, ("embed", axis), normal(config.init_stddev))
        self.bias = param(rngs, (size,), (axis,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.precision.einsum("btd,df->btf", x, self.weight[...])
        return self.precision.add_bias(y, self.bias[...])


class MlmHead(nnx.Module):
    """What stands before the embedding table that makes the logits; `bias` is theirs."""

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.activation = config.activation
        makers = {"precision": precision, "rngs": rngs}
        self.dense = Dense(config, config.embed_dim, "features", **makers)
        self.norm = Norm(config.embed_dim, config.norm, **makers)
        self.bias = param(rngs, (config.vocab_size,), ("vocab",), zeros)

    @jax.named_scope("mlm_head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, D] to the same."""
        return self.norm(activate(self.activation, self.dense(x), None))


def mean_pooled(hidden: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sentence embeddings of unit length, [B, D] float32 (Reimers & Gurevych 2019, section 3).

    Args:
      hidden: [B, T, D]; segment_ids: [B, T], 0 is padding.
    """
    weights = (segment_ids > 0).astype(jnp.float32)[..., None]
    mean = jnp.sum(hidden.astype(jnp.float32) * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def make(config: Config, *, precision: Precision, rngs: nnx.Rngs) -> Bert:
    return Bert(config, precision=precision, rngs=rngs)
