"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019), computed in float32."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import ones, param, zeros
from llm_jax.nn.precision import Precision, sum_rows


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """unit_offset: the factor is 1 + scale, and scale starts at 0 (Gemma)."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    epsilon: float = 1e-5
    bias: bool = False  # LayerNorm only
    unit_offset: bool = False

    def __post_init__(self):
        if self.bias and self.kind == "rmsnorm":
            raise ValueError("norm bias=True needs kind='layernorm', got 'rmsnorm'")


class Norm(nnx.Module):
    """Normalizes the last dimension: [B, T, ..., D] in any float dtype to the same."""

    def __init__(
        self,
        size: int,
        config: NormConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        axis: str = "features",
    ):
        self.config, self.precision = config, precision
        self.scale = param(rngs, (size,), (axis,), zeros if config.unit_offset else ones)
        if config.bias:
            self.bias = param(rngs, (size,), (axis,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        scale = 1 + scale if self.config.unit_offset else scale
        y = _normalize(self.config, self.precision.wide_output, x, scale)
        return self.precision.add_bias(y, self.bias[...]) if self.config.bias else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(config: NormConfig, on_cpu: bool, x: jax.Array, scale: jax.Array) -> jax.Array:
    normal, _ = _standardize(config, x)
    return (normal * scale).astype(x.dtype)


def _standardize(config: NormConfig, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x centered (LayerNorm) and scaled to variance 1, and that factor, in float32."""
    x = x.astype(jnp.float32)
    if config.kind == "layernorm":
        x = x - jnp.mean(x, -1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + config.epsilon)
    return x * factor, factor


def _normalize_forward(config, on_cpu, x, scale):
    return _normalize(config, on_cpu, x, scale), (x, scale)


def _normalize_backward(config, on_cpu, residuals, g):
    # By hand so that only x is kept, and the scale's gradient is one product (see sum_rows).
    x, scale = residuals
    shape = x.shape
    if on_cpu and x.ndim == 3:
        # As rows [B * T, D], of which products read d_x as it is. XLA would fuse its computation into
        # each copy that a product wants, and so on down a residual stream of normed sums: there it
        # grew with every layer.
        x, g = x.reshape(-1, shape[-1]), g.reshape(-1, shape[-1])
    normal, factor = _standardize(config, x)
    g = g.astype(jnp.float32)
    d_scale = sum_rows((g * normal).reshape(shape), on_cpu)
    if d_scale.ndim > 1:  # [B, T, N, H]: one scale for all heads
        d_scale = d_scale.sum(tuple(range(d_scale.ndim - 1)))
    g = g * scale
    d_x = g - normal * jnp.mean(g * normal, -1, keepdims=True)
    if config.kind == "layernorm":
        d_x = d_x - jnp.mean(g, -1, keepdims=True)
    return (d_x * factor).astype(x.dtype).reshape(shape), d_scale.astype(scale.dtype)


_normalize.defvjp(_normalize_forward, _normalize_backward)
