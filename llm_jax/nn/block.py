"""One block of the Transformer: its config, and attention and MLP on a residual stream."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.core.param import normal
from llm_jax.nn.attention import Attention, AttentionConfig, Memory, Sight
from llm_jax.nn.cache import KVCache
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mlp import Mlp, MlpConfig
from llm_jax.nn.moe import Moe, MoeConfig, RouterSums
from llm_jax.nn.norm import Norm, NormConfig
from llm_jax.nn.precision import Precision
from llm_jax.nn.relative import RelativeBiasConfig
from llm_jax.nn.remat import RematPolicy, name_input
from llm_jax.nn.rope import RopeConfig
from llm_jax.sharding.rules import constrain

NormPlacement = Literal["pre", "post", "output", "both"]
Capture = Literal["attention", "cross_attention", "residual"]


@dataclasses.dataclass(frozen=True)
class LocalLayers:
    """Layers that see a window, between every `global_every`-th, counted from 1, which sees all.

    Gemma 2 (section 2), Gemma 3 (section 2). rope: of the windowed layers.
    """

    window: int
    global_every: int
    rope: RopeConfig | None = None

    def __post_init__(self):
        if self.global_every < 2:
            raise ValueError(
                f"global_every {self.global_every}: expected at least 2, or None where all layers are alike"
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What a stack computes.

    norm_placement: "pre" x + f(norm(x)) (GPT-2, Llama); "post" norm(x + f(x)) (Vaswani et al. 2017,
    BERT); "output" x + norm(f(x)) (OLMo 2); "both" x + norm(f(norm(x))) (Gemma 2).
    relative_bias: one table of biases for all layers (T5).
    cross_attention: between self-attention and MLP, to a `Memory`.
    scan_unroll: layers in one turn of the loop over layers; see models/gpt/config.py.
    """

    embed_dim: int
    num_layers: int
    attention: AttentionConfig
    mlp: MlpConfig | MoeConfig
    norm: NormConfig
    norm_placement: NormPlacement = "pre"
    rope: RopeConfig | None = None
    local: LocalLayers | None = None
    relative_bias: RelativeBiasConfig | None = None
    cross_attention: bool = False
    dropout: float = 0.0
    remat: RematPolicy = "none"
    init_stddev: float = 0.02
    scan_unroll: int = 1

    @property
    def period(self) -> int:
        """After how many layers they repeat."""
        return self.local.global_every if self.local else 1

    @property
    def kinds(self) -> tuple[tuple[AttentionSpec, RopeConfig | None], ...]:
        """The layers that differ: all, or the windowed ones and the others."""
        whole = (self.attention.spec, self.rope)
        if self.local is None:
            return (whole,)
        windowed = dataclasses.replace(self.attention.spec, window=self.local.window)
        return (windowed, self.local.rope), whole


class StackOutput(NamedTuple):
    """Of a block or a stack: x [B, T, D], the advanced cache, tensors asked for, router statistics.

    router: RouterSums of the mixture of experts, of a stack [L, ...] each; None without experts.
    """

    x: jax.Array
    cache: KVCache | None
    captured: dict[str, jax.Array]
    router: RouterSums | None


class View(NamedTuple):
    """What a layer knows beside its input: the same for all layers that are alike.

    bias: [N, T, S] of self-attention; memory, across: what cross-attention sees, and how.
    """

    sight: Sight
    rope: tuple[jax.Array, jax.Array] | None
    bias: jax.Array | None = None
    memory: Memory | None = None
    across: Sight | None = None


class Block(nnx.Module):
    """Residual block: attention, attention across if there is any, then MLP."""

    def __init__(self, config: TransformerConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        # The residual stream sums 2L outputs, so each starts smaller (GPT-2, section 2.3); a norm after
        # each output takes that away again.
        halves = 3 if config.cross_attention else 2
        sums = halves * config.num_layers if config.norm_placement == "pre" else 1
        makers = {
            "init": normal(config.init_stddev), "out_init": normal(config.init_stddev / sums**0.5),
            "precision": precision, "rngs": rngs,
        }  # fmt: skip
        norm = lambda: Norm(config.embed_dim, config.norm, precision=precision, rngs=rngs)  # noqa: E731
        self.attention_norm = norm()
        self.attention = Attention(config.embed_dim, config.attention, **makers)
        if config.cross_attention:
            self.cross_norm = norm()
            self.cross_attention = Attention(config.embed_dim, config.attention, **makers)
        self.mlp_norm = norm()
        mlp = Moe if isinstance(config.mlp, MoeConfig) else Mlp
        self.mlp = mlp(config.embed_dim, config.mlp, **makers)
        if config.norm_placement == "both":
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()
            if config.cross_attention:
                self.cross_out_norm = norm()

    @jax.named_scope("layers")
    def __call__(
        self,
        x: jax.Array,
        view: View,
        *,
        key: jax.Array | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        capture: tuple[Capture, ...] = (),
    ) -> StackOutput:
        """x: [B, T, D]; key: drops units when given."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        captured, router = {}, None
        x = name_input(x)
        y = self._before("attention", x)
        with jax.named_scope("attention"):
            y, captured["attention"], cache = self.attention(
                y,
                view.sight,
                rope=view.rope,
                bias=view.bias,
                cache=cache,
                layer=layer,
                keep_weights="attention" in capture,
            )
        x = self._after("attention", x, y, keys[0])
        if self.config.cross_attention:
            y = self._before("cross", x)
            with jax.named_scope("cross_attention"):
                y, captured["cross_attention"], _ = self.cross_attention(
                    y,
                    view.across,
                    cross=True,
                    memory=view.memory,
                    cache=cache,
                    layer=layer,
                    keep_weights="cross_attention" in capture,
                )
            x = self._after("cross", x, y, keys[2])
        y = self._before("mlp", x)
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, Moe):
                y, router = self.mlp(y, view.sight.queries.segment_ids > 0)
            else:
                y = self.mlp(y)
        x = self._after("mlp", x, y, keys[1])
        captured["residual"] = x
        return StackOutput(x, cache, {name: captured[name] for name in capture}, router)

    def _before(self, part: str, x: jax.Array) -> jax.Array:
        if self.config.norm_placement in ("post", "output"):
            return x
        return self._norm(f"{part}_norm", x)

    def _after(self, part: str, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """The residual stream with the output y of a part."""
        placement = self.config.norm_placement
        if placement == "output":
            y = self._norm(f"{part}_norm", y)
        if placement == "both":
            y = self._norm(f"{part}_out_norm", y)
        x = x + dropout(y, self.config.dropout, key)
        if placement == "post":
            x = self._norm(f"{part}_norm", x)
        return constrain(x, "batch", "residual_length", "activation_embed")

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        with jax.named_scope(name):
            return getattr(self, name)(x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest (Srivastava et al. 2014); no key, no change."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
