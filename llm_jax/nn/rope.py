"""Rotary position embeddings (Su et al. 2021, RoFormer), with the Llama 3 length scaling.

The two members of a rotated pair lie half a head apart, as in Hugging Face and GPT-NeoX, so that
their weights load without a permutation.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches slow frequencies for longer contexts (Llama 3.1 model card, `rope_type: llama3`)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        if min(self.factor, self.low_frequency_factor, self.original_max_length) <= 0:
            raise ValueError(f"rope scaling {self}: every value must be positive")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"rope low_frequency_factor {self.low_frequency_factor} must be below "
                f"high_frequency_factor {self.high_frequency_factor}"
            )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    theta: float = 10_000.0
    scaling: RopeScaling | None = None


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair: [H/2] float32."""
    frequencies = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.scaling
    if scaling is not None:
        wavelength = 2 * math.pi / frequencies
        turns = scaling.original_max_length / wavelength
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
    return frequencies.astype(np.float32)


def rope_tables(
    config: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, H/2] float32, for positions: [B, T] int32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x: [B, T, N, H] by tables of [B, T, H/2]; keeps the dtype."""
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
