"""Keys and values of the tokens seen so far, for generation.

The rows of a batch advance together: new keys are written at one common place `length`. Prompts of
different lengths are padded on the left; their padding has segment 0, which no real query sees.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.nn.mask import Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """keys, values: one [B, S, K, H] per layer; places: [B, S]; length: scalar int32 <= S."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    places: Places
    length: jax.Array

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype,
    ) -> "KVCache":
        shape = (batch_size, max_length, num_kv_heads, head_dim)
        # Segment -1 is nobody's: neither a real query (>= 1) nor padding (0) sees an unused place.
        places = Places(
            jnp.full((batch_size, max_length), -1, jnp.int32),
            jnp.zeros((batch_size, max_length), jnp.int32),
        )
        make = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))  # noqa: E731
        return cls(make(), make(), places, jnp.zeros((), jnp.int32))

    def with_places(self, new: Places) -> "KVCache":
        """Notes the places of T new tokens, whose keys each layer then writes."""
        write = lambda old, update: jax.lax.dynamic_update_slice(  # noqa: E731
            old, update, (0, self.length)
        )
        return dataclasses.replace(self, places=jax.tree.map(write, self.places, new))

    def with_layer(self, layer: int, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Writes one layer's keys and values [B, T, K, H] of the T new tokens."""
        start = (0, self.length, 0, 0)
        all_keys, all_values = list(self.keys), list(self.values)
        for store, new in ((all_keys, keys), (all_values, values)):
            store[layer] = jax.lax.dynamic_update_slice(
                store[layer], new.astype(store[layer].dtype), start
            )
        return dataclasses.replace(self, keys=tuple(all_keys), values=tuple(all_values))

    def advanced(self, num_tokens: int) -> "KVCache":
        return dataclasses.replace(self, length=self.length + num_tokens)
