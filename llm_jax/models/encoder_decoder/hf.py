"""T5 and Marian of Hugging Face: names, layouts and configs, for both directions.

How to read the tables: models/hf_table.py. T5's two MLPs, plain and gated, have other names, so each is an
architecture. Marian is the Transformer of 2017 with a bias on its logits.

Source: transformers 5.23, models/{t5,marian}. T5 of transformers 5 calls every model tied, whatever it loads, and
tells by scale_decoder_outputs which one is (1.1 is not); 4.x told by tie_word_embeddings.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.models.encoder_decoder.config import Config
from llm_jax.models.hf_config import ACTIVATIONS, Field, Group, check_type
from llm_jax.models.hf_table import Architecture, Family, Row, in_blocks


def _read_mlp(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    text = content.get("feed_forward_proj", "relu")
    name, gated = str(text).removeprefix("gated-"), str(text).startswith("gated-")
    if text == "gated-gelu":
        name = "gelu_new"  # what the name has meant since 1.1 was published
    activation = next((ours for ours, theirs in ACTIVATIONS.items() if name in theirs), None)
    if activation is None:
        known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
        raise ConfigError(
            f"config.json: feed_forward_proj = {text!r} cannot be computed; choices, also with gated- "
            f"before them: {known}"
        )
    implied = {"dense_act_fn": ACTIVATIONS[activation], "is_gated_act": (gated,)}
    for key, meant in implied.items():
        if content.get(key, meant[0]) not in meant:
            raise ConfigError(
                f"config.json contradicts itself: feed_forward_proj = {text!r}, {key} = {content[key]!r}"
            )
    return {"activation": activation, "gated": gated}


def _write_mlp(values: Mapping[str, Any]) -> dict[str, Any]:
    name = ACTIVATIONS[values["activation"]][0]
    if values["gated"]:
        # "gated-gelu" is the tanh form, so the exact one goes by its other name.
        name = {"gelu": "gelu_python", "gelu_new": "gelu"}.get(name, name)
    return {"feed_forward_proj": f"gated-{name}" if values["gated"] else name}


_MLP_KEYS = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
_MLP = Group(_MLP_KEYS, ("activation", "gated"), _read_mlp, _write_mlp)


def _read_head(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    tied = content.get("tie_word_embeddings") is not False
    scaled = content.get("scale_decoder_outputs", tied)
    if scaled and not tied:
        raise ConfigError(
            "config.json: scale_decoder_outputs = True cannot be computed where tie_word_embeddings "
            "is False"
        )
    return {"tie_embeddings": bool(scaled), "scale_outputs": bool(scaled)}


_T5_HEAD = Group(
    ("tie_word_embeddings", "scale_decoder_outputs"),
    ("tie_embeddings", "scale_outputs"),
    _read_head,
    lambda values: {
        "tie_word_embeddings": values["tie_embeddings"],
        "scale_decoder_outputs": values["scale_outputs"],
    },
)


def _same(ours: str, *keys: str, default: int | None, unwritten: tuple[str, ...] = ()) -> Group:
    """One number of ours that several keys must agree on."""

    def read(content, values):
        found = {key: content[key] for key in keys if content.get(key) is not None}
        for key, value in found.items():
            check_type(key, value, 1)
        if len(set(found.values())) > 1:
            pairs = ", ".join(f"{key} = {value}" for key, value in found.items())
            raise ConfigError(f"config.json: {pairs}: only equal ones can be computed")
        return {ours: next(iter(found.values()), default)}

    written = [key for key in keys if key not in unwritten]
    return Group(keys, (ours,), read, lambda values: dict.fromkeys(written, values[ours]))


def _attention(
    path: str, name: str, names: str = "q k v o", biases: bool = False
) -> tuple[Row, ...]:
    """Of one attention; names: Hugging Face's of query, key, value and out."""
    parts = dict(zip(("query", "key", "value", "out"), names.split(), strict=True))
    rows = []
    for ours, theirs in parts.items():
        dims, hf_dims = ("N H D", "D (N H)") if ours == "out" else ("D N H", "(N H) D")
        rows.append(Row(f"{path}.{ours}", dims, f"{name}.{theirs}.weight", hf_dims))
        if biases:
            dims, hf_dims = ("D", "D") if ours == "out" else ("N H", "(N H)")
            rows.append(Row(f"{path}.{ours}_bias", dims, f"{name}.{theirs}.bias", hf_dims))
    return tuple(rows)


def _t5_tensors(gated: bool) -> tuple[Row, ...]:
    def mlp(layer: str) -> tuple[Row, ...]:
        dense = f"{layer}.DenseReluDense"
        up = [Row("mlp.up", "D F", f"{dense}.wi.weight", "F D")]
        if gated:
            up = [
                Row("mlp.gate", "D F", f"{dense}.wi_0.weight", "F D"),
                Row("mlp.up", "D F", f"{dense}.wi_1.weight", "F D"),
            ]
        norm = Row("mlp_norm.scale", "D", f"{layer}.layer_norm.weight", "D")
        return (*up, Row("mlp.down", "F D", f"{dense}.wo.weight", "D F"), norm)

    itself = (
        *_attention("attention", "layer.0.SelfAttention"),
        Row("attention_norm.scale", "D", "layer.0.layer_norm.weight", "D"),
    )
    across = (
        *_attention("cross_attention", "layer.1.EncDecAttention"),
        Row("cross_norm.scale", "D", "layer.1.layer_norm.weight", "D"),
    )
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row("embed", "V D", "shared.weight", "V D"),
        Row("encoder.relative_bias.table", "R N", f"encoder.{bias}", "R N"),
        *in_blocks("encoder.layers.", "encoder.block.{}.", [*itself, *mlp("layer.1")]),
        Row("encoder_norm.scale", "D", "encoder.final_layer_norm.weight", "D"),
        Row("decoder.relative_bias.table", "R N", f"decoder.{bias}", "R N"),
        *in_blocks("decoder.layers.", "decoder.block.{}.", [*itself, *across, *mlp("layer.2")]),
        Row("decoder_norm.scale", "D", "decoder.final_layer_norm.weight", "D"),
        Row("head", "D V", "lm_head.weight", "V D"),
    )


def _t5(gated: bool) -> Architecture:
    return Architecture(
        model_type="t5",
        class_name="T5ForConditionalGeneration",
        applies=lambda content: _read_mlp(content, {})["gated"] == gated,
        fields=(
            Field("vocab_size", "vocab_size", 32128),
            Field("embed_dim", "d_model", 512),
            Field("head_dim", "d_kv", 64),
            Field("mlp_dim", "d_ff", 2048),
            Field("num_layers", "num_layers", 6),
            Field("num_decoder_layers", "num_decoder_layers", None),
            Field("num_heads", "num_heads", 8),
            Field("relative_buckets", "relative_attention_num_buckets", 32),
            Field("relative_distance", "relative_attention_max_distance", 128),
            Field("max_length", "n_positions", 512),
            Field("norm_epsilon", "layer_norm_epsilon", 1e-6),
            Field("dropout", "dropout_rate", 0.1),
        ),
        groups=(_MLP, _T5_HEAD),
        fixed={
            "position": "relative",
            "norm": "rmsnorm",
            "norm_bias": False,
            "norm_placement": "pre",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
            "scale_embeddings": False,
            "head_bias": False,
        },
        limits={"gated": gated, "scale_outputs": lambda values: values["tie_embeddings"]},
        only={"is_encoder_decoder": True},
        written={"initializer_factor": 1.0},
        ignored=frozenset({"classifier_dropout"}),
        skipped=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        copies={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
        tensors=_t5_tensors(gated),
    )


def _norm(path: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}.scale", "D", f"{name}.weight", "D"),
        Row(f"{path}.bias", "D", f"{name}.bias", "D"),
    )


def _marian_tensors() -> tuple[Row, ...]:
    names = "q_proj k_proj v_proj out_proj"
    itself = (
        *_attention("attention", "self_attn", names, biases=True),
        *_norm("attention_norm", "self_attn_layer_norm"),
    )
    across = (
        *_attention("cross_attention", "encoder_attn", names, biases=True),
        *_norm("cross_norm", "encoder_attn_layer_norm"),
    )
    mlp = (
        Row("mlp.up", "D F", "fc1.weight", "F D"),
        Row("mlp.up_bias", "F", "fc1.bias", "F"),
        Row("mlp.down", "F D", "fc2.weight", "D F"),
        Row("mlp.down_bias", "D", "fc2.bias", "D"),
        *_norm("mlp_norm", "final_layer_norm"),
    )
    return (
        Row("embed", "V D", "model.shared.weight", "V D"),
        *in_blocks("encoder.layers.", "model.encoder.layers.{}.", [*itself, *mlp]),
        *in_blocks("decoder.layers.", "model.decoder.layers.{}.", [*itself, *across, *mlp]),
        Row("head", "D V", "lm_head.weight", "V D"),
        Row("head_bias", "(1 V)", "final_logits_bias", "1 V"),
    )


MARIAN = Architecture(
    model_type="marian",
    class_name="MarianMTModel",
    fields=(
        Field("embed_dim", "d_model", 1024),
        Field("num_decoder_layers", "decoder_layers", 12),
        Field("max_length", "max_position_embeddings", 1024),
        Field("activation", "activation_function", "gelu", names=ACTIVATIONS),
        Field("dropout", "dropout", 0.1),
        Field("init_stddev", "init_std", 0.02),
        Field("scale_embeddings", "scale_embedding", False),
        Field("tie_embeddings", "tie_word_embeddings", True),
    ),
    groups=(
        _same("vocab_size", "vocab_size", "decoder_vocab_size", default=58101),
        _same("num_layers", "encoder_layers", "num_hidden_layers", default=12,
              unwritten=("num_hidden_layers",)),
        _same("num_heads", "encoder_attention_heads", "decoder_attention_heads", default=16),
        _same("mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim", default=4096),
    ),
    fixed={
        "position": "sinusoidal",
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "norm_bias": True,
        "norm_placement": "post",
        "gated": False,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_scale": None,
        "scale_outputs": False,
        "head_bias": True,
        "head_dim": lambda values: values["embed_dim"] // values["num_heads"],
    },
    only={
        "is_encoder_decoder": True,
        "share_encoder_decoder_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
        "static_position_embeddings": True,
    },
    written={"attention_dropout": 0.0, "activation_dropout": 0.0},
    ignored=frozenset(
        {"classif_dropout", "classifier_dropout", "encoder_layerdrop", "decoder_layerdrop", "_num_labels"}
    ),
    skipped=r"model\.(encoder|decoder)\.embed_positions\.weight",
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    tensors=_marian_tensors(),
)  # fmt: skip


def _sizes(config: Config) -> dict[str, int]:
    """What the letters of the tables stand for; R: buckets of relative distances."""
    return {
        "D": config.embed_dim,
        "N": config.num_heads,
        "H": config.head_dim,
        "F": config.mlp_dim,
        "V": config.vocab_size,
        "R": config.relative_buckets,
        "1": 1,
    }


FAMILY = Family(
    name="encoder_decoder",
    config=Config,
    architectures=(_t5(gated=False), _t5(gated=True), MARIAN),
    sizes=_sizes,
    free=frozenset({"max_length", "dropout", "remat", "scan_unroll", "init_stddev"}),
)
