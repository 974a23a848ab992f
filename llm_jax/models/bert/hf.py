"""BERT and RoBERTa of Hugging Face: names, layouts and configs, for both directions.

How to read the tables: models/hf_table.py. Unusual: each head is an architecture of its own, and any of
them starts from the checkpoint of any other, since their encoders are the same. RoBERTa's positions start
behind its padding id, which is thus a size of the model.

Source: transformers 5.23, models/{bert,roberta}; renames: checkpoints that were TensorFlow's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.models.bert.config import BertHead, Config
from llm_jax.models.hf_config import ACTIVATIONS, Field, Group, value_of
from llm_jax.models.hf_table import Architecture, Family, Row, in_blocks

_FIELDS = (
    Field("embed_dim", "hidden_size", 768),
    Field("num_layers", "num_hidden_layers", 12),
    Field("num_heads", "num_attention_heads", 12),
    Field("mlp_dim", "intermediate_size", 3072),
    Field("num_positions", "max_position_embeddings", 512),
    Field("num_token_types", "type_vocab_size", 2),
    Field("norm_epsilon", "layer_norm_eps", 1e-12),
    Field("dropout", "hidden_dropout_prob", 0.1),
    Field("init_stddev", "initializer_range", 0.02),
)

_BLOCK = (
    Row("attention.query", "D N H", "attention.self.query.weight", "(N H) D"),
    Row("attention.query_bias", "N H", "attention.self.query.bias", "(N H)"),
    Row("attention.key", "D N H", "attention.self.key.weight", "(N H) D"),
    Row("attention.key_bias", "N H", "attention.self.key.bias", "(N H)"),
    Row("attention.value", "D N H", "attention.self.value.weight", "(N H) D"),
    Row("attention.value_bias", "N H", "attention.self.value.bias", "(N H)"),
    Row("attention.out", "N H D", "attention.output.dense.weight", "D (N H)"),
    Row("attention.out_bias", "D", "attention.output.dense.bias", "D"),
    Row("attention_norm.scale", "D", "attention.output.LayerNorm.weight", "D"),
    Row("attention_norm.bias", "D", "attention.output.LayerNorm.bias", "D"),
    Row("mlp.up", "D F", "intermediate.dense.weight", "F D"),
    Row("mlp.up_bias", "F", "intermediate.dense.bias", "F"),
    Row("mlp.down", "F D", "output.dense.weight", "D F"),
    Row("mlp.down_bias", "D", "output.dense.bias", "D"),
    Row("mlp_norm.scale", "D", "output.LayerNorm.weight", "D"),
    Row("mlp_norm.bias", "D", "output.LayerNorm.bias", "D"),
)


def _dense(path: str, dims: str, name: str) -> tuple[Row, ...]:
    """Of a Dense; dims: into and out."""
    into, out = dims.split()
    return (
        Row(f"{path}.weight", dims, f"{name}.weight", f"{out} {into}"),
        Row(f"{path}.bias", out, f"{name}.bias", out),
    )


def _encoder(prefix: str) -> tuple[Row, ...]:
    return (
        Row("embed", "V D", f"{prefix}embeddings.word_embeddings.weight", "V D"),
        Row("position_embed", "P D", f"{prefix}embeddings.position_embeddings.weight", "P D"),
        Row("type_embed", "Y D", f"{prefix}embeddings.token_type_embeddings.weight", "Y D"),
        Row("embed_norm.scale", "D", f"{prefix}embeddings.LayerNorm.weight", "D"),
        Row("embed_norm.bias", "D", f"{prefix}embeddings.LayerNorm.bias", "D"),
        *in_blocks("stack.layers.", f"{prefix}encoder.layer.{{}}.", _BLOCK),
    )


def _mlm_head(dense: str, norm: str, bias: str) -> tuple[Row, ...]:
    return (
        *_dense("mlm_head.dense", "D U", dense),
        Row("mlm_head.norm.scale", "D", f"{norm}.weight", "D"),
        Row("mlm_head.norm.bias", "D", f"{norm}.bias", "D"),
        Row("mlm_head.bias", "V", bias, "V"),
    )


def _read_labels(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names, count = content.get("id2label"), value_of(content, "num_labels", 2)
    if names is None:
        return {"num_labels": 2 if count is None else count}
    if not isinstance(names, Mapping) or content.get("num_labels") not in (None, len(names)):
        raise ConfigError(f"config.json: id2label = {names!r} does not name num_labels = {count!r}")
    return {"num_labels": len(names)}


def _write_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {number: f"LABEL_{number}" for number in range(values["num_labels"])}
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


_LABELS = Group(
    ("id2label", "label2id", "num_labels"), ("num_labels",), _read_labels, _write_labels
)


def _read_offset(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    pad = content.get("pad_token_id", 1)
    if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
        raise ConfigError(f"config.json: pad_token_id = {pad!r}: positions of RoBERTa need an id")
    return {"position_offset": pad + 1}


_OFFSET = Group(
    ("pad_token_id",),
    ("position_offset",),
    _read_offset,
    lambda values: {"pad_token_id": values["position_offset"] - 1},
)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the classes of one model_type share.

    vocab_size: where config.json does not tell.
    logits: the layer that has the embedding again; bias: of it.
    heads: what its classes have on top, see Architecture.
    """

    model_type: str
    vocab_size: int
    logits: str
    bias: str
    heads: str
    fixed: Mapping[str, Any]
    groups: tuple[Group, ...] = ()
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def architecture(
        self,
        class_name: str,
        head: BertHead,
        *tensors: Row,
        pooler: bool = False,
        activation: str | None = None,
    ) -> Architecture:
        """Of a class with this head, whose rows these are; the headless class has no prefix.

        activation: the only one that it can have.
        """
        prefix = "" if head == "none" else f"{self.model_type}."
        bare = () if prefix else ((rf"^{self.model_type}\.", ""),)
        labels = head in ("sequence_classification", "token_classification")
        without = {} if labels else {"num_labels": None}
        names = ACTIVATIONS if activation is None else {activation: ACTIVATIONS[activation]}
        return Architecture(
            model_type=self.model_type,
            class_name=class_name,
            fields=(
                Field("vocab_size", "vocab_size", self.vocab_size),
                Field("activation", "hidden_act", "gelu", names=names),
                *_FIELDS,
            ),
            groups=(*self.groups, *([_LABELS] if labels else [])),
            fixed=self.fixed | {"head": head, "pooler": pooler} | without,
            limits=self.limits | ({"activation": activation} if activation else {}),
            only={"position_embedding_type": "absolute", "tie_word_embeddings": True},
            written={"attention_probs_dropout_prob": 0.0},
            ignored=_IGNORED,
            prefix=prefix,
            renames=(*_RENAMES, *bare),
            skipped=r"embeddings\.(position_ids|token_type_ids)",
            copies={
                f"{self.logits}.weight": f"{prefix}embeddings.word_embeddings.weight",
                f"{self.logits}.bias": self.bias,
            },
            heads=self.heads,
            tensors=(*_encoder(prefix), *tensors),
        )


_RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Of a dropout, and of BERT's own code, which has no choice in them.
_IGNORED = frozenset(
    {"classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads",
     "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"}
)  # fmt: skip
_TOKEN_CLASSES = _dense("token_head", "D C", "classifier")
_ANSWERS = _dense("token_head", "D C", "qa_outputs")

_BERT = _Kind(
    "bert",
    vocab_size=30522,
    logits="cls.predictions.decoder",
    bias="cls.predictions.bias",
    heads=r"(bert\.)?pooler\..*|cls\..*|classifier\..*|qa_outputs\..*",
    fixed={"position_offset": 0},
)
_BERT_POOLER = _dense("pooler", "D U", "bert.pooler.dense")
_BERT_MLM = _mlm_head(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
)
_BERT_PAIR = _dense("class_head", "D C", "cls.seq_relationship")
_BERT_CLASSES = _dense("class_head", "D C", "classifier")

_ROBERTA = _Kind(
    "roberta",
    vocab_size=50265,
    logits="lm_head.decoder",
    bias="lm_head.bias",
    heads=r"(roberta\.)?pooler\..*|lm_head\..*|classifier\..*|qa_outputs\..*",
    fixed={},
    groups=(_OFFSET,),
    limits={"position_offset": lambda values: max(1, values["position_offset"])},
)
# Its pooler is of its own; that of RobertaModel is not used, and never was trained.
_ROBERTA_CLASSES = (
    *_dense("pooler", "D U", "classifier.dense"),
    *_dense("class_head", "D C", "classifier.out_proj"),
)
_ROBERTA_MLM = _mlm_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")

ARCHITECTURES = (
    _BERT.architecture("BertModel", "none", *_dense("pooler", "D U", "pooler.dense"), pooler=True),
    _BERT.architecture("BertForMaskedLM", "masked_lm", *_BERT_MLM),
    _BERT.architecture(
        "BertForPreTraining", "pretraining", *_BERT_POOLER, *_BERT_MLM, *_BERT_PAIR, pooler=True
    ),
    _BERT.architecture(
        "BertForSequenceClassification", "sequence_classification", *_BERT_POOLER, *_BERT_CLASSES,
        pooler=True,
    ),
    _BERT.architecture("BertForTokenClassification", "token_classification", *_TOKEN_CLASSES),
    _BERT.architecture("BertForQuestionAnswering", "question_answering", *_ANSWERS),
    _ROBERTA.architecture(
        "RobertaModel", "none", *_dense("pooler", "D U", "pooler.dense"), pooler=True
    ),
    # The head's activation is this one, whatever the blocks have.
    _ROBERTA.architecture("RobertaForMaskedLM", "masked_lm", *_ROBERTA_MLM, activation="gelu"),
    _ROBERTA.architecture(
        "RobertaForSequenceClassification", "sequence_classification", *_ROBERTA_CLASSES, pooler=True
    ),
    _ROBERTA.architecture("RobertaForTokenClassification", "token_classification", *_TOKEN_CLASSES),
    _ROBERTA.architecture("RobertaForQuestionAnswering", "question_answering", *_ANSWERS),
)  # fmt: skip


def _sizes(config: Config) -> dict[str, int]:
    """What the letters of the tables stand for: C classes, P positions, Y token types, U = D."""
    return {
        "D": config.embed_dim,
        "U": config.embed_dim,
        "N": config.num_heads,
        "H": config.embed_dim // config.num_heads,
        "F": config.mlp_dim,
        "V": config.vocab_size,
        "P": config.num_positions,
        "Y": config.num_token_types,
        "C": config.num_classes or config.num_token_classes or 0,
    }


FAMILY = Family(
    name="bert",
    config=Config,
    architectures=ARCHITECTURES,
    sizes=_sizes,
    free=frozenset(
        {"head", "pooler", "num_labels", "dropout", "remat", "scan_unroll", "init_stddev"}
    ),
)
