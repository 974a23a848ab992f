"""Matmuls of int8 or float8 operands, through qwix: `pip install "llm_jax[lowp]"`.

Both operands are rounded just before the product, each row of the contracted dimensions by its own
largest value ("channelwise", dynamic range), and the product is scaled back. Nothing is remembered
between steps and parameters stay float32: the gradient passes through the rounding as if it were not
there (Bengio et al. 2013), with its own two products rounded alike.

float8 is e4m3 for what goes forward and e5m2, with more range and less precision, for gradients
(Micikevicius et al. 2022).
"""

import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp

from llm_jax.core.config import ConfigError

MatmulDtype = Literal["int8", "fp8"]


def require() -> None:
    """Raises ConfigError where qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise ConfigError('matmul_dtype "int8" or "fp8" needs: pip install "llm_jax[lowp]"')


def product(
    matmul_dtype: MatmulDtype,
    spec: str,
    x: jax.Array,
    w: jax.Array,
    out_dtype: jnp.dtype,
    *,
    gradient: Literal[0, 1] | None = None,
) -> jax.Array:
    """`jnp.einsum(spec, x, w)` with both operands rounded; sums are int32 or float32.

    Args:
      spec: two operands.
      gradient: which of the two is a gradient, if one is.
    """
    import qwix

    operands, y_labels = spec.split("->")
    rounded = [
        qwix.quantize(
            # qwix divides by the scale in the array's dtype, and bfloat16 quotients of 64 to 128,
            # half of int8's range, would be rounded to halves before they are rounded to integers.
            array.astype(jnp.float32),
            _dtype(matmul_dtype, is_gradient=position == gradient),
            channelwise_axes=[axis for axis, label in enumerate(labels) if label in y_labels],
        )
        for position, (array, labels) in enumerate(zip((x, w), operands.split(","), strict=True))
    ]
    y = qwix.einsum(spec, *rounded, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)


def _dtype(matmul_dtype: MatmulDtype, *, is_gradient: bool) -> jnp.dtype:
    if matmul_dtype == "int8":
        return jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.float8_e5m2 if is_gradient else jnp.float8_e4m3fn)
