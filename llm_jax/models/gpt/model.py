"""The causal language model: embeddings, a stack, a head (Radford et al. 2019; Touvron et al. 2023)."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal, param
from llm_jax.core.types import Batch, Head, ModelOutput
from llm_jax.models.gpt.config import Config
from llm_jax.nn.cache import KVCache
from llm_jax.nn.head import head_logits
from llm_jax.nn.mask import Places
from llm_jax.nn.moe import router_loss, router_metrics
from llm_jax.nn.norm import Norm
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import Stack, dropout
from llm_jax.sharding.rules import active_rules, constrain, sum_over_copies


class GPT(nnx.Module):
    """Next-token logits from `tokens`, with optional `segment_ids`, `positions` and `prefix`."""

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        init = normal(config.init_stddev)
        self.embed = param(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), init)
        if config.position == "learned":
            shape = (config.max_length, config.embed_dim)
            self.position_embed = param(rngs, shape, ("position", "embed"), init)
        transformer = config.transformer()
        self.stack = Stack(transformer, precision=precision, rngs=rngs)
        self.final_norm = Norm(config.embed_dim, transformer.norm, precision=precision, rngs=rngs)
        if not config.tie_embeddings:
            shape = (config.embed_dim, config.vocab_size)
            self.head = param(rngs, shape, ("embed", "vocab"), init)

    def __call__(
        self,
        batch: Batch,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        capture: tuple[str, ...] = (),
    ) -> ModelOutput:
        """Logits [B, T, V] float32 and the hidden states [B, T, D] they came from."""
        tokens = batch["tokens"]
        if cache is None and tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"sequence length {tokens.shape[1]} exceeds the model's max_length "
                f"{self.config.max_length}"
            )
        rules = active_rules()
        if rules is not None and rules.shares("length") > 1:
            if "positions" not in batch:
                raise ValueError(
                    "a batch in shares of the sequence needs positions: see length_order"
                )
            if "visible" in batch:
                raise ValueError("what is visible needs whole sequences: use a mesh with context=1")
        places = Places.of(tokens, batch.get("segment_ids"), batch.get("positions"))
        keys = jax.random.split(key) if train and key is not None else (None, None)
        # Gathered whole over "fsdp" before the lookup, as any other weight: else the lookup would
        # give activations in shares of D. In float32, so that its gradient sums in float32.
        with jax.named_scope("embed"):
            table = constrain(self.embed[...], "vocab", None)
            x = self.precision.cast(table[tokens])
            if self.config.scale_embeddings:
                x = x * jnp.asarray(self.config.embed_dim**0.5, x.dtype)
            if self.config.position == "learned":
                x = x + self.precision.cast(self.position_embed[...][places.positions])
            x = dropout(x, self.config.dropout, keys[0])
            x = constrain(x, "batch", "residual_length", "activation_embed")
        with jax.named_scope("stack"):
            out = self.stack(
                x, places, prefix=batch.get("prefix"), visible=batch.get("visible"), key=keys[1],
                cache=cache, capture=capture,
            )  # fmt: skip
        with jax.named_scope("final_norm"):
            x = self.final_norm(out.x)
        head = self._head()
        logits = head_logits(self.precision, x, head)
        aux_loss, metrics = 0.0, {}
        if out.router is not None:
            router = sum_over_copies(out.router)
            aux_loss = router_loss(self.config.experts, router)
            metrics = router_metrics(router)
        return ModelOutput(
            logits, x, head, out.cache, aux_loss=aux_loss, metrics=metrics, captured=out.captured
        )

    def _head(self) -> Head:
        cap = self.config.final_soft_cap
        if self.config.tie_embeddings:
            return Head(self.embed[...], "btd,vd->btv", soft_cap=cap)
        return Head(self.head[...], "btd,dv->btv", soft_cap=cap)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens, in the compute dtype."""
        config = self.config
        return KVCache.empty(
            num_layers=config.num_layers,
            batch_size=batch_size,
            max_length=max_length,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.precision.dtype,
        )


def make(config: Config, *, precision: Precision, rngs: nnx.Rngs) -> GPT:
    return GPT(config, precision=precision, rngs=rngs)
