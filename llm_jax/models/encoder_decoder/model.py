"""An encoder, and a decoder that attends to it (Vaswani et al. 2017; Raffel et al. 2019)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal, param, zeros
from llm_jax.core.types import Batch, Head, ModelOutput
from llm_jax.models.encoder_decoder.config import Config
from llm_jax.nn.attention import Memory
from llm_jax.nn.cache import KVCache
from llm_jax.nn.head import head_logits
from llm_jax.nn.mask import Places
from llm_jax.nn.norm import Norm
from llm_jax.nn.precision import Precision
from llm_jax.nn.sinusoid import sinusoidal_positions
from llm_jax.nn.transformer import Stack, dropout
from llm_jax.sharding.rules import active_rules, constrain


class EncoderDecoder(nnx.Module):
    """Logits of the next of `tokens`, given `encoder_tokens`; one embedding table for both.

    A row may hold several examples: a token sees what has its segment id, in `segment_ids` and
    `encoder_segment_ids`.
    """

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        init = normal(config.init_stddev)
        makers = {"precision": precision, "rngs": rngs}
        self.embed = param(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), init)
        self.encoder = Stack(config.encoder(), **makers)
        self.decoder = Stack(config.decoder(), **makers)
        if config.attention_scale is not None:
            # T5 has the scale of the scores in the queries' initial weights instead.
            factor = config.head_dim**-0.5 / config.attention_scale
            for layers in (self.encoder.layers, self.decoder.layers):
                _scale(layers.attention.query, factor)
            _scale(self.decoder.layers.cross_attention.query, factor)
        if config.norm_placement == "pre":
            self.encoder_norm = Norm(config.embed_dim, config.norm_config, **makers)
            self.decoder_norm = Norm(config.embed_dim, config.norm_config, **makers)
        if not config.tie_embeddings:
            shape = (config.embed_dim, config.vocab_size)
            self.head = param(rngs, shape, ("embed", "vocab"), init)
        if config.head_bias:
            self.head_bias = param(rngs, (config.vocab_size,), ("vocab",), zeros)

    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        capture: tuple[str, ...] = (),
    ) -> ModelOutput:
        """Logits [B, T, V] float32 and the hidden states [B, T, D] they came from.

        Args:
          cache: one of `start`; the encoder does not run then.
          capture: names are those of the two stacks, "encoder.residual", "decoder.cross_attention" ...
        """
        keys = jax.random.split(key) if train and key is not None else (None, None)
        tokens, captured, memory = batch["tokens"], {}, None
        if cache is None:
            memory, seen = self._encode(batch, keys[0], _of("encoder", capture))
            captured |= {f"encoder.{name}": value for name, value in seen.items()}
            self._check_length("tokens", tokens)
        places = Places.of(tokens, batch.get("segment_ids"), batch.get("positions"))
        keys = (None,) * 3 if keys[1] is None else jax.random.split(keys[1], 3)
        x = self._embedded(tokens, places, keys[0])
        with jax.named_scope("decoder"):
            out = self.decoder(
                x, places, memory=memory, key=keys[1], cache=cache, capture=_of("decoder", capture)
            )
        captured |= {f"decoder.{name}": value for name, value in out.captured.items()}
        x = self._finished("decoder_norm", out.x, keys[2])
        if self.config.scale_outputs:
            x = x * jnp.asarray(self.config.embed_dim**-0.5, x.dtype)
        head = self._head()
        logits = head_logits(self.precision, x, head)
        return ModelOutput(logits, x, head, out.cache, captured=captured)

    def encode(self, batch: Batch) -> Memory:
        """What the decoder attends to, of encoder_tokens [B, S]."""
        return self._encode(batch, None, ())[0]

    def start(self, memory: Memory, max_length: int) -> KVCache:
        """A cache for `max_length` decoder tokens, with the keys and values of the memory."""
        config = self.config
        cache = KVCache.empty(
            num_layers=config.num_decoder_layers,
            batch_size=memory.x.shape[0],
            max_length=max_length,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            dtype=self.precision.dtype,
        )
        keys, values = self.decoder.memory_keys_values(memory)
        return dataclasses.replace(
            cache, memory_keys=keys, memory_values=values, memory_places=memory.places
        )

    def _encode(self, batch, key, capture) -> tuple[Memory, dict[str, jax.Array]]:
        tokens = batch["encoder_tokens"]
        self._check_length("encoder_tokens", tokens)
        places = Places.of(tokens, batch.get("encoder_segment_ids"), batch.get("encoder_positions"))
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self._embedded(tokens, places, keys[0])
        with jax.named_scope("encoder"):
            out = self.encoder(x, places, key=keys[1], capture=capture)
        return Memory(self._finished("encoder_norm", out.x, keys[2]), places), out.captured

    @jax.named_scope("embed")
    def _embedded(self, tokens, places, key):
        config = self.config
        # Gathered whole over "fsdp" before the lookup: see models/gpt/model.py.
        x = constrain(self.embed[...], "vocab", None)[tokens]
        if config.scale_embeddings:
            x = x * config.embed_dim**0.5
        if config.position == "sinusoidal":
            x = x + sinusoidal_positions(places.positions, config.embed_dim)
        x = dropout(self.precision.cast(x), config.dropout, key)
        return constrain(x, "batch", "residual_length", "activation_embed")

    def _finished(self, norm: str, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The end of a stack, whose last norm "post" has in its last block."""
        if self.config.norm_placement == "post":
            return x
        with jax.named_scope(norm):
            # T5 drops units of the outputs, too (section 2.1).
            return dropout(getattr(self, norm)(x), self.config.dropout, key)

    def _check_length(self, name: str, tokens: jax.Array) -> None:
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"{name}: length {tokens.shape[1]} exceeds the model's max_length "
                f"{self.config.max_length}"
            )
        rules = active_rules()
        if rules is not None and rules.shares("length") > 1:
            raise ValueError("an encoder-decoder needs whole sequences: use a mesh with context=1")

    def _head(self) -> Head:
        bias = self.head_bias[...] if self.config.head_bias else None
        if self.config.tie_embeddings:
            return Head(self.embed[...], "btd,vd->btv", bias=bias)
        return Head(self.head[...], "btd,dv->btv", bias=bias)


def _of(stack: str, capture: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.removeprefix(f"{stack}.") for name in capture if name.startswith(f"{stack}."))


def _scale(parameter: nnx.Param, factor: float) -> None:
    parameter[...] = parameter[...] * factor


def make(config: Config, *, precision: Precision, rngs: nnx.Rngs) -> EncoderDecoder:
    return EncoderDecoder(config, precision=precision, rngs=rngs)
