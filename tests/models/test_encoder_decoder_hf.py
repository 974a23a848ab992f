"""models/encoder_decoder/hf.py against transformers: equal logits in both directions, equal texts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import PAD, assert_same_parameters, export, padded_tokens, random_model
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError, load
from llm_jax.export import hf as export_hf
from llm_jax.models.encoder_decoder import Config
from llm_jax.models.encoder_decoder.hf import FAMILY
from llm_jax.nn.relative import RelativeBias, RelativeBiasConfig
from llm_jax.nn.transformer import unstack
from llm_jax.training.config import resolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Odd sizes everywhere; the head dim of T5 is not embed_dim / num_heads.
T5 = {
    "vocab_size": 263, "embed_dim": 30, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3,
    "head_dim": 14, "mlp_dim": 53, "max_length": 64, "position": "relative", "relative_buckets": 8,
    "relative_distance": 19, "norm": "rmsnorm", "norm_epsilon": 1e-5, "norm_bias": False,
    "norm_placement": "pre", "attention_bias": False, "mlp_bias": False, "attention_scale": 1.0,
    "scale_embeddings": False,
}  # fmt: skip
ORIGINAL = {**T5, "scale_outputs": True}
V1_1 = {**T5, "gated": True, "activation": "gelu_tanh", "tie_embeddings": False}
MARIAN = {
    "vocab_size": 263, "embed_dim": 30, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 5,
    "mlp_dim": 53, "max_length": 64, "head_bias": True,
}  # fmt: skip
CASES = {
    "t5": ("T5ForConditionalGeneration", ORIGINAL),
    "t5_v1_1": ("T5ForConditionalGeneration", V1_1),
    "t5_gated_gelu": (
        "T5ForConditionalGeneration",
        {**V1_1, "activation": "gelu", "num_layers": 1},
    ),
    "marian": ("MarianMTModel", {**MARIAN, "activation": "silu"}),
    "marian_unscaled": ("MarianMTModel", {**MARIAN, "scale_embeddings": False, "num_layers": 1}),
}


def batch_of(*, left=False, seed=1) -> dict:
    """Encoder rows padded on the right; decoder rows on the left where asked."""
    encoder_tokens, encoder_segment_ids = padded_tokens((17, 9, 2), 17, seed=seed)
    tokens, segment_ids = padded_tokens((13, 5, 1), 13, seed=seed + 1, left=left)
    return {
        "encoder_tokens": encoder_tokens,
        "encoder_segment_ids": encoder_segment_ids,
        "tokens": tokens,
        "segment_ids": segment_ids,
    }


@nnx.jit
def forward(model, batch):
    return model(batch).logits


def our_logits(model, batch) -> np.ndarray:
    return np.asarray(forward(model, batch) * (batch["segment_ids"][..., None] > 0))


def their_logits(model, batch) -> np.ndarray:
    tensors = {k: torch.tensor(v) for k, v in batch.items()}
    mask = tensors["segment_ids"]
    with torch.no_grad():
        out = model.eval()(
            input_ids=tensors["encoder_tokens"],
            attention_mask=tensors["encoder_segment_ids"],
            decoder_input_ids=tensors["tokens"],
            decoder_attention_mask=mask,
        )
    return (out.logits * (mask[..., None] > 0)).numpy()


def assert_equal_logits(ours, theirs, batch) -> None:
    np.testing.assert_allclose(
        our_logits(ours, batch), their_logits(theirs, batch), atol=1e-4, rtol=1e-5
    )


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(class, model, folder) of one case."""
    class_name, fields = CASES[request.param]
    model = random_model(Config(**fields))
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export(model, folder)
    return class_name, model, folder


def loaded_by_transformers(class_name, folder):
    theirs, report = getattr(transformers, class_name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return theirs


def test_transformers_computes_what_we_do(exported):
    class_name, model, folder = exported
    theirs = loaded_by_transformers(class_name, folder)
    assert_equal_logits(model, theirs, batch_of())
    if class_name.startswith("T5"):  # Marian's positions do not know of padding on the left
        assert_equal_logits(model, theirs, batch_of(left=True))


def test_import_of_an_export_is_the_same_model(exported):
    _, model, folder = exported
    loaded, config = export_hf.load(folder)
    assert config == model.config
    assert_same_parameters(loaded, model)


@pytest.mark.parametrize("exported", ["t5", "t5_v1_1", "marian"], indirect=True)
def test_transformers_writes_the_same_texts(exported):
    """Greedy, by our cache, from the padding id."""
    class_name, model, folder = exported
    theirs = loaded_by_transformers(class_name, folder)
    batch, count = batch_of(), 12
    theirs.generation_config.eos_token_id = None
    wanted = theirs.generate(
        torch.tensor(batch["encoder_tokens"]),
        attention_mask=torch.tensor(batch["encoder_segment_ids"]),
        do_sample=False, num_beams=1, max_new_tokens=count,
    ).numpy()  # fmt: skip
    assert (wanted[:, 0] == PAD).all()
    np.testing.assert_array_equal(greedy(unstack(model), batch, count), wanted)


def greedy(model, batch, count: int) -> np.ndarray:
    """[B, 1 + count]: from the padding id on."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, token, position, cache):
        model = nnx.merge(graphdef, state)
        out = model({"tokens": token, "positions": jnp.full_like(token, position)}, cache=cache)
        return jnp.argmax(out.logits, -1).astype(jnp.int32), out.cache

    start = lambda state: (m := nnx.merge(graphdef, state)).start(m.encode(batch), 1 + count)  # noqa: E731
    cache = jax.jit(start)(state)
    tokens = [jnp.full((len(batch["encoder_tokens"]), 1), PAD, jnp.int32)]
    for position in range(count):
        token, cache = step(state, tokens[-1], position, cache)
        tokens.append(token)
    return np.concatenate(tokens, 1)


def random_t5(**options):
    config = transformers.T5Config(
        vocab_size=263, d_model=30, d_kv=14, d_ff=53, num_layers=2, num_decoder_layers=3,
        num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=19,
        decoder_start_token_id=0, **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def random_marian(**options):
    config = transformers.MarianConfig(
        vocab_size=263, d_model=30, encoder_layers=2, decoder_layers=1, encoder_attention_heads=5,
        decoder_attention_heads=5, encoder_ffn_dim=53, decoder_ffn_dim=53, pad_token_id=258,
        max_position_embeddings=32, decoder_start_token_id=258, **options,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


THEIRS = {
    "t5": lambda: random_t5(),
    "t5_v1_1": lambda: random_t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5_silu": lambda: random_t5(feed_forward_proj="gated-silu"),
    "marian": lambda: random_marian(scale_embedding=True),
    "marian_swish": lambda: random_marian(activation_function="swish", init_std=0.3),
}


@pytest.fixture(scope="module", params=THEIRS)
def saved(request, tmp_path_factory):
    """(case, transformers' model, folder) of one case, with parameters of theirs."""
    torch.manual_seed(0)
    model = THEIRS[request.param]()
    if request.param == "t5_v1_1":  # transformers 5 ties what it makes itself
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="60KB")
    return request.param, model, folder


def test_we_compute_what_transformers_does(saved):
    case, theirs, folder = saved
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours, config = export_hf.load(folder)
    assert config.tie_embeddings == (case != "t5_v1_1")
    assert_equal_logits(ours, theirs, batch_of())


def test_checkpoint_of_transformers_4(exported, tmp_path):
    """Every copy of the embedding, buffers, an unused bias, and only keys that were there then."""
    class_name, model, folder = exported
    tensors = load_file(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content.pop("scale_decoder_outputs", None)
    if class_name.startswith("T5"):
        names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        cross = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[cross] = np.ones((8, 3), np.float32)
        shared = "shared.weight"
    else:
        stacks = ("encoder", "decoder")
        names = [f"model.{stack}.embed_tokens.weight" for stack in stacks]
        tensors |= {
            f"model.{s}.embed_positions.weight": np.ones((64, 30), np.float32) for s in stacks
        }
        shared = "model.shared.weight"
    names += ["lm_head.weight"] if model.config.tie_embeddings else []
    tensors |= dict.fromkeys(names, tensors[shared])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded, config = export_hf.load(tmp_path)
    assert config == model.config
    assert_same_parameters(loaded, model)
    tensors[names[0]] = tensors[names[0]] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{names[0]} differs from {shared}") as error:
        export_hf.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "distance", "length"), [(32, 128, 300), (8, 19, 31)])
def test_relative_biases_are_those_of_transformers(causal, buckets, distance, length):
    config = RelativeBiasConfig(buckets, distance)
    ours = RelativeBias(3, config, causal=causal, stddev=1.0, rngs=nnx.Rngs(0))
    attention = transformers.models.t5.modeling_t5.T5Attention(
        transformers.T5Config(
            d_model=8, num_heads=3, relative_attention_num_buckets=buckets,
            relative_attention_max_distance=distance, is_decoder=causal,
        ),
        has_relative_attention_bias=True, layer_idx=0,
    )  # fmt: skip
    attention.relative_attention_bias.weight.data = torch.tensor(np.asarray(ours.table[...]))
    with torch.no_grad():
        whole = attention.compute_bias(length, length)[0].numpy()
        later = attention.compute_bias(3, length, past_seen_tokens=length - 9)[0].numpy()
    rows, gathered, after = nnx.jit(
        lambda bias: (
            bias(length, length),
            bias.after(jnp.zeros((), int), length, length),
            bias.after(jnp.array(length - 9), 3, length),
        )
    )(ours)
    np.testing.assert_array_equal(rows, whole)
    np.testing.assert_array_equal(gathered, whole)
    seen = length - 6 if causal else length  # behind the last query a ring has what came before
    np.testing.assert_array_equal(after[..., :seen], later[..., :seen])


T5_BASE = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 3072, "d_kv": 64, "d_model": 768,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
    "num_heads": 12, "num_layers": 12, "output_past": True, "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "task_specific_params": {}, "vocab_size": 32128,
}  # fmt: skip
T5_V1_1_BASE = T5_BASE | {
    "d_ff": 2048, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 12,
    "tie_word_embeddings": False,
}  # fmt: skip
OPUS_MT = {
    "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "swish",
    "add_bias_logits": False, "add_final_layer_norm": False, "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0, "bad_words_ids": [[58100]], "bos_token_id": 0,
    "classif_dropout": 0.0, "classifier_dropout": 0.0, "d_model": 512,
    "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0,
    "decoder_layers": 6, "decoder_start_token_id": 58100, "decoder_vocab_size": 58101,
    "dropout": 0.1, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 0, "forced_eos_token_id": 0,
    "gradient_checkpointing": False, "init_std": 0.02, "is_encoder_decoder": True,
    "max_length": 512, "max_position_embeddings": 512, "model_type": "marian",
    "normalize_before": False, "normalize_embedding": False, "num_beams": 6,
    "num_hidden_layers": 6, "pad_token_id": 58100, "scale_embedding": True,
    "share_encoder_decoder_embeddings": True, "static_position_embeddings": True,
    "use_cache": True, "vocab_size": 58101,
}  # fmt: skip


def test_published_configs():
    files = {
        name: resolve(load(f"configs/{name}.py")).model
        for name in ("t5_base", "t5_v1_1_base", "transformer_base")
    }
    assert FAMILY.config_from_hf(T5_BASE) == files["t5_base"]
    gated = dataclasses.replace(files["t5_v1_1_base"], dropout=0.1)  # of fine-tuning
    assert FAMILY.config_from_hf(T5_V1_1_BASE) == gated
    by_transformers = transformers.T5Config(**T5_V1_1_BASE).to_dict()
    assert FAMILY.config_from_hf(by_transformers) == gated
    opus = FAMILY.config_from_hf(OPUS_MT)
    assert opus == Config(58101, 512, 6, 8, activation="silu", head_bias=True, dropout=0.1)
    same = {"vocab_size": 37000, "activation": "relu", "head_bias": False, "init_stddev": 512**-0.5}
    assert dataclasses.replace(opus, **same) == files["transformer_base"]


@pytest.mark.parametrize(
    "architecture",
    [a for a in FAMILY.architectures if a.applies({})],
    ids=lambda a: a.class_name,
)
def test_defaults_of_the_table_are_those_of_transformers(architecture):
    theirs = transformers.AutoConfig.for_model(architecture.model_type)
    for field in architecture.fields:
        if field.default is not None:
            assert getattr(theirs, field.key, field.default) == field.default, field
    content = json.loads(theirs.to_json_string(use_diff=False))
    names = {"model_type": architecture.model_type}
    assert FAMILY.config_from_hf(names) == FAMILY.config_from_hf(content | names)


@pytest.mark.parametrize(
    ("content", "changes", "named"),
    [
        (T5_BASE, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj = 'gated-mish'"),
        (T5_BASE, {"is_gated_act": True}, "is_gated_act = True"),
        (T5_BASE, {"num_experts": 8}, "num_experts = 8"),
        (T5_BASE, {"is_encoder_decoder": False}, "is_encoder_decoder = False"),
        (T5_V1_1_BASE, {"scale_decoder_outputs": True}, "scale_decoder_outputs = True"),
        (OPUS_MT, {"decoder_ffn_dim": 1024}, "encoder_ffn_dim = 2048, decoder_ffn_dim = 1024"),
        (OPUS_MT, {"decoder_vocab_size": 9}, "decoder_vocab_size = 9"),
        (OPUS_MT, {"normalize_before": True}, "normalize_before = True"),
        (OPUS_MT, {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        (OPUS_MT, {"num_hidden_layers": 5}, "num_hidden_layers"),
    ],
)
def test_an_option_that_we_cannot_compute_is_refused_by_name(content, changes, named):
    with pytest.raises(ConfigError, match=named) as error:
        FAMILY.config_from_hf(content | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "changes", "named"),
    [
        (ORIGINAL, {"scale_outputs": False}, "scale_outputs"),
        (V1_1, {"attention_scale": None}, "attention_scale"),
        (MARIAN, {"head_bias": False}, "head_bias"),
        (MARIAN, {"head_dim": 4}, "head_dim"),
        (MARIAN, {"norm_placement": "pre"}, "norm_placement"),
    ],
)
def test_a_model_that_hugging_face_lacks_is_refused_by_field(fields, changes, named):
    with pytest.raises(ConfigError, match=rf"model\.{named} = ") as error:
        FAMILY.architecture_for(dataclasses.replace(Config(**fields), **changes))
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named_in_one_line(exported):
    _, _, folder = exported
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "decoder" in name and name.endswith("weight"))
    shape = tensors[name].shape
    changes = {
        f"missing {name}": {k: v for k, v in tensors.items() if k != name},
        f"{name} is .*, not ": tensors | {name: np.zeros((*shape, 2), np.float32)},
        "extra qa_outputs.bias": tensors | {"qa_outputs.bias": np.zeros(2, np.float32)},
    }
    for named, changed in changes.items():
        save_file(changed, path)
        with pytest.raises(ConfigError, match=named) as error:
            export_hf.load(folder)
        assert "\n" not in str(error.value)
    save_file(tensors, path)
