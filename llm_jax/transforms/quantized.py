"""Frozen weights in 8 or 4 bits, in blocks of 64 with a scale each (Dettmers et al. 2023, QLoRA).

"int8" is symmetric; "nf4" has 16 levels that hold equal shares of a normal distribution (their appendix
E). Blocks lie along the longest axis of a matrix, so that a weight is still in shares by its own axes.
Scales are bfloat16, a quarter of a bit for each weight, instead of being quantized once more.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.transforms.weight import Frozen, Weight

Kind = Literal["int8", "nf4"]

BLOCK = 64
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


class Quantized(Weight):
    """codes: int8 like the weight, or uint8 with two of "nf4" in each along `axis`; scales: bfloat16."""

    def __init__(
        self,
        path: str,
        weight: jax.Array,
        axes: tuple[str | None, ...],
        kind: Kind,
        *,
        stacked: int,
    ):
        """stacked: leading axes of the weight that are stacks of matrices."""
        features = weight.shape[stacked:]
        self.axes, self.kind = axes, kind
        # From the end: the loop over layers takes the first axis away.
        self.axis = features.index(max(features)) - len(features)
        size = weight.shape[self.axis]
        if kind == "nf4" and size % 2:
            raise ConfigError(
                f"{path}: size {size} must be even for transforms.lora.quantize 'nf4'"
            )
        self.block = int(np.gcd(size, BLOCK))
        codes, scales = self._encode(weight)
        self.codes = Frozen(codes, axes=axes)
        along = len(axes) + self.axis
        self.scales = Frozen(scales, axes=(*axes[:along], None, *axes[along + 1 :]))

    def _encode(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self._blocks(weight, self.block)
        largest = jnp.max(jnp.abs(x), -1)
        scales = (largest / 127 if self.kind == "int8" else largest).astype(jnp.bfloat16)
        x = x / jnp.maximum(scales.astype(jnp.float32), 1e-30)[..., None]
        if self.kind == "int8":
            codes = jnp.clip(jnp.round(x), -127, 127).astype(jnp.int8)
            return self._whole(codes), jnp.moveaxis(scales, -1, self.axis)
        codes = jnp.searchsorted((NF4[1:] + NF4[:-1]) / 2, x).astype(jnp.uint8)
        low, high = codes[..., 0::2], codes[..., 1::2]
        return self._whole(low | high << 4), jnp.moveaxis(scales, -1, self.axis)

    def value(self) -> jax.Array:
        """The weight, rounded: float32."""
        codes, scales = self.codes[...], jnp.moveaxis(self.scales[...], self.axis, -1)
        if self.kind == "int8":
            x = self._blocks(codes, self.block).astype(jnp.float32)
        else:
            # Generation casts all arrays to its dtype, which holds 0..255 exactly.
            pairs = self._blocks(codes.astype(jnp.uint8), self.block // 2)
            both = jnp.stack([pairs & 15, pairs >> 4], -1)
            x = jnp.asarray(NF4)[both.reshape(*pairs.shape[:-1], self.block)]
        return self._whole(x * scales.astype(jnp.float32)[..., None])

    def _blocks(self, x: jax.Array, block: int) -> jax.Array:
        """`axis` last, in blocks: [..., n, block]."""
        x = jnp.moveaxis(x, self.axis, -1)
        return x.reshape(*x.shape[:-1], -1, block)

    def _whole(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1), -1, self.axis)
