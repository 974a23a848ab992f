"""Token losses, in float32: of logits that are there, and of a head whose logits never are.

`head_loss` takes the place of the head's matmul and `token_loss` in training. Logits exist a chunk of
tokens at a time, and the gradient is made in the same visit (as in Hsu et al. 2024, Liger Kernel):
three matmuls with the head's weights in all, and nothing of size [B, T, V] at any time. `head_nats`
is the same for evaluation: the loss of each token, without a gradient.

Over a mesh it runs inside a `shard_map`, since the partitioner would sum the weight gradient over
devices in every chunk: here each device adds up its own tokens' and the sum over devices is taken
once. The weights are gathered once, in the compute dtype. With the vocabulary in shares, devices
exchange two numbers per token for the softmax.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.types import Head
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import AxisRules, active_rules

# Float32 logits of one chunk on one device: small models take one chunk, without a loop.
CHUNK_BYTES = 256 * 2**20
# A chunk reads and writes the float32 weight gradient once. On a TPU v5p that takes as long as the
# chunk's matmuls at some 350 tokens, on a v6e at 1,100, whatever the sizes of the head.
MIN_CHUNK_TOKENS = 1024


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


class HeadLoss(NamedTuple):
    """Sums over the weighted positions, float32 scalars; only `loss_sum` has a gradient.

    loss_sum: cross_entropy_sum + z_loss_sum; cross_entropy_sum: nats; z_loss_sum: coefficient
    included; correct_sum: positions where the target has the largest logit.
    """

    loss_sum: jax.Array
    cross_entropy_sum: jax.Array
    z_loss_sum: jax.Array
    correct_sum: jax.Array


def logits_loss(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0
) -> HeadLoss:
    """What `head_loss` computes, of logits [B, T, V] float32 that are there."""
    losses = token_loss(logits, targets)
    cross_entropy = jnp.sum(losses.cross_entropy * weights)
    z = z_loss * jnp.sum(jnp.square(losses.log_z) * weights)
    return HeadLoss(cross_entropy + z, cross_entropy, z, jnp.sum(losses.correct * weights))


def head_loss(
    precision: Precision,
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    *,
    chunk_bytes: int | None = None,
) -> HeadLoss:
    """Next-token loss of `token_loss(einsum(head.spec, hidden, head.weights))`, without the logits.

    Args:
      hidden: [B, T, D] in any float dtype.
      targets: [B, T] int32.
      weights: [B, T] float32, of the positions; they get no gradient.
      z_loss: weight of log(Z)^2.
      chunk_bytes: most bytes of float32 logits on one device; by default CHUNK_BYTES, or what
        MIN_CHUNK_TOKENS take if that is more.
    """
    job = _Job.of(precision, head, z_loss, chunk_bytes)
    sums = _head_loss(job, hidden, head.weights, targets, weights)
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
    job = _Job.of(precision, head, 0.0, chunk_bytes)
    if job.rules is None:
        return _local_nats(job, _Axes(), hidden, precision.cast(head.weights), targets)
    axes = _Axes.of(job.rules, hidden.shape[1])
    return jax.shard_map(
        functools.partial(_local_nats, job, axes),
        mesh=job.rules.mesh,
        in_specs=(axes.of_tokens, axes.of_weights(job.labels), axes.of_tokens),
        out_specs=axes.of_tokens,
        check_vma=False,
    )(hidden, _cast_as_stored(job, head.weights), targets)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is static. labels: the dimensions of the head's weights, "vd" or "dv"."""

    precision: Precision
    labels: str
    z_loss: float
    rules: AxisRules | None
    chunk_bytes: int | None

    @classmethod
    def of(cls, precision: Precision, head: Head, z_loss: float, chunk_bytes: int | None) -> "_Job":
        rules = active_rules()
        if rules is not None and rules.mesh.size == 1:
            rules = None
        labels = head.spec.split("->")[0].split(",")[1]
        return cls(precision, labels, float(z_loss), rules, chunk_bytes)


class _Result(NamedTuple):
    """d_hidden, d_weights: gradients of loss_sum, or None where none was asked for."""

    sums: HeadLoss
    d_hidden: jax.Array | None
    d_weights: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(job, hidden, head_weights, targets, weights):
    return _on_mesh(job, False, hidden, head_weights, targets, weights).sums


def _head_loss_forward(job, hidden, head_weights, targets, weights):
    result = _on_mesh(job, True, hidden, head_weights, targets, weights)
    like_weights = jnp.zeros((), head_weights.dtype)
    return result.sums, (result.d_hidden, result.d_weights, like_weights)


def _head_loss_backward(job, residuals, cotangents):
    d_hidden, d_weights, like_weights = residuals
    g = cotangents.loss_sum
    scaled = (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype)
    return scaled, (d_weights * g).astype(like_weights.dtype), None, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes of what each device holds.

    batch, length: of the tokens; vocab: of the head; embed: of the weight gradient's D, always
    among the tokens' axes, so that summing over tokens and cutting D are one reduce-scatter.
    residual: of the length again, in d_hidden only: a reduce-scatter over the vocabulary's axes.
    """

    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()

    @classmethod
    def of(cls, rules: AxisRules, length: int) -> "_Axes":
        axes = rules.mesh_axes
        tokens = axes("batch") + axes("length")
        residual = tuple(a for a in axes("residual_length") if a in axes("vocab"))
        shares = math.prod(rules.mesh.shape[a] for a in axes("length") + residual)
        return cls(
            batch=axes("batch"),
            length=axes("length"),
            vocab=axes("vocab"),
            embed=tuple(a for a in axes("embed") if a in tokens),
            residual=residual if length % shares == 0 else (),
        )

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.batch + self.length

    @property
    def of_tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.length or None)

    def of_weights(self, labels: str, embed: tuple[str, ...] = ()) -> PartitionSpec:
        return PartitionSpec(*({"v": self.vocab, "d": embed}[x] or None for x in labels))


def _cast_as_stored(job: _Job, head_weights: jax.Array) -> jax.Array:
    """Pinned before a shard_map gathers them, lest the gather come before the cast."""
    as_stored = job.rules.spec(*({"v": "vocab", "d": "embed"}[label] for label in job.labels))
    return jax.lax.with_sharding_constraint(
        job.precision.cast(head_weights), jax.sharding.NamedSharding(job.rules.mesh, as_stored)
    )


def _on_mesh(job, with_gradient, hidden, head_weights, targets, weights) -> _Result:
    rules = job.rules
    if rules is None:
        head_weights = job.precision.cast(head_weights)
        return _local(job, _Axes(), with_gradient, hidden, head_weights, targets, weights)
    axes = _Axes.of(rules, hidden.shape[1])
    tokens = axes.of_tokens
    result = _Result(
        HeadLoss(*(PartitionSpec(),) * 4),
        PartitionSpec(axes.batch or None, axes.length + axes.residual or None)
        if with_gradient
        else None,
        axes.of_weights(job.labels, axes.embed) if with_gradient else None,
    )
    result = jax.shard_map(
        functools.partial(_local, job, axes, with_gradient),
        mesh=rules.mesh,
        in_specs=(tokens, axes.of_weights(job.labels), tokens, tokens),
        out_specs=result,
        check_vma=False,
    )(hidden, _cast_as_stored(job, head_weights), targets, weights)
    # Else a TPU, which reduces whole and cuts out the share afterwards, puts the cutting off to the
    # update and keeps the whole gradient through the backward pass of all layers.
    return jax.lax.optimization_barrier(result)


def _local(job, axes, with_gradient, hidden, head_weights, targets, weights) -> _Result:
    """On one device's share of the tokens [b, t] and of the vocabulary; sums are over the mesh."""
    shape = hidden.shape
    num_tokens = math.prod(shape[:2])
    count, size = _chunks(num_tokens, head_weights.shape[job.labels.index("v")], job.chunk_bytes)
    arrays = hidden, targets, weights
    chunk = functools.partial(_chunk, job, axes.vocab, with_gradient, head_weights)
    if count == 1:
        sums, d_hidden, d_weights = chunk(*arrays)
    else:
        arrays = tuple(_cut(x, count, size) for x in arrays)
        zeros = HeadLoss(*(jnp.zeros((), jnp.float32),) * 4)
        total = jnp.zeros(head_weights.shape, jnp.float32) if with_gradient else None

        def body(carry, chunk_arrays):
            sums, d_hidden, d_weights = chunk(*chunk_arrays)
            return jax.tree.map(jnp.add, carry, (sums, d_weights)), d_hidden

        (sums, d_weights), d_hidden = jax.lax.scan(body, (zeros, total), arrays)
    sums = HeadLoss(*_sum_over(jnp.stack(sums), axes.tokens))
    if not with_gradient:
        return _Result(sums, None, None)
    d_hidden = d_hidden.reshape(-1, shape[2])[:num_tokens].reshape(shape)
    rest = tuple(a for a in axes.tokens if a not in axes.embed)
    d_weights = _scatter_over(d_weights, axes.embed, job.labels.index("d"))
    rest_vocab = tuple(a for a in axes.vocab if a not in axes.residual)
    d_hidden = _sum_over(_scatter_over(d_hidden, axes.residual, 1), rest_vocab)
    return _Result(sums, d_hidden, _sum_over(d_weights, rest))


def _local_nats(job, axes, hidden, head_weights, targets) -> jax.Array:
    num_tokens = math.prod(targets.shape)
    count, size = _chunks(num_tokens, head_weights.shape[job.labels.index("v")], job.chunk_bytes)

    def nats(arrays):
        softmax = _softmax(job, axes.vocab, head_weights, *arrays)
        return softmax.log_z - softmax.at_target

    if count == 1:
        return nats((hidden, targets))
    chunks = jax.lax.map(nats, (_cut(hidden, count, size), _cut(targets, count, size)))
    return chunks.reshape(-1)[:num_tokens].reshape(targets.shape)


def _cut(x: jax.Array, count: int, size: int) -> jax.Array:
    """[b, t, ...] to [count, 1, size, ...], filled up with zeros.

    The 1 is for XLA's CPU backend, which has a product over two dimensions, as in the gradient of
    weights, in bfloat16 and one over the first dimension of both operands only in float32.
    """
    x = x.reshape(-1, *x.shape[2:])
    x = jnp.pad(x, ((0, count * size - len(x)),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(count, 1, size, *x.shape[1:])


class _Softmax(NamedTuple):
    """Of [b, t] tokens. logits, is_target: this device's share of V; the rest: over all of V."""

    logits: jax.Array
    is_target: jax.Array
    peak: jax.Array
    log_z: jax.Array
    at_target: jax.Array


def _softmax(job, vocab_axes, head_weights, hidden, targets) -> _Softmax:
    spec = f"btd,{job.labels}->btv"
    logits = job.precision.product(spec, hidden, head_weights, jnp.dtype(jnp.float32))
    first_id = jax.lax.axis_index(vocab_axes) * logits.shape[-1] if vocab_axes else 0
    targets = targets[..., None] - first_id
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, vocab_axes) if vocab_axes else peak
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    total, at_target = _sum_over((total, _at_target(job, logits, targets, is_target)), vocab_axes)
    return _Softmax(logits, is_target, peak, jnp.log(total) + peak, at_target)


def _chunk(job, vocab_axes, with_gradient, head_weights, hidden, targets, weights) -> _Result:
    """Loss of [b, t, D] tokens, and its gradients: d_hidden over this device's share of V only."""
    product, labels = job.precision.product, job.labels
    softmax = _softmax(job, vocab_axes, head_weights, hidden, targets)
    logits, is_target, peak, log_z, at_target = softmax
    cross_entropy = jnp.sum((log_z - at_target) * weights)
    z_loss = job.z_loss * jnp.sum(jnp.square(log_z) * weights)
    correct = jnp.sum((at_target >= peak) * weights)
    sums = HeadLoss(cross_entropy + z_loss, cross_entropy, z_loss, correct)
    if not with_gradient:
        return _Result(sums, None, None)
    slope = weights * (1 + 2 * job.z_loss * log_z)
    d_logits = slope[..., None] * jnp.exp(logits - log_z[..., None])
    d_logits = job.precision.cast(d_logits - jnp.where(is_target, weights[..., None], 0.0))
    return _Result(
        sums,
        product(f"btv,{labels}->btd", d_logits, head_weights, hidden.dtype),
        product(f"btd,btv->{labels}", hidden, d_logits, jnp.dtype(jnp.float32)),
    )


def _at_target(job, logits, targets, is_target) -> jax.Array:
    """[b, t]: the targets' logits, 0 for those in other devices' shares of V."""
    if not job.precision.wide_output:
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    # An accelerator sums while it looks for the peak; a CPU would first write what it is to sum.
    num_ids = logits.shape[-1]
    found = jnp.take_along_axis(logits, jnp.clip(targets, 0, num_ids - 1), axis=-1)
    return jnp.where((targets >= 0) & (targets < num_ids), found, 0.0)[..., 0]


def _chunks(num_tokens: int, vocab: int, chunk_bytes: int | None) -> tuple[int, int]:
    """Number of chunks and tokens in each; the last one is filled up where they do not divide."""
    if chunk_bytes is None:
        chunk_bytes = max(CHUNK_BYTES, MIN_CHUNK_TOKENS * vocab * 4)
    needed = min(num_tokens, -(-num_tokens * vocab * 4 // chunk_bytes))
    # Up to twice as many chunks if these divide evenly: filling up copies the hidden states.
    count = next((n for n in range(needed, 2 * needed) if num_tokens % n == 0), needed)
    return count, -(-num_tokens // count)


def _sum_over(x, axes: tuple[str, ...]):
    return jax.lax.psum(x, axes) if axes else x


def _scatter_over(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    if not axes:
        return x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)


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
