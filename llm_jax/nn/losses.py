"""Token losses, in float32: of logits that are there, and of a head whose logits never are.

`head_loss` takes the place of the head's matmul and `token_loss` in training, `head_nats` in
evaluation, where it gives the loss of each token, without a gradient. How they do without logits
of all tokens, on one device and on a mesh, is in nn/head_loss.py.

Smoothed labels (Szegedy et al. 2016, section 7) are (1 - s) of the target and s / V of each of the
V ids, the target among them: the loss is (1 - s) * -log p(target) + s * mean over V of -log p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.types import Head, Model, ModelOutput
from llm_jax.nn.head_loss import HeadLoss, Job, nats_on_mesh, sums_on_mesh
from llm_jax.nn.precision import Precision

# Float32 logits of one chunk on one device: small models take one chunk, without a loop.
CHUNK_BYTES = 256 * 2**20
# A chunk reads and writes the float32 weight gradient once. On a TPU v5p that takes as long as the
# chunk's matmuls at some 350 tokens, on a v6e at 1,100, whatever the sizes of the head.
MIN_CHUNK_TOKENS = 1024


class TokenLoss(NamedTuple):
    """All float32 in the shape of the targets; `correct`: 1 where the target's logit is largest."""

    cross_entropy: jax.Array
    log_z: jax.Array
    correct: jax.Array


def token_loss(logits: jax.Array, targets: jax.Array) -> TokenLoss:
    """Cross entropy in nats and log Z of each position.

    Args:
      logits: [..., V] float32.
      targets: [...] int32.
    """
    cross_entropy, log_z, correct = _cross_entropy(logits, targets)
    return TokenLoss(cross_entropy, log_z, correct)


def logits_loss(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> HeadLoss:
    """What `head_loss` computes, of logits [..., V] float32 that are there, bias and cap included.

    Args:
      targets: [...] int32, of tokens or of whole examples.
      weights: [...] float32.
    """
    losses = token_loss(logits, targets)
    cross_entropy = jnp.sum(losses.cross_entropy * weights)
    z = z_loss * jnp.sum(jnp.square(losses.log_z) * weights)
    loss = cross_entropy + z
    if label_smoothing:
        of_any = losses.log_z - jnp.mean(logits, axis=-1)
        loss += label_smoothing * jnp.sum((of_any - losses.cross_entropy) * weights)
    return HeadLoss(loss, cross_entropy, z, jnp.sum(losses.correct * weights))


def output_loss(
    model: Model,
    output: ModelOutput,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> HeadLoss:
    """`head_loss` of a model's output, or `logits_loss` where it has no head."""
    if output.head is None:
        return logits_loss(output.logits, targets, weights, z_loss, label_smoothing)
    return head_loss(
        model.precision, output.hidden, output.head, targets, weights, z_loss, label_smoothing
    )


def output_nats(model: Model, output: ModelOutput, targets: jax.Array) -> jax.Array:
    """Cross entropy of each position, [B, T] float32; no derivative where the output has a head."""
    if output.head is None:
        return token_loss(output.logits, targets).cross_entropy
    return head_nats(model.precision, output.hidden, output.head, targets)


def head_loss(
    precision: Precision,
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    *,
    chunk_bytes: int | None = None,
) -> HeadLoss:
    """`logits_loss` of the head's logits, without the logits.

    Args:
      hidden: [B, T, D] in any float dtype.
      head: its weights and bias get gradients, in their dtype.
      targets: [B, T] int32.
      weights: [B, T] float32, of the positions; they get no gradient.
      z_loss: weight of log(Z)^2.
      label_smoothing: share of a target's probability that is spread over all ids, in [0, 1).
      chunk_bytes: most bytes of float32 logits on one device; by default CHUNK_BYTES, or what
        MIN_CHUNK_TOKENS take if that is more.
    """
    job = Job.of(precision, *_chunk_limits(chunk_bytes), z_loss, label_smoothing)
    sums = sums_on_mesh(job, hidden, head, targets, weights)
    return HeadLoss(sums.loss_sum, *map(jax.lax.stop_gradient, sums[1:]))


def head_nats(
    precision: Precision,
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    *,
    chunk_bytes: int | None = None,
) -> jax.Array:
    """Cross entropy of each position, [B, T] float32; arguments as of `head_loss`. No derivative."""
    job = Job.of(precision, *_chunk_limits(chunk_bytes))
    return nats_on_mesh(job, hidden, head, targets)


def _chunk_limits(chunk_bytes: int | None) -> tuple[int, int]:
    return (CHUNK_BYTES, MIN_CHUNK_TOKENS) if chunk_bytes is None else (chunk_bytes, 0)


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
