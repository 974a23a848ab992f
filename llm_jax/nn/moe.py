"""Mixture of experts: each token goes through the few MLPs that its router picks.

The router and its sums are plain code on whole arrays. The experts run in one shard_map, in
nn/experts.py. Papers: Shazeer et al. 2017 (the layer), Switch (Fedus et al. 2021, section 2.2: load
balance), ST-MoE (Zoph et al. 2022, section 3: z-loss), MegaBlocks (Gale et al. 2022: no token
dropped), DeepSeekMoE (Dai et al. 2024: shared experts).

Unusual: the balance is that of the whole global batch, hence the router returns sums (RouterSums),
which shards, layers and pipeline stages add, and the loss is made of them once for each microbatch of
`train.accumulate_steps`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.param import Initializer, param
from llm_jax.core.types import Weighted
from llm_jax.nn.experts import EXPERT_AXES, ExpertLayer, run_experts
from llm_jax.nn.mlp import Mlp, MlpConfig
from llm_jax.nn.precision import Precision
from llm_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """One mixture-of-experts layer.

    mlp_dim:           width of one expert.
    shared_dim:        width of an expert that every token passes (DeepSeekMoE); None: none.
    normalize_weights: the weights of a token's experts sum to 1 (Mixtral, Qwen3-MoE); False: they
                       are what the softmax over all experts gave them (OLMoE, DeepSeek).
    load_balance:      weight of the load-balance loss.
    router_z:          weight of the router z-loss.
    capacity_factor:   None: no token is dropped, whatever the routing. Else what a device sends to
                       one expert shard is bounded by this factor times the even share, rounded up to
                       8; what overflows is dropped and counted. Without an expert axis nothing is
                       sent, so nothing is dropped.
    round_factor:      without capacity_factor, the size of the same buffer: what does not fit goes
                       in further rounds, which cost time but no memory.
    """

    num_experts: int
    mlp_dim: int
    experts_per_token: int = 2
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "silu"
    gated: bool = True
    shared_dim: int | None = None
    normalize_weights: bool = True
    load_balance: float = 0.01
    router_z: float = 0.001
    capacity_factor: float | None = None
    round_factor: float = 1.5

    def __post_init__(self):
        for field in ("num_experts", "mlp_dim", "experts_per_token", "shared_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} = {value}: expected at least 1")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token = {self.experts_per_token}: expected at most num_experts = "
                f"{self.num_experts}"
            )
        for field in ("load_balance", "router_z"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} = {getattr(self, field)}: expected at least 0")
        if self.capacity_factor is not None and self.capacity_factor < 1:
            raise ConfigError(
                f"capacity_factor = {self.capacity_factor}: expected at least 1, the even share, or "
                "None to drop nothing"
            )
        if self.round_factor <= 0:
            raise ConfigError(f"round_factor = {self.round_factor}: expected more than 0")

    @property
    def active_dim(self) -> int:
        """The width of MLP that one token passes."""
        return self.experts_per_token * self.mlp_dim + (self.shared_dim or 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over tokens, float32; those of several layers may be stacked along a first axis L.

    tokens:        [] valid tokens.
    counts:        [E] choices of each expert by valid tokens, dropped ones included.
    probabilities: [E] sum of the router's probabilities.
    z:             [] sum of the squared logsumexp of the router's logits.
    dropped:       [] choices dropped for want of capacity.
    """

    tokens: jax.Array
    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array
    dropped: jax.Array

    @classmethod
    def zeros(cls, num_experts: int) -> "RouterSums":
        scalar, vector = jnp.zeros(()), jnp.zeros(num_experts)
        return cls(scalar, vector, vector, scalar, scalar)


def router_loss(config: MoeConfig, sums: RouterSums) -> jax.Array:
    """load_balance * E/k * sum_e f_e p_e + router_z * mean z^2, a float32 scalar.

    f_e is the share of tokens that chose expert e, p_e its mean probability; an even load gives
    load_balance * 1.

    Args:
      sums: over the whole global batch; layers stacked along a first axis are added up.
    """
    z = sums.z / _at_least_one(sums.tokens)
    return jnp.sum(config.load_balance * _imbalance(sums) + config.router_z * z)


def router_metrics(sums: RouterSums) -> dict[str, Weighted]:
    """Averages over layers, from sums over the whole global batch.

    moe/load_balance: the unweighted loss; 1 is even, E/k everything on the same experts.
    moe/router_z:     mean squared logsumexp.
    moe/dropped:      share of the choices that were dropped.
    moe/max_load:     the load of the fullest expert over the even load.
    """
    layers = jnp.full((), sums.tokens.size, jnp.float32)
    even = _at_least_one(jnp.sum(sums.counts, -1)) / sums.counts.shape[-1]
    max_load = jnp.max(sums.counts, -1) / even
    return {
        "moe/load_balance": Weighted(jnp.sum(_imbalance(sums)), layers),
        "moe/router_z": Weighted(jnp.sum(sums.z), jnp.sum(sums.tokens)),
        "moe/dropped": Weighted(jnp.sum(sums.dropped), jnp.sum(sums.counts)),
        "moe/max_load": Weighted(jnp.sum(max_load), layers),
    }


def _imbalance(sums: RouterSums) -> jax.Array:
    """E/k * sum_e f_e p_e with k = choices per token: [] or [L]."""
    tokens = _at_least_one(sums.tokens)[..., None]
    choices = _at_least_one(jnp.sum(sums.counts, -1, keepdims=True))
    num_experts = sums.counts.shape[-1]
    return num_experts * jnp.sum(sums.counts / choices * sums.probabilities / tokens, -1)


def _at_least_one(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 1.0)


class Moe(nnx.Module):
    """[B, T, D] to [B, T, D], and the router's sums."""

    def __init__(
        self,
        embed_dim: int,
        config: MoeConfig,
        *,
        init: Initializer,
        out_init: Initializer,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.config, self.precision = config, precision
        into = (config.num_experts, embed_dim, config.mlp_dim)
        out = (config.num_experts, config.mlp_dim, embed_dim)
        self.router = param(rngs, (embed_dim, config.num_experts), ("embed", "router"), init)
        self.up = param(rngs, into, EXPERT_AXES["up"], init)
        self.down = param(rngs, out, EXPERT_AXES["down"], out_init)
        if config.gated:
            self.gate = param(rngs, into, EXPERT_AXES["gate"], init)
        if config.shared_dim is not None:
            shared = MlpConfig(config.shared_dim, config.activation, config.gated)
            makers = {"init": init, "out_init": out_init, "precision": precision, "rngs": rngs}
            self.shared = Mlp(embed_dim, shared, **makers)

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, RouterSums]:
        """Sends each token through its experts.

        Args:
          x: [B, T, D] in the compute dtype.
          valid: [B, T] bool; other tokens are padding: no expert sees them, no sum counts them.

        Raises:
          ValueError: on this mesh the experts, the batch or the length do not divide.
        """
        config = self.config
        choices, weights, sums = self._route(x, valid)
        names = ("up", "gate", "down") if config.gated else ("up", "down")
        layer = ExpertLayer(
            num_experts=config.num_experts,
            activation=config.activation,
            precision=self.precision,
            factor=config.round_factor
            if config.capacity_factor is None
            else config.capacity_factor,
            drops=config.capacity_factor is not None,
        )
        choices = jnp.where(valid[..., None], choices, config.num_experts)
        experts = {name: getattr(self, name)[...] for name in names}
        y, dropped = run_experts(layer, x, choices, weights, experts)
        if config.shared_dim is not None:
            with jax.named_scope("shared"):
                y = y + self.shared(x)
        return y, dataclasses.replace(sums, dropped=dropped)

    @jax.named_scope("router")
    def _route(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, RouterSums]:
        """The experts of each token, [B, T, k] int32, their weights, [B, T, k] float32, and sums."""
        config = self.config
        exact = dataclasses.replace(self.precision, compute_dtype="float32")
        logits = exact.einsum("btd,de->bte", x, self.router[...])
        logits = constrain(logits, "batch", "length", None)
        log_z = jax.nn.logsumexp(logits, -1)
        probabilities = jnp.exp(logits - log_z[..., None])
        _, choices = jax.lax.top_k(jax.lax.stop_gradient(probabilities), config.experts_per_token)
        # By comparison rather than by gather, whose derivative is a scatter.
        chosen = jax.nn.one_hot(choices, config.num_experts)  # [B, T, k, E]
        weights = jnp.sum(chosen * probabilities[:, :, None], -1)
        if config.normalize_weights:
            weights = weights / jnp.sum(weights, -1, keepdims=True)
        counted = valid.astype(jnp.float32)
        sums = RouterSums(
            tokens=jnp.sum(counted),
            counts=jnp.sum(chosen * counted[:, :, None, None], (0, 1, 2)),
            probabilities=jnp.sum(probabilities * counted[..., None], (0, 1)),
            z=jnp.sum(jnp.square(log_z) * counted),
            dropped=jnp.zeros(()),
        )
        return choices, weights, sums
