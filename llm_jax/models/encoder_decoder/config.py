"""The Transformer (Vaswani et al. 2017) and T5 (Raffel et al. 2019): values of one config."""

import dataclasses
from typing import Literal

from llm_jax.core.flops import Shapes, transformer_flops
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.block import NormPlacement, TransformerConfig
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mlp import MlpConfig
from llm_jax.nn.norm import NormConfig
from llm_jax.nn.relative import RelativeBiasConfig
from llm_jax.nn.remat import RematPolicy


@dataclasses.dataclass(frozen=True)
class Config:
    """Two stacks. The defaults are those of the Transformer of 2017; T5's are in configs/t5_base.py.

    num_layers: of the encoder, and of the decoder unless num_decoder_layers says otherwise.
    position: "sinusoidal", or "relative": biases by distance, one table for each stack (T5).
    norm_placement: "post" as published in 2017, "pre" (T5), which has a norm at the end of each stack.
    attention_scale: of the scores; None: head_dim ** -0.5; T5: 1.
    scale_embeddings: embeddings times sqrt(embed_dim).
    scale_outputs: hidden states times embed_dim ** -0.5 before the head (T5 with tied embeddings).
    head_bias: a bias on the logits (Marian).
    max_length: of either side.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_decoder_layers: int | None = None  # num_layers
    head_dim: int | None = None  # embed_dim / num_heads
    mlp_dim: int | None = None  # 4 embed_dim
    max_length: int = 512
    position: Literal["sinusoidal", "relative"] = "sinusoidal"
    relative_buckets: int = 32
    relative_distance: int = 128
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    norm_bias: bool = True
    norm_placement: Literal["post", "pre"] = "post"
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "relu"
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_scale: float | None = None
    scale_embeddings: bool = True
    scale_outputs: bool = False
    tie_embeddings: bool = True
    head_bias: bool = False
    dropout: float = 0.0
    remat: RematPolicy = "none"
    scan_unroll: int = 1
    init_stddev: float = 0.02
    name: str = "encoder_decoder"

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_decoder_layers", "num_heads", "head_dim",
                 "mlp_dim", "max_length", "norm_epsilon", "scan_unroll")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}: "
                "set head_dim, or choose a divisor"
            )
        defaults = {
            "num_decoder_layers": self.num_layers,
            "head_dim": self.embed_dim // self.num_heads,
            "mlp_dim": 4 * self.embed_dim,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.position == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(f"embed_dim {self.embed_dim} must be even for sinusoidal positions")
        for name in ("relative_buckets", "relative_distance"):
            default = type(self).__dataclass_fields__[name].default
            if self.position != "relative" and getattr(self, name) != default:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no effect without position='relative'; leave it "
                    f"at {default}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")
        self.encoder(), self.decoder()  # their own checks, at parse time

    @property
    def norm_config(self) -> NormConfig:
        return NormConfig(self.norm, self.norm_epsilon, self.norm_bias)

    def encoder(self) -> TransformerConfig:
        return self._stack(self.num_layers, causal=False, cross_attention=False)

    def decoder(self) -> TransformerConfig:
        return self._stack(self.num_decoder_layers, causal=True, cross_attention=True)

    def _stack(self, num_layers: int, *, causal: bool, cross_attention: bool) -> TransformerConfig:
        relative = None
        if self.position == "relative":
            relative = RelativeBiasConfig(self.relative_buckets, self.relative_distance)
        placement: NormPlacement = self.norm_placement
        return TransformerConfig(
            embed_dim=self.embed_dim,
            num_layers=num_layers,
            attention=AttentionConfig(
                num_heads=self.num_heads,
                num_kv_heads=self.num_heads,
                head_dim=self.head_dim,
                bias=self.attention_bias,
                out_bias=self.attention_bias,
                scale=self.attention_scale,
                spec=AttentionSpec(causal=causal),
            ),
            mlp=MlpConfig(self.mlp_dim, self.activation, self.gated, self.mlp_bias),
            norm=self.norm_config,
            norm_placement=placement,
            relative_bias=relative,
            cross_attention=cross_attention,
            dropout=self.dropout,
            remat=self.remat,
            init_stddev=self.init_stddev,
            scan_unroll=self.scan_unroll,
        )

    def batch_flops(self, shapes: Shapes, *, causal_half: bool) -> float:
        """Model FLOPs of a training step on a batch; see core/flops.py."""
        rows, source = shapes["encoder_tokens"]
        target = shapes["tokens"][1]
        sizes = {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_heads,
            "head_dim": self.head_dim,
            "mlp_dim": self.mlp_dim,
            "gated": self.gated,
        }
        encoder = transformer_flops(
            **sizes,
            num_layers=self.num_layers,
            vocab_size=None,
            sequence_length=source,
            causal_half=False,
        )
        decoder = transformer_flops(
            **sizes,
            num_layers=self.num_decoder_layers,
            vocab_size=self.vocab_size,
            sequence_length=target,
            causal_half=causal_half,
            memory_length=source,
        )
        return rows * (source * encoder + target * decoder)
