"""Token losses, in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
    """All [B, T] float32; `correct` is 1 where the target has the largest logit."""

    cross_entropy: jax.Array
    log_z: jax.Array
    correct: jax.Array


def token_loss(logits: jax.Array, targets: jax.Array) -> TokenLoss:
    """Cross entropy in nats and log Z of each position.

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] int32.
    """
    cross_entropy, log_z, correct = _cross_entropy(logits, targets)
    return TokenLoss(cross_entropy, log_z, correct)


@jax.custom_vjp
def _cross_entropy(logits, targets):
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits, targets):
    logits = logits.astype(jnp.float32)
    peak = jnp.max(logits, axis=-1)
    log_z = jnp.log(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)) + peak
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (at_target >= peak).astype(jnp.float32)
    return (log_z - at_target, log_z, correct), (logits, targets, log_z)


def _cross_entropy_backward(residuals, cotangents):
    # Written out so that the gradient is one pass over the logits: the derivative of the gather
    # alone would be a scatter into an array of zeros as large as the logits.
    logits, targets, log_z = residuals
    d_cross_entropy, d_log_z, _ = cotangents
    probabilities = jnp.exp(logits - log_z[..., None])
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    weight = (d_cross_entropy + d_log_z)[..., None]
    return weight * probabilities - jnp.where(is_target, d_cross_entropy[..., None], 0.0), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
