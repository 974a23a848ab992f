"""Rotary position embeddings (Su et al. 2021, RoFormer), with two ways of scaling them for length.

The two members of a rotated pair lie half a head apart, as in Hugging Face and GPT-NeoX, so that
their weights load without a permutation.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.nn.kernels.spec import Layout


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches frequencies for longer contexts.

    kind: "llama3" the slow ones (Llama 3.1 model card), "linear" all of them (Chen et al. 2023; Gemma 3),
    by `factor` alone.
    """

    kind: Literal["llama3", "linear"] = "llama3"
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
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelength = 2 * math.pi / frequencies
        turns = scaling.original_max_length / wavelength
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
    return frequencies.astype(np.float32)


def rope_tables(
    config: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, H] float32, for positions: [B, T] int32; the sine's first half negated."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rope(
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    layout: Layout = "btnh",
    platform: str = "cpu",
) -> jax.Array:
    """Rotates x: [B, T, N, H], or [B, N, T, H], by tables of [B, T, H]; keeps the dtype."""
    cos, sin = (jnp.expand_dims(table, layout.index("n")) for table in tables)
    return _rotate(platform == "tpu", x, cos, sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(by_matmul, x, cos, sin):
    x32 = x.astype(jnp.float32)
    return (x32 * cos + _swap(by_matmul, x) * sin).astype(x.dtype)


def _rotate_forward(by_matmul, x, cos, sin):
    return _rotate(by_matmul, x, cos, sin), (cos, sin)


def _rotate_backward(by_matmul, tables, g):
    cos, sin = tables
    return _rotate(by_matmul, g, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _swap(by_matmul, x):
    """The two halves of the last dimension exchanged, in float32.

    A TPU holds that dimension in its 128 lanes: moving half of them takes a copy of x at twice its
    size, a product with a permutation next to nothing.
    """
    half = x.shape[-1] // 2
    if not by_matmul:
        return jnp.roll(x.astype(jnp.float32), half, axis=-1)
    permutation = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
    return jnp.einsum(
        "...h,hj->...j", x, permutation,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
