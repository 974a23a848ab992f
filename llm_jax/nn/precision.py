"""Where floating-point types are chosen: parameters stay float32, matmuls run in the compute dtype.

Every matmul of the package goes through `Precision.einsum`. Two things are unusual.

A CPU multiplies bfloat16 matrices 2.8 times faster when it may write the float32 sums than when it
must round them itself, so there `wide_output` asks for float32 and rounds afterwards; accelerators
round for free. The rule holds for the gradient too, hence the custom derivative: differentiating a
float32-output product would multiply float32 cotangents with bfloat16 weights. Gradients of weights
leave the product in float32 on every platform: they are summed over the batch and deserve it.

The gradient of a weight is written with the input as the left operand: the one that XLA's CPU
backend transposes first, and mostly the smaller one.

float32 means float32: TF32 and bf16 passes are switched off for it.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """compute_dtype: dtype of activations and of matmul operands; wide_output: see the module."""

    compute_dtype: ComputeDtype = "float32"
    wide_output: bool = True

    @classmethod
    def on(cls, platform: str, compute_dtype: ComputeDtype) -> "Precision":
        """The fastest form of `compute_dtype` on "cpu", "gpu" or "tpu"."""
        return cls(compute_dtype, wide_output=platform == "cpu")

    def for_generation(self) -> "Precision":
        """float32 on CPU, where XLA multiplies a bfloat16 matrix with one row six times slower."""
        return Precision("float32", self.wide_output) if self.wide_output else self

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    def cast(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype)

    def einsum(
        self, spec: str, x: jax.Array, w: jax.Array, *, out_dtype: jnp.dtype | None = None
    ) -> jax.Array:
        """`jnp.einsum(spec, x, w)` in the compute dtype, sums in float32.

        Args:
          spec: two operands; each label stands in at least two of the three terms.
          out_dtype: dtype of the result, by default the compute dtype.
        """
        out_dtype = self.dtype if out_dtype is None else jnp.dtype(out_dtype)
        return _einsum(spec, self, out_dtype, x, w)

    def add_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x: [B, T, ...] plus bias: [...], in the dtype of x."""
        return _add_bias(self.wide_output, x, bias)

    def _product(self, spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        full = self.compute_dtype == "float32"
        y = jnp.einsum(
            spec,
            self.cast(x),
            self.cast(w),
            precision=jax.lax.Precision.HIGHEST if full else None,
            preferred_element_type=jnp.float32 if self.wide_output or full else out_dtype,
        )
        return y.astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(spec, precision, out_dtype, x, w):
    return precision._product(spec, x, w, out_dtype)


def _einsum_forward(spec, precision, out_dtype, x, w):
    return precision._product(spec, x, w, out_dtype), (x, w)


def _einsum_backward(spec, precision, out_dtype, residuals, g):
    del out_dtype
    x, w = residuals
    operands, y_labels = spec.split("->")
    x_labels, w_labels = operands.split(",")
    dx = precision._product(f"{y_labels},{w_labels}->{x_labels}", g, w, x.dtype)
    dw = precision._product(f"{x_labels},{y_labels}->{w_labels}", x, g, w.dtype)
    return dx, dw


_einsum.defvjp(_einsum_forward, _einsum_backward)


def with_precision(model: nnx.Module, precision: Precision) -> nnx.Module:
    """Sets the precision of a model and all its parts, in place, and returns it."""
    for _, module in nnx.iter_graph(model):
        if hasattr(module, "precision"):
            module.precision = precision
    return model


def sum_rows(x: jax.Array, on_cpu: bool) -> jax.Array:
    """Sums [B, T, ...] over B and T in float32.

    As a product with a row of ones on CPU, where XLA turns a sum over leading dimensions inside a
    loop into a slow two-stage window reduction.
    """
    if not on_cpu:
        return jnp.sum(x, axis=(0, 1), dtype=jnp.float32)
    rows = x.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
    ones = jnp.ones((1, rows.shape[0]), jnp.float32)
    return jnp.dot(ones, rows, precision=jax.lax.Precision.HIGHEST).reshape(x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(on_cpu, x, bias):
    return x + bias.astype(x.dtype)


def _add_bias_forward(on_cpu, x, bias):
    return _add_bias(on_cpu, x, bias), jnp.zeros((), bias.dtype)


def _add_bias_backward(on_cpu, like_bias, g):
    return g, sum_rows(g, on_cpu).astype(like_bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
