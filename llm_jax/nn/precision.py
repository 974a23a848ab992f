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
from jax.ad_checkpoint import checkpoint_name

from llm_jax.nn import low_precision
from llm_jax.nn.kernels.spec import Kernel
from llm_jax.nn.low_precision import MatmulDtype
from llm_jax.nn.weight_gradient import weight_gradient
from llm_jax.sharding.rules import active_rules

ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """compute_dtype: dtype of activations and of matmul operands; wide_output: see the module.

    matmul_dtype: of operands in `project`, if not the compute dtype (nn/low_precision.py).
    reduce_dtype: in which devices add their gradients of a block's weights.
    platform, attention_kernel: where the model runs and with which kernel (nn/kernels/attention.py).
    """

    compute_dtype: ComputeDtype = "float32"
    wide_output: bool = True
    platform: str = "cpu"
    attention_kernel: Kernel = "auto"
    matmul_dtype: MatmulDtype | None = None
    reduce_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        if self.matmul_dtype is not None:
            low_precision.require()

    @classmethod
    def on(cls, platform: str, compute_dtype: ComputeDtype, **choices) -> "Precision":
        """The fastest form of `compute_dtype` on "cpu", "gpu" or "tpu"."""
        return cls(compute_dtype, wide_output=platform == "cpu", platform=platform, **choices)

    def for_generation(self) -> "Precision":
        """float32 on CPU, where XLA multiplies a bfloat16 matrix with one row six times slower.

        In the compute dtype throughout: a weight that meets one row is not worth rounding.
        """
        dtype = "float32" if self.wide_output else self.compute_dtype
        return dataclasses.replace(self, compute_dtype=dtype, matmul_dtype=None)

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

    def project(
        self, spec: str, x: jax.Array, w: jax.Array, *, name: str = "projection"
    ) -> jax.Array:
        """`einsum` with the weights of a block, in `matmul_dtype` if there is one.

        Args:
          name: what rematerialization calls it: "projection", or "hidden" for a product as wide as
            the MLP. It cannot see the product inside a custom derivative.
        """
        return checkpoint_name(_project(spec, self, active_rules(), x, w), name)

    def add_bias(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x: [B, T, ...] plus bias: [...], in the dtype of x."""
        return _add_bias(self.wide_output, x, bias)

    def product(self, spec: str, x: jax.Array, w: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """`einsum`, for code that brings its own derivative."""
        full = self.compute_dtype == "float32"
        y = jnp.einsum(
            spec,
            self.cast(x),
            self.cast(w),
            precision=jax.lax.Precision.HIGHEST if full else None,
            preferred_element_type=jnp.float32 if self.wide_output or full else out_dtype,
        )
        return y.astype(out_dtype)

    def block_product(
        self,
        spec: str,
        x: jax.Array,
        w: jax.Array,
        out_dtype: jnp.dtype,
        *,
        gradient: Literal[0, 1] | None = None,
    ) -> jax.Array:
        """`project`, for code that brings its own derivative.

        Args:
          gradient: which of the two operands is a gradient, if one is.
        """
        if self.matmul_dtype is None:
            return self.product(spec, x, w, out_dtype)
        x, w = self.cast(x), self.cast(w)
        return low_precision.product(self.matmul_dtype, spec, x, w, out_dtype, gradient=gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(spec, precision, out_dtype, x, w):
    return precision.product(spec, x, w, out_dtype)


def _einsum_forward(spec, precision, out_dtype, x, w):
    return precision.product(spec, x, w, out_dtype), (x, w)


def _einsum_backward(spec, precision, out_dtype, residuals, g):
    del out_dtype
    x, w = residuals
    operands, y_labels = spec.split("->")
    x_labels, w_labels = operands.split(",")
    dx = precision.product(f"{y_labels},{w_labels}->{x_labels}", g, w, x.dtype)
    dw = precision.product(f"{x_labels},{y_labels}->{w_labels}", x, g, w.dtype)
    return dx, dw


_einsum.defvjp(_einsum_forward, _einsum_backward)


# The rules are an argument, since the backward pass is traced after `use_rules` has ended.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(spec, precision, rules, x, w):
    return precision.block_product(spec, x, w, precision.dtype)


def _project_forward(spec, precision, rules, x, w):
    return _project(spec, precision, rules, x, w), (x, w)


def _project_backward(spec, precision, rules, residuals, g):
    x, w = residuals
    operands, y_labels = spec.split("->")
    x_labels, w_labels = operands.split(",")
    product = precision.block_product
    dx = product(f"{y_labels},{w_labels}->{x_labels}", g, w, x.dtype, gradient=0)
    product = functools.partial(product, gradient=1)
    spec = f"{x_labels},{y_labels}->{w_labels}"
    reduce_dtype = jnp.dtype(precision.reduce_dtype)
    dw = weight_gradient(product, spec, x, g, rules, w.dtype, reduce_dtype)
    return dx, dw


_project.defvjp(_project_forward, _project_backward)


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
