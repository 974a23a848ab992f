"""Sinusoidal positions (Vaswani et al. 2017, section 3.5).

Sines stand in the first half of the features and cosines in the second, as in the authors' tensor2tensor
and in Marian; the paper's formula has them in turns, which is the same up to the order of the features.
"""

import jax
import jax.numpy as jnp
import numpy as np


def sinusoidal_positions(positions: jax.Array, size: int) -> jax.Array:
    """positions: [B, T] int32 to [B, T, size] float32, size even."""
    rates = 10_000.0 ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    angles = positions[..., None].astype(jnp.float32) * rates.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
