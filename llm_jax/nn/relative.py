"""Learned biases by relative distance (Raffel et al. 2019, T5, section 2.1), shared by all layers of a stack.

Distances are those of indices in the row. Within a document they equal those of positions, and across
documents nothing is seen, so packed rows need no bias of their own.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal, param


@dataclasses.dataclass(frozen=True)
class RelativeBiasConfig:
    """num_buckets: half of them for exact distances, half growing up to max_distance."""

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self):
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"relative num_buckets {self.num_buckets}: expected a multiple of 4")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"relative max_distance {self.max_distance} must exceed half of num_buckets "
                f"{self.num_buckets}"
            )


class RelativeBias(nnx.Module):
    """What is added to the scores: [N, T, S] float32."""

    def __init__(
        self,
        num_heads: int,
        config: RelativeBiasConfig,
        *,
        causal: bool,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        self.config, self.causal = config, causal
        shape = (config.num_buckets, num_heads)
        self.table = param(rngs, shape, (None, "heads"), normal(stddev))

    def __call__(self, num_queries: int, num_keys: int) -> jax.Array:
        """Of queries and keys that both start at index 0: [N, T, S] float32.

        One value per distance is looked up, then laid out by slicing a repetition of that row: the
        derivative of a gather of all T * S would be a scatter.
        """
        if not isinstance(num_queries, int):  # a symbol of jax.export, by which nothing can be cut
            distances = jnp.arange(num_keys) - jnp.arange(num_queries)[:, None]
            return jnp.moveaxis(self._of(distances), -1, 0)
        distances = jnp.arange(num_keys + num_queries) - (num_queries - 1)
        row = self._of(distances).T  # [N, T + S]
        length = row.shape[1]
        flat = jnp.tile(row, (1, num_queries))[:, num_queries - 1 :]
        flat = flat[:, : num_queries * (length - 1)]
        return flat.reshape(-1, num_queries, length - 1)[:, :, :num_keys]

    def after(self, start: jax.Array, num_queries: int, num_keys: int) -> jax.Array:
        """Of queries at indices start, start + 1, ... to keys from index 0: [N, T, S].

        Where causal, keys behind the last query are those of before, in a ring of num_keys.
        """
        queries, keys = start + jnp.arange(num_queries), jnp.arange(num_keys)
        if self.causal:
            keys = jnp.where(keys < start + num_queries, keys, keys - num_keys)
        distances = keys - queries[:, None]
        return jnp.moveaxis(self._of(distances), -1, 0)

    def _of(self, distances: jax.Array) -> jax.Array:
        buckets = relative_buckets(self.config, distances, causal=self.causal)
        return self.table[...][buckets]


def relative_buckets(
    config: RelativeBiasConfig, distances: jax.Array, *, causal: bool
) -> jax.Array:
    """The bucket of each distance key - query; any shape, int32 to int32."""
    num_buckets = config.num_buckets
    offset = 0
    if causal:
        distances = jnp.maximum(-distances, 0)
    else:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        distances = jnp.abs(distances)
    exact = num_buckets // 2
    # In float32 and in this order, as the published models were trained.
    growth = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact)
    growth = growth / math.log(config.max_distance / exact) * (num_buckets - exact)
    far = jnp.minimum(exact + growth.astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(distances < exact, distances, far)
