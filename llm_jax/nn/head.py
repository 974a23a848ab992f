"""Logits from hidden states."""

import jax
import jax.numpy as jnp

from llm_jax.core.types import Head
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import constrain


@jax.named_scope("head")
def head_logits(precision: Precision, hidden: jax.Array, head: Head) -> jax.Array:
    """hidden: [B, T, D] to logits [B, T, V] float32, over the mesh by batch, length and vocabulary."""
    logits = precision.einsum(head.spec, hidden, head.weights, out_dtype=jnp.float32)
    if head.bias is not None:
        logits = logits + head.bias
    if head.soft_cap is not None:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    return constrain(logits, "batch", "length", "vocab")
