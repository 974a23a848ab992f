"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): values of one config."""

import dataclasses
from typing import Literal

from llm_jax.core.flops import Shapes, dense_flops, transformer_flops
from llm_jax.nn.attention import AttentionConfig
from llm_jax.nn.block import TransformerConfig
from llm_jax.nn.kernels.spec import AttentionSpec
from llm_jax.nn.mlp import MlpConfig
from llm_jax.nn.norm import NormConfig
from llm_jax.nn.remat import RematPolicy

BertHead = Literal[
    "none",
    "masked_lm",
    "pretraining",
    "sequence_classification",
    "token_classification",
    "question_answering",
]
_POOLED = ("pretraining", "sequence_classification")


@dataclasses.dataclass(frozen=True)
class Config:
    """A bidirectional encoder. The defaults are BERT's choices; RoBERTa's are in configs/roberta_base.py.

    head: what stands on the encoder.
      "masked_lm": the tokens at `predict_positions`, or at all positions.
      "pretraining": the same, and two classes for a pair of texts.
      "sequence_classification": `num_labels` classes from the first token.
      "token_classification": `num_labels` classes for each token.
      "question_answering": for each token, whether the answer starts and whether it ends there.
    pooler: a layer over the first token, on which two of the heads stand. None: there is one for those, and
      for the head "none", since checkpoints bring one.
    num_positions: rows of the position table; the first `position_offset` are not used (RoBERTa: 2).
    """

    vocab_size: int
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_positions: int = 512
    position_offset: int = 0
    num_token_types: int = 2
    activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "gelu"
    norm_epsilon: float = 1e-12
    head: BertHead = "pretraining"
    pooler: bool | None = None
    num_labels: int | None = None
    dropout: float = 0.0
    remat: RematPolicy = "none"
    scan_unroll: int = 1
    init_stddev: float = 0.02
    name: str = "bert"

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "num_positions",
                 "num_token_types", "num_labels", "norm_epsilon", "scan_unroll")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.position_offset < self.num_positions:
            raise ValueError(
                f"position_offset {self.position_offset} must lie in [0, num_positions "
                f"{self.num_positions})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")
        classifies = self.head in ("sequence_classification", "token_classification")
        if classifies != (self.num_labels is not None):
            raise ValueError(
                f"num_labels {self.num_labels} with head {self.head!r}: sequence_classification and "
                "token_classification need it, the others have none"
            )
        if self.pooler is None:
            object.__setattr__(self, "pooler", self.head in ("none", *_POOLED))
        if not self.pooler and self.head in _POOLED:
            raise ValueError(f"pooler False: the head {self.head!r} stands on the pooler")

    @property
    def max_length(self) -> int:
        return self.num_positions - self.position_offset

    @property
    def norm(self) -> NormConfig:
        return NormConfig("layernorm", self.norm_epsilon, bias=True)

    @property
    def num_classes(self) -> int | None:
        """Of the head over the pooled first token."""
        return {"pretraining": 2, "sequence_classification": self.num_labels}.get(self.head)

    @property
    def num_token_classes(self) -> int | None:
        """Of a head over each token that does not make tokens."""
        return {"token_classification": self.num_labels, "question_answering": 2}.get(self.head)

    def transformer(self) -> TransformerConfig:
        head_dim = self.embed_dim // self.num_heads
        return TransformerConfig(
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            attention=AttentionConfig(
                num_heads=self.num_heads,
                num_kv_heads=self.num_heads,
                head_dim=head_dim,
                bias=True,
                out_bias=True,
                spec=AttentionSpec(causal=False),
            ),
            mlp=MlpConfig(self.mlp_dim, self.activation, gated=False, bias=True),
            norm=self.norm,
            norm_placement="post",
            dropout=self.dropout,
            remat=self.remat,
            init_stddev=self.init_stddev,
            scan_unroll=self.scan_unroll,
        )

    def batch_flops(self, shapes: Shapes, *, causal_half: bool) -> float:
        """Model FLOPs of a training step on a batch; all tokens see each other. See core/flops.py."""
        del causal_half
        rows, length = shapes["tokens"]
        width = self.embed_dim
        per_token = transformer_flops(
            num_layers=self.num_layers,
            embed_dim=width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=width // self.num_heads,
            mlp_dim=self.mlp_dim,
            gated=False,
            vocab_size=None,
            sequence_length=length,
            causal_half=False,
        )
        total = rows * length * per_token
        if self.head in ("masked_lm", "pretraining"):
            predicted = shapes.get("predict_positions", shapes["tokens"])
            total += dense_flops(rows * predicted[1], width * (width + self.vocab_size))
        if self.num_token_classes is not None:
            total += dense_flops(rows * length, width * self.num_token_classes)
        if self.num_classes is not None:
            total += dense_flops(rows, width * (width + self.num_classes))
        return total
