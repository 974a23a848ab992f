"""GPT-2, Llama and what lies between them: values of one config."""

import dataclasses
from typing import Literal

from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mlp import MlpConfig
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.norm import NormConfig
from llm_jax.nn.remat import RematPolicy
from llm_jax.nn.rope import RopeConfig, RopeScaling
from llm_jax.nn.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A causal decoder. The defaults are Llama's choices; GPT-2's are in configs/gpt2_124m.py.

    experts: a mixture of experts (nn/moe.py) in place of the MLP; mlp_dim, activation and gated are then its own.
    attention_window: positions a query sees, its own included (Mistral); None: all before it.
    attention_soft_cap: scores become cap * tanh(scores / cap) (Gemma 2).
    scan_unroll: layers computed in one turn of the loop over layers. More compile longer and, on CPU,
    run faster in bfloat16: what a turn keeps for the backward pass need not be stacked.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # num_heads
    head_dim: int | None = None  # embed_dim / num_heads
    mlp_dim: int | None = None  # 4 embed_dim, or 8/3 of it, rounded up to 64, when gated
    max_length: int = 2048
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_bias: bool = False
    position: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "silu"
    gated: bool = True
    experts: MoeConfig | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_window: int | None = None
    attention_soft_cap: float | None = None
    tie_embeddings: bool = False
    dropout: float = 0.0
    remat: RematPolicy = "none"
    scan_unroll: int = 1
    init_stddev: float = 0.02
    name: str = "gpt"

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "mlp_dim", "max_length", "scan_unroll", "rope_theta", "norm_epsilon")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        if self.init_stddev < 0:
            raise ValueError(f"init_stddev {self.init_stddev} must not be negative")
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(
                    f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}: "
                    "set head_dim, or choose a divisor"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if self.experts is not None:
            self._check_experts()
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.mlp_dim is None and self.experts is None:
            wanted = self.embed_dim * 8 / 3 if self.gated else self.embed_dim * 4
            object.__setattr__(self, "mlp_dim", 64 * -(-int(wanted) // 64))
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")
        self.transformer()  # its own checks, at parse time

    def _check_experts(self) -> None:
        for name, default in (("mlp_dim", None), ("activation", "silu"), ("gated", True)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} has no effect on a mixture of experts: set "
                    f"model.experts.{name}, and leave model.{name} at {default!r}"
                )
        if self.mlp_bias:
            raise ValueError("mlp_bias True: experts have no biases; leave it False")

    def transformer(self) -> TransformerConfig:
        norm = NormConfig(self.norm, self.norm_epsilon, self.norm_bias)
        rope = None
        if self.position == "rotary":
            rope = RopeConfig(self.rope_theta, self.rope_scaling)
        return TransformerConfig(
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            attention=AttentionConfig(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                bias=self.attention_bias,
                out_bias=self.attention_out_bias,
                qk_norm=NormConfig("rmsnorm", self.norm_epsilon) if self.qk_norm else None,
                spec=AttentionSpec(True, self.attention_window, self.attention_soft_cap),
            ),
            mlp=self.experts or MlpConfig(self.mlp_dim, self.activation, self.gated, self.mlp_bias),
            norm=norm,
            rope=rope,
            dropout=self.dropout,
            remat=self.remat,
            init_stddev=self.init_stddev,
            scan_unroll=self.scan_unroll,
        )

    def flops_sizes(self) -> dict[str, int | bool | None]:
        """The sizes that `metrics.throughput.transformer_flops` counts matmuls by."""
        names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                 "gated", "vocab_size", "attention_window")  # fmt: skip
        sizes = {name: getattr(self, name) for name in names}
        if self.experts is not None:
            sizes |= {"mlp_dim": self.experts.active_dim, "gated": self.experts.gated}
        return sizes
