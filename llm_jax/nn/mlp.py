"""The feed-forward half of a block: plain (GELU) or gated (SwiGLU, Shazeer 2020)."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import Initializer, param, zeros
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import constrain

ACTIVATIONS = {
    # Not jax.nn.gelu: its erfc takes twice as long on CPU, and is more exact only where x is lost anyhow.
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jax.numpy.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    mlp_dim: int
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "silu"
    gated: bool = True
    bias: bool = False


class Mlp(nnx.Module):
    """[B, T, D] to [B, T, D]."""

    def __init__(
        self,
        embed_dim: int,
        config: MlpConfig,
        *,
        init: Initializer,
        out_init: Initializer,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.config, self.precision = config, precision
        into, out = (embed_dim, config.mlp_dim), (config.mlp_dim, embed_dim)
        self.up = param(rngs, into, ("embed", "mlp"), init)
        self.down = param(rngs, out, ("mlp", "embed"), out_init)
        if config.gated:
            self.gate = param(rngs, into, ("embed", "mlp"), init)
        if config.bias:
            self.up_bias = param(rngs, (config.mlp_dim,), ("mlp",), zeros)
            self.down_bias = param(rngs, (embed_dim,), ("features",), zeros)
        if config.bias and config.gated:
            self.gate_bias = param(rngs, (config.mlp_dim,), ("mlp",), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        config, p = self.config, self.precision
        h = p.project("btd,df->btf", x, self.up[...], name="hidden")
        if config.bias:
            h = p.add_bias(h, self.up_bias[...])
        gate = None
        if config.gated:
            gate = p.project("btd,df->btf", x, self.gate[...], name="hidden")
        if config.bias and config.gated:
            gate = p.add_bias(gate, self.gate_bias[...])
        h = constrain(activate(config.activation, h, gate), "batch", "length", "mlp")
        y = p.project("btf,fd->btd", h, self.down[...])
        return p.add_bias(y, self.down_bias[...]) if config.bias else y


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def activate(activation: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
    """act(h), or act(gate) * h: [B, T, F], computed in float32, returned in the dtype of h.

    Computed again in the backward pass: it is cheap, and would otherwise keep several float32
    arrays as large as h.
    """
    function = ACTIVATIONS[activation]
    h32 = h.astype(jnp.float32)
    y = function(h32) if gate is None else function(gate.astype(jnp.float32)) * h32
    return y.astype(h.dtype)
