"""Which query may see which key: one rule for training, packing and cached decoding.

A query sees a key of its own segment that does not lie after it. Positions restart in every
document, so the rule needs no index into the row and holds unchanged when the keys come from a
cache. Segment 0 is padding: it sees padding only, which keeps its softmax finite.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where tokens stand. segment_ids, positions: [B, T] int32."""

    segment_ids: jax.Array
    positions: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, segment_ids=None, positions=None) -> "Places":
        """What the batch gives, or one document per row."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return cls(segment_ids, positions)


def attention_mask(
    queries: Places,
    keys: Places,
    *,
    causal: bool,
    window: int | None = None,
    prefix: jax.Array | None = None,
    visible: jax.Array | None = None,
) -> jax.Array:
    """True where a query sees a key: [B, T, S] bool for places of [B, T] and [B, S].

    Args:
      window: the query sees keys at a distance below it, itself included; None: at any distance.
      prefix: [B, S], 1 for keys that their whole segment sees, even what stands before them.
      visible: [B, T, S] bool, False where a query does not see a key though it might: branches of a text,
        which stand at the same positions.
    """
    mask = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    query, key = queries.positions[:, :, None], keys.positions[:, None, :]
    if causal:
        mask &= (query >= key) if prefix is None else (query >= key) | (prefix[:, None] > 0)
    if window is not None:
        mask &= query - key < window
        if not causal or prefix is not None:
            mask &= key - query < window
    return mask if visible is None else mask & visible
