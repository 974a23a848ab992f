"""Splash attention on TPU (jax.experimental.pallas.ops.tpu.splash_attention), over shares.

The kernel skips blocks that a static mask hides. The mask is computed inside the kernel from the
natural index of each query, so a row in shares of the sequence may lie in any static order.

The kernel names its output and its logsumexp "attention": where rematerialization keeps that name,
the forward kernel does not run again. It multiplies with the matrix unit's own precision, bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding

from llm_jax.nn.kernels.shares import length_shares, natural_order, on_shares
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.kernels.visible import Visible
from llm_jax.nn.mask import Places
from llm_jax.sharding.rules import AxisRules, active_rules

LANES = 128  # the unit of block sizes along the sequence


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Places,
    keys: Places,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention within rows.

    Args:
      query: [B, N, T, H]; key and value: [B, K, T, H] with N a multiple of K; T divided by the
        shares of the sequence is a multiple of 128.
      queries, keys: of the T tokens; the positions of a segment follow each other.
      interpret: runs the kernels in Python, on any backend.

    Returns:
      [B, N, T, H] in the dtype of query.

    Raises:
      ValueError: a size that does not divide over the mesh.
    """
    rules = active_rules()
    # Scaled in float32: the scale itself is no bfloat16 number for a head_dim of 128.
    query = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    kernel = _kernel(spec, query.shape, rules, interpret)
    table_specs = ()
    if rules is not None:
        sharding = NamedSharding(rules.mesh, rules.spec("heads", "length"))
        table_specs = (kernel.manual_sharding_spec(sharding),)
    return on_shares(
        _over_batch, "bnth", query, key, value, queries, keys, kernel, table_specs=table_specs
    )


def _over_batch(query, key, value, queries, keys, kernel):
    segments = kernels.SegmentIds(queries.segment_ids, keys.segment_ids)
    return jax.vmap(kernel)(query, key, value, segments)


@functools.lru_cache(maxsize=64)
def _kernel(
    spec: AttentionSpec, shape: tuple[int, ...], rules: AxisRules | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    """The kernel for queries of [B, N, T, H]; its tables of blocks take seconds to make when T is large."""
    _, num_heads, length, head_dim = shape
    if spec.causal or spec.window is not None:
        mask = _StaticMask(natural_order(rules, length), Visible.of(spec))
    else:
        mask = masks.FullMask((length, length))
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * num_heads),
            block_sizes=block_sizes(
                length,
                head_dim,
                window=spec.window,
                shares=length_shares(rules),
                generation=_generation(rules),
            ),
            head_shards=rules.shares("heads") if rules else 1,
            q_seq_shards=length_shares(rules),
            attn_logits_soft_cap=spec.soft_cap,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
    # numpy, since a cached value may hold no array of one trace or one device
    return jax.tree.map(np.asarray, kernel)


def _generation(rules: AxisRules | None) -> str:
    device = jax.devices()[0] if rules is None else rules.mesh.devices.flat[0]
    return device.device_kind


def block_sizes(
    length: int, head_dim: int, *, window: int | None, shares: int, generation: str
) -> kernels.BlockSizes:
    """Tiles of the kernels.

    A block of queries is read once and meets every visible block of keys, so its length is the
    FLOPs per byte of keys and values: 512 cover the ratio of matrix unit to memory of v5e and v5p
    (240 and 166), 1024 that of v6e and TPU7x (560 and 312). Larger ones waste more at the diagonal
    and at the borders of a window, and need more of the vector memory.

    The fused backward kernel is left alone: it computes scores once instead of twice, but writes a
    copy of the query's gradient for every block of keys. Compiled for v6e at T = 2048 their sum takes
    29 ms of a step of 199 ms and 130 MB, more than the second pass over the scores.

    Args:
      length: T of a whole row; shares: parts it is cut into.
      generation: `device_kind` of the TPU.
    """
    local = length // shares
    older = generation.startswith("TPU v5")
    widest = 512 if older or head_dim > 128 else 1024
    if window is not None:
        widest = min(widest, max(LANES, _power_of_two_below(window)))
    # A share is two chunks of the row (AxisRules.length_order); a block across both skips less.
    chunk = local // 2 if shares > 1 and local % (2 * LANES) == 0 else local
    query, key = _divisor(chunk, widest), _divisor(length, widest)
    compute = _divisor(key, 512)
    return kernels.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=compute,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=compute,
        block_q_dq=query,
        block_kv_dq=key,
    )


def _power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `length`."""
    return next(size for size in range(most, 0, -LANES) if length % size == 0)


class _StaticMask(masks.Mask):
    """A mask that the kernel computes; `order` is the natural index of each query, [T] int32.

    The kernel looks for the attributes `q_sequence` and `mask_function`.
    """

    def __init__(self, order: np.ndarray, visible: Visible):
        self.q_sequence, self.mask_function = order, visible

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self.q_sequence)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        query = self.q_sequence[index[0]]
        first, last, _ = index[1].indices(len(self.q_sequence))
        extent = self.mask_function.extent(int(query.min()), int(query.max()), first, last - 1)
        if extent is not None:  # most blocks, and there are (T / block)^2 of them
            return _constant((len(query), last - first), extent)
        return self.mask_function(query[:, None], np.arange(first, last, dtype=np.int32))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _StaticMask)
            and self.mask_function == other.mask_function
            and np.array_equal(self.q_sequence, other.q_sequence)
        )

    def __hash__(self) -> int:
        return hash((self.mask_function, self.q_sequence.tobytes()))


@functools.lru_cache(maxsize=8)
def _constant(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)
