"""Optimizers from Optax, put together from one config section."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from llm_jax.sharding.rules import LogicalAxes, path_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """name: "adamw", "lion", "adafactor", or "muon" (matrices by Muon, the rest by AdamW).

    weight_decay acts on matrices, not on biases and norm scales; with muon, on Muon's matrices only.
    clip_norm bounds the global norm of the gradient. beta1 and beta2 are those of AdamW and Lion, and
    of the AdamW part of muon, whose own momentum is 0.95; epsilon is AdamW's; adafactor uses none of
    the three. momentum_dtype stores the first moment in fewer bits, variance_dtype AdamW's second one,
    which needs a beta2 of at most 0.99: smaller steps would be lost in rounding. Lion wants about a third of
    AdamW's learning rate and three times its weight decay.

    freeze: patterns of parameters that are not trained (optim/freeze.py). layer_decay: by which the
    learning rate falls from each layer to the one below (optim/layer_decay.py); None: the same for all.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    variance_dtype: Literal["float32", "bfloat16"] = "float32"
    freeze: tuple[str, ...] = ()
    layer_decay: float | None = None

    def __post_init__(self):
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer.{field} = {getattr(self, field)} must lie in [0, 1)")
        if self.variance_dtype != "float32" and (self.name != "adamw" or self.beta2 > 0.99):
            raise ValueError(
                f"optimizer.variance_dtype = {self.variance_dtype!r} with name {self.name!r} and beta2 "
                f"{self.beta2}: it needs adamw and beta2 <= 0.99"
            )
        for field in ("epsilon", "weight_decay"):
            if getattr(self, field) < 0:
                raise ValueError(f"optimizer.{field} = {getattr(self, field)} must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm = {self.clip_norm} must be positive, or None")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optimizer.layer_decay = {self.layer_decay} must lie in (0, 1], or be None"
            )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, axes: Any
) -> optax.GradientTransformation:
    """The transformation of gradients to updates, clipping included.

    Args:
      axes: tree of LogicalAxes of the parameters that are trained; tells matrices from biases in
        stacked layers.
    """
    decay_mask = jax.tree_util.tree_map_with_path(is_decayed, axes)
    mask = lambda _: decay_mask  # noqa: E731  a function, since Optax would walk into a tree
    dtype = jnp.dtype(config.momentum_dtype)
    decay, beta1, beta2 = config.weight_decay, config.beta1, config.beta2
    make = {
        "adamw": lambda: with_variance_in(
            config.variance_dtype,
            optax.adamw(
                schedule,
                beta1,
                beta2,
                config.epsilon,
                mu_dtype=dtype,
                weight_decay=decay,
                mask=mask,
            ),
        ),
        "lion": lambda: optax.lion(
            schedule, beta1, beta2, mu_dtype=dtype, weight_decay=decay, mask=mask
        ),
        "adafactor": lambda: _adafactor(config, schedule, mask),
        "muon": lambda: _muon(config, schedule, axes, mask),
    }[config.name]
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(*clip, make())


def with_variance_in(
    dtype: str, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Adam that keeps its second moment in `dtype` between steps and computes in float32."""
    if dtype == "float32":
        return adam

    def cast(state: Any, dtype: str) -> Any:
        is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
        change = lambda node: (  # noqa: E731
            node._replace(nu=jax.tree.map(lambda x: x.astype(dtype), node.nu))
            if is_adam(node)
            else node
        )
        return jax.tree.map(change, state, is_leaf=is_adam)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def is_decayed(path: tuple, axes: LogicalAxes) -> bool:
    """Whether weight decay acts on a parameter: matrices and embeddings, not biases and scales."""
    # Transforms hold what a parameter is now as its part "current".
    leaf = path_name(path).removesuffix(".current").rpartition(".")[2]
    return leaf != "scale" and not leaf.endswith("bias") and len(axes.names) > 1


def _adafactor(config, schedule, mask):
    # Optax's alias multiplies the decay by no learning rate; this chain treats it as AdamW does.
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config, schedule, axes, mask):
    """Muon (Jordan et al. 2024) at the RMS of Adam's updates (Liu et al. 2025, section 2.2).

    With equal RMS, one learning rate serves matrices and the rest.
    """
    return optax.contrib.muon(
        schedule,
        beta=0.95,
        weight_decay=config.weight_decay,
        weight_decay_mask=mask,
        mu_dtype=jnp.dtype(config.momentum_dtype),
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(muon_dimensions, axes),
        consistent_rms=0.2,
    )


def muon_dimensions(path: tuple, axes: LogicalAxes) -> optax.contrib.MuonDimensionNumbers | None:
    """How Muon sees a parameter as a matrix from or to the embedding; None: not by Muon.

    Embeddings, heads and routers map tokens, classes or experts, not features, and stay with Adam (Jordan et
    al. 2024), as do the halves of a LoRA, whose rank has no name. Every expert is a matrix of its own.
    """
    names = axes.names
    if not is_decayed(path, axes) or {"vocab", "position", "router", "labels", None} & set(names):
        return None
    features = [i for i, name in enumerate(names) if name not in ("layers", "experts")]
    embed = tuple(i for i in features if names[i] in ("embed", "expert_embed"))
    if not embed:
        return None
    others = tuple(i for i in features if i not in embed)
    if not others:
        return None
    into_embed = features[-1] == embed[0]
    reduction, output = (others, embed) if into_embed else (embed, others)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)
