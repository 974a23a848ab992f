"""The loss of a head without its logits, a chunk of tokens at a time, on one device or on a mesh.

Logits exist a chunk of tokens at a time, and the gradient is made in the same visit (as in Hsu et al.
2024, Liger Kernel): three matmuls with the head's weights in all, and nothing of size [B, T, V] at
any time. The head's bias, soft cap and label smoothing add elementwise work and no array of logits.

Over a mesh it runs inside a `shard_map`, since the partitioner would sum the weight gradient over
devices in every chunk: here each device adds up its own tokens' and the sum over devices is taken
once. The weights are gathered once, in the compute dtype. With the vocabulary in shares, devices
exchange two numbers per token for the softmax, three with label smoothing.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.core.types import Head
from llm_jax.nn.precision import Precision, sum_rows
from llm_jax.sharding.rules import AxisRules, active_rules


class HeadLoss(NamedTuple):
    """Sums over the weighted positions, float32 scalars; only `loss_sum` has a gradient.

    loss_sum: the cross entropy, of smoothed labels if asked for, + z_loss_sum.
    cross_entropy_sum: nats, never smoothed.
    z_loss_sum: coefficient included.
    correct_sum: positions where the target has the largest logit.
    """

    loss_sum: jax.Array
    cross_entropy_sum: jax.Array
    z_loss_sum: jax.Array
    correct_sum: jax.Array


@dataclasses.dataclass(frozen=True)
class Job:
    """What is static, beside the head's own.

    chunk_bytes: most bytes of a chunk's float32 logits on one device, or as many as the logits of
    chunk_tokens tokens take if that is more.
    """

    precision: Precision
    rules: AxisRules | None
    chunk_bytes: int
    chunk_tokens: int
    z_loss: float
    label_smoothing: float

    @classmethod
    def of(
        cls,
        precision: Precision,
        chunk_bytes: int,
        chunk_tokens: int,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> "Job":
        rules = active_rules()
        if rules is not None and rules.mesh.size == 1:
            rules = None
        return cls(
            precision, rules, chunk_bytes, chunk_tokens, float(z_loss), float(label_smoothing)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums_on_mesh(job, hidden, head, targets, weights) -> HeadLoss:
    """See `losses.head_loss`; the derivative is of `loss_sum` by hidden and head."""
    return _on_mesh(job, False, hidden, head, targets, weights).sums


def _sums_forward(job, hidden, head, targets, weights):
    result = _on_mesh(job, True, hidden, head, targets, weights)
    like_head = jax.tree.map(lambda x: jnp.zeros((), x.dtype), head)
    return result.sums, (result.d_hidden, result.d_head, like_head)


def _sums_backward(job, residuals, cotangents):
    d_hidden, d_head, like_head = residuals
    g = cotangents.loss_sum
    scaled = (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype)
    d_head = jax.tree.map(lambda d, like: (d * g).astype(like.dtype), d_head, like_head)
    return scaled, d_head, None, None


sums_on_mesh.defvjp(_sums_forward, _sums_backward)


def nats_on_mesh(job: Job, hidden: jax.Array, head: Head, targets: jax.Array) -> jax.Array:
    """See `losses.head_nats`."""
    if job.rules is None:
        head = dataclasses.replace(head, weights=job.precision.cast(head.weights))
        return _local_nats(job, _Axes(), hidden, head, targets)
    axes = _Axes.of(job.rules, hidden.shape[1])
    return jax.shard_map(
        functools.partial(_local_nats, job, axes),
        mesh=job.rules.mesh,
        in_specs=(axes.of_tokens, axes.of_head(head), axes.of_tokens),
        out_specs=axes.of_tokens,
        check_vma=False,
    )(hidden, _cast_as_stored(job, head), targets)


class _Result(NamedTuple):
    """d_hidden, d_head: gradients of loss_sum, or None where none was asked for."""

    sums: HeadLoss
    d_hidden: jax.Array | None
    d_head: Head | None


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

    def of_head(self, head: Head, embed: tuple[str, ...] = ()) -> Head:
        """The partition of each of the head's arrays."""
        axes = {"v": self.vocab, "d": embed}
        weights = PartitionSpec(*(axes[label] or None for label in _labels(head)))
        bias = None if head.bias is None else PartitionSpec(self.vocab or None)
        return dataclasses.replace(head, weights=weights, bias=bias)


def _labels(head: Head) -> str:
    """The dimensions of the head's weights, "vd" or "dv"."""
    return head.spec.split("->")[0].split(",")[1]


def _cast_as_stored(job: Job, head: Head) -> Head:
    """Pinned before a shard_map gathers the weights, lest the gather come before the cast."""
    as_stored = job.rules.spec(*({"v": "vocab", "d": "embed"}[label] for label in _labels(head)))
    weights = jax.lax.with_sharding_constraint(
        job.precision.cast(head.weights), jax.sharding.NamedSharding(job.rules.mesh, as_stored)
    )
    return dataclasses.replace(head, weights=weights)


def _on_mesh(job, with_gradient, hidden, head, targets, weights) -> _Result:
    rules = job.rules
    if rules is None:
        head = dataclasses.replace(head, weights=job.precision.cast(head.weights))
        return _local(job, _Axes(), with_gradient, hidden, head, targets, weights)
    axes = _Axes.of(rules, hidden.shape[1])
    tokens = axes.of_tokens
    result = _Result(
        HeadLoss(*(PartitionSpec(),) * 4),
        PartitionSpec(axes.batch or None, axes.length + axes.residual or None)
        if with_gradient
        else None,
        axes.of_head(head, axes.embed) if with_gradient else None,
    )
    result = jax.shard_map(
        functools.partial(_local, job, axes, with_gradient),
        mesh=rules.mesh,
        in_specs=(tokens, axes.of_head(head), tokens, tokens),
        out_specs=result,
        check_vma=False,
    )(hidden, _cast_as_stored(job, head), targets, weights)
    # Else a TPU, which reduces whole and cuts out the share afterwards, puts the cutting off to the
    # update and keeps the whole gradient through the backward pass of all layers.
    return jax.lax.optimization_barrier(result)


def _local(job, axes, with_gradient, hidden, head, targets, weights) -> _Result:
    """On one device's share of the tokens [b, t] and of the vocabulary; sums are over the mesh."""
    shape = hidden.shape
    num_tokens = math.prod(shape[:2])
    count, size = _chunks(job, num_tokens, head)
    arrays = hidden, targets, weights
    chunk = functools.partial(_chunk, job, axes.vocab, with_gradient, head)
    if count == 1:
        sums, d_hidden, d_head = chunk(*arrays)
    else:
        arrays = tuple(_cut(x, count, size) for x in arrays)
        zeros = HeadLoss(*(jnp.zeros((), jnp.float32),) * 4)
        total = None
        if with_gradient:
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)

        def body(carry, chunk_arrays):
            sums, d_hidden, d_head = chunk(*chunk_arrays)
            return jax.tree.map(jnp.add, carry, (sums, d_head)), d_hidden

        (sums, d_head), d_hidden = jax.lax.scan(body, (zeros, total), arrays)
    sums = HeadLoss(*_sum_over(jnp.stack(sums), axes.tokens))
    if not with_gradient:
        return _Result(sums, None, None)
    d_hidden = d_hidden.reshape(-1, shape[2])[:num_tokens].reshape(shape)
    rest_vocab = tuple(a for a in axes.vocab if a not in axes.residual)
    d_hidden = _sum_over(_scatter_over(d_hidden, axes.residual, 1), rest_vocab)
    return _Result(sums, d_hidden, _over_tokens(axes, d_head))


def _over_tokens(axes: _Axes, d_head: Head) -> Head:
    """The head's gradients summed over the mesh, that of the weights cut along D."""
    rest = tuple(a for a in axes.tokens if a not in axes.embed)
    d_weights = _scatter_over(d_head.weights, axes.embed, _labels(d_head).index("d"))
    d_bias = None if d_head.bias is None else _sum_over(d_head.bias, axes.tokens)
    return dataclasses.replace(d_head, weights=_sum_over(d_weights, rest), bias=d_bias)


def _local_nats(job, axes, hidden, head, targets) -> jax.Array:
    num_tokens = math.prod(targets.shape)
    count, size = _chunks(job, num_tokens, head)

    def nats(arrays):
        softmax = _softmax(job, axes.vocab, head, *arrays)
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
    """Of [b, t] tokens. logits, is_target: this device's share of V; the rest: over all of V.

    mean: of the logits, None without label smoothing.
    """

    logits: jax.Array
    is_target: jax.Array
    peak: jax.Array
    log_z: jax.Array
    at_target: jax.Array
    mean: jax.Array | None


def _softmax(job, vocab_axes, head, hidden, targets) -> _Softmax:
    logits = _logits(job, head, hidden)
    first_id = jax.lax.axis_index(vocab_axes) * logits.shape[-1] if vocab_axes else 0
    targets = targets[..., None] - first_id
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, vocab_axes) if vocab_axes else peak
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    at_target = _at_target(job, logits, targets, is_target)
    mean = jnp.sum(logits, axis=-1) / _num_ids(logits, vocab_axes) if job.label_smoothing else None
    total, at_target, mean = _sum_over((total, at_target, mean), vocab_axes)
    return _Softmax(logits, is_target, peak, jnp.log(total) + peak, at_target, mean)


def _logits(job, head, hidden) -> jax.Array:
    """[b, t, this device's share of V] float32."""
    spec = f"btd,{_labels(head)}->btv"
    logits = job.precision.product(spec, hidden, head.weights, jnp.dtype(jnp.float32))
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)
    if head.soft_cap is not None:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    return logits


def _num_ids(logits, vocab_axes) -> int:
    return logits.shape[-1] * (jax.lax.axis_size(vocab_axes) if vocab_axes else 1)


def _chunk(job, vocab_axes, with_gradient, head, hidden, targets, weights) -> _Result:
    """Loss of [b, t, D] tokens, and its gradients: d_hidden over this device's share of V only."""
    product, labels = job.precision.product, _labels(head)
    softmax = _softmax(job, vocab_axes, head, hidden, targets)
    log_z, at_target = softmax.log_z, softmax.at_target
    cross_entropy = jnp.sum((log_z - at_target) * weights)
    z_loss = job.z_loss * jnp.sum(jnp.square(log_z) * weights)
    correct = jnp.sum((at_target >= softmax.peak) * weights)
    loss = cross_entropy + z_loss
    if job.label_smoothing:
        loss += job.label_smoothing * jnp.sum((at_target - softmax.mean) * weights)
    sums = HeadLoss(loss, cross_entropy, z_loss, correct)
    if not with_gradient:
        return _Result(sums, None, None)
    exact = _d_logits(job, vocab_axes, head, softmax, weights)
    d_logits = job.precision.cast(exact)
    d_hidden = product(f"btv,{labels}->btd", d_logits, head.weights, hidden.dtype)
    d_weights = product(f"btd,btv->{labels}", hidden, d_logits, jnp.dtype(jnp.float32))
    d_bias = None if head.bias is None else sum_rows(exact, job.precision.wide_output)
    return _Result(sums, d_hidden, dataclasses.replace(head, weights=d_weights, bias=d_bias))


def _d_logits(job, vocab_axes, head, softmax, weights) -> jax.Array:
    """Gradient of the loss by the logits before the cap, float32."""
    logits, log_z = softmax.logits, softmax.log_z
    slope = weights * (1 + 2 * job.z_loss * log_z)
    d_logits = slope[..., None] * jnp.exp(logits - log_z[..., None])
    at_target, elsewhere = weights[..., None], 0.0
    if job.label_smoothing:
        elsewhere = at_target * (job.label_smoothing / _num_ids(logits, vocab_axes))
        at_target = at_target * (1 - job.label_smoothing) + elsewhere
    d_logits -= jnp.where(softmax.is_target, at_target, elsewhere)
    if head.soft_cap is not None:
        d_logits *= 1 - jnp.square(logits / head.soft_cap)
    return d_logits


def _at_target(job, logits, targets, is_target) -> jax.Array:
    """[b, t]: the targets' logits, 0 for those in other devices' shares of V."""
    if not job.precision.wide_output:
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    # An accelerator sums while it looks for the peak; a CPU would first write what it is to sum.
    num_ids = logits.shape[-1]
    found = jnp.take_along_axis(logits, jnp.clip(targets, 0, num_ids - 1), axis=-1)
    return jnp.where((targets >= 0) & (targets < num_ids), found, 0.0)[..., 0]


def _chunks(job: Job, num_tokens: int, head: Head) -> tuple[int, int]:
    """Number of chunks and tokens in each; the last one is filled up where they do not divide."""
    token_bytes = 4 * head.weights.shape[_labels(head).index("v")]
    chunk_bytes = max(job.chunk_bytes, job.chunk_tokens * token_bytes)
    needed = min(num_tokens, -(-num_tokens * token_bytes // chunk_bytes))
    # Up to twice as many chunks if these divide evenly: filling up copies the hidden states.
    count = next((n for n in range(needed, 2 * needed) if num_tokens % n == 0), needed)
    return count, -(-num_tokens // count)


def _sum_over(x, axes: tuple[str, ...]):
    return jax.lax.psum(x, axes) if axes else x


def _scatter_over(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    if not axes:
        return x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
