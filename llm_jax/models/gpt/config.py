"""GPT-2, Llama, Mistral, Qwen, Gemma, OLMo 2, Mixtral and what lies between: values of one config."""

import dataclasses
from typing import Literal

from llm_jax.core.flops import Shapes, transformer_flops
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.block import LocalLayers, NormPlacement, TransformerConfig
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mlp import MlpConfig
from llm_jax.nn.moe import MoeConfig
from llm_jax.nn.norm import NormConfig
from llm_jax.nn.remat import RematPolicy
from llm_jax.nn.rope import RopeConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Config:
    """A causal decoder. The defaults are Llama's choices; GPT-2's are in configs/gpt2_124m.py.

    norm_placement: see nn/block.py. "output": x + norm(f(x)) (OLMo 2); "both": x + norm(f(norm(x))) (Gemma 2, 3).
    norm_unit_offset: norms multiply by 1 + scale, and scales start at 0 (Gemma).
    experts: a mixture of experts (nn/moe.py) in place of the MLP; mlp_dim, activation and gated are then its own.
    qk_norm_over: whether each head of queries and keys is normed for itself (Qwen3) or all together (OLMo 2).
    attention_scale: of the scores; None: head_dim ** -0.5.
    attention_window: positions a query sees, its own included (Mistral); None: all before it.
    global_every: every n-th layer, counted from 1, sees all and only the others a window (Gemma 2: 2,
      Gemma 3: 6); None: every layer has the window.
    local_rope_theta: of the layers with a window, which rope_scaling then leaves alone (Gemma 3); None: as in
      the others.
    attention_soft_cap: scores become cap * tanh(scores / cap) (Gemma 2).
    final_soft_cap: the same for logits.
    scale_embeddings: embeddings times sqrt(embed_dim), a factor rounded to the compute dtype (Gemma).
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
    norm_placement: NormPlacement = "pre"
    norm_unit_offset: bool = False
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
    qk_norm_over: Literal["head", "all_heads"] = "head"
    attention_scale: float | None = None
    attention_window: int | None = None
    global_every: int | None = None
    local_rope_theta: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    scale_embeddings: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    remat: RematPolicy = "none"
    scan_unroll: int = 1
    init_stddev: float = 0.02
    name: str = "gpt"

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "mlp_dim", "max_length", "scan_unroll", "rope_theta", "local_rope_theta",
                 "norm_epsilon", "attention_scale", "final_soft_cap")  # fmt: skip
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
        if self.attention_scale == self.head_dim**-0.5:
            object.__setattr__(self, "attention_scale", None)  # one value has one spelling
        self._check_partners()
        self.transformer().kinds  # noqa: B018 (their own checks, at parse time)

    def _check_experts(self) -> None:
        for name, default in (("mlp_dim", None), ("activation", "silu"), ("gated", True)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} has no effect on a mixture of experts: set "
                    f"model.experts.{name}, and leave model.{name} at {default!r}"
                )
        if self.mlp_bias:
            raise ValueError("mlp_bias True: experts have no biases; leave it False")

    def _check_partners(self) -> None:
        """Fields that do nothing without another one."""
        partners = {
            "global_every": ("attention_window", self.attention_window is not None),
            "local_rope_theta": (
                "attention_window and position='rotary'",
                self.attention_window is not None and self.position == "rotary",
            ),
            "qk_norm_over": ("qk_norm", self.qk_norm),
            "norm_unit_offset": ("norm='rmsnorm'", self.norm == "rmsnorm"),
        }
        for name, (partner, there) in partners.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            if value != default and not there:
                raise ValueError(
                    f"{name} {value!r} has no effect without {partner}; leave it at {default!r}"
                )

    def transformer(self) -> TransformerConfig:
        norm = NormConfig(self.norm, self.norm_epsilon, self.norm_bias, self.norm_unit_offset)
        qk_norm = NormConfig("rmsnorm", self.norm_epsilon, unit_offset=self.norm_unit_offset)
        rope, local_rope = self._ropes()
        windowed = self.attention_window is not None and self.global_every is None
        local = None
        if self.global_every is not None:
            local = LocalLayers(self.attention_window, self.global_every, local_rope)
        return TransformerConfig(
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            attention=AttentionConfig(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                bias=self.attention_bias,
                out_bias=self.attention_out_bias,
                qk_norm=qk_norm if self.qk_norm else None,
                qk_norm_over=self.qk_norm_over,
                scale=self.attention_scale,
                spec=AttentionSpec(
                    window=self.attention_window if windowed else None,
                    soft_cap=self.attention_soft_cap,
                ),
            ),
            mlp=self.experts or MlpConfig(self.mlp_dim, self.activation, self.gated, self.mlp_bias),
            norm=norm,
            norm_placement=self.norm_placement,
            rope=local_rope if windowed else rope,
            local=local,
            dropout=self.dropout,
            remat=self.remat,
            init_stddev=self.init_stddev,
            scan_unroll=self.scan_unroll,
        )

    def _ropes(self) -> tuple[RopeConfig | None, RopeConfig | None]:
        """Of layers that see all, and of layers with a window."""
        if self.position != "rotary":
            return None, None
        rope = RopeConfig(self.rope_theta, self.rope_scaling)
        return rope, rope if self.local_rope_theta is None else RopeConfig(self.local_rope_theta)

    def batch_flops(self, shapes: Shapes, *, causal_half: bool) -> float:
        """Model FLOPs of a training step on a batch; see core/flops.py."""
        rows, length = shapes["tokens"]
        names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                 "gated", "vocab_size", "attention_window", "global_every")  # fmt: skip
        sizes = {name: getattr(self, name) for name in names}
        if self.experts is not None:
            sizes |= {"mlp_dim": self.experts.active_dim, "gated": self.experts.gated}
        per_token = transformer_flops(**sizes, sequence_length=length, causal_half=causal_half)
        return rows * length * per_token
