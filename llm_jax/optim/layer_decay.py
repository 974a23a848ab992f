"""Lower learning rates for lower layers (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2021).

Of a stack of L layers, layer i = 0, 1, ... learns at `decay^(L - i)` of the learning rate, embeddings and
relative position biases at `decay^(L + 1)` with the deepest stack's L, and what comes after the layers,
such as final norms and heads, at the whole of it. Encoder and decoder count their layers each for itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from llm_jax.core.paths import flat, is_head
from llm_jax.sharding.rules import path_name


def layer_scales(decay: float, shapes: Mapping, axes: Mapping) -> Any:
    """Of each parameter, as a nested dict, the factor of its learning rate: float32, [] or [L, 1, ...]."""
    stacked = {path for path, a in flat(axes).items() if a.names[:1] == ("layers",)}
    depth = max(
        (leaf.shape[0] for path, leaf in flat(shapes).items() if path in stacked), default=0
    )

    def scale(path, leaf):
        name = path_name(path)
        if name in stacked:
            layers = leaf.shape[0]
            factors = decay ** np.arange(layers, 0, -1, dtype=np.float32)
            return factors.reshape(-1, *(1,) * (leaf.ndim - 1))
        below = not is_head(name) and ("embed" in name or "relative" in name)
        return np.float32(decay ** (depth + 1) if below else 1.0)

    return jax.tree_util.tree_map_with_path(scale, shapes)


def scaled(optimizer: optax.GradientTransformation, scales: Any) -> optax.GradientTransformation:
    """The optimizer with its updates, weight decay among them, times these factors."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, s: u * s, updates, scales), state

    by_layer = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    return optax.chain(optimizer, by_layer)
