"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019), computed in float32."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import ones, param, zeros


@dataclasses.dataclass(frozen=True)
class NormConfig:
    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    epsilon: float = 1e-5
    bias: bool = False  # LayerNorm only

    def __post_init__(self):
        if self.bias and self.kind == "rmsnorm":
            raise ValueError("norm bias=True needs kind='layernorm', got 'rmsnorm'")


class Norm(nnx.Module):
    """Normalizes the last dimension: [..., D] in any float dtype to the same."""

    def __init__(self, size: int, config: NormConfig, *, axis: str = "embed", rngs: nnx.Rngs):
        self.config = config
        self.scale = param(rngs, (size,), (axis,), ones)
        if config.bias:
            self.bias = param(rngs, (size,), (axis,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.config.kind == "layernorm":
            x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), -1, keepdims=True)
        y = x32 * jax.lax.rsqrt(variance + self.config.epsilon) * self.scale[...]
        if self.config.bias:
            y = y + self.bias[...]
        return y.astype(x.dtype)
