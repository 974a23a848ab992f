"""Weights in 8 and 4 bits: what rounding may cost, and that what is read is what was written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from exports import MODELS, certified, loaded_of
from flax import nnx
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError, parse
from llm_jax.core.flags import RunError
from llm_jax.export import hf, quantized, slabs
from llm_jax.export.certificate import verify
from llm_jax.export.quantized import Config, _Scheme
from llm_jax.export.safetensors_file import Reader

QUIET = {"say": lambda text: None}


def scheme(shape, levels=127, group=None, turned=False):
    return _Scheme("w", shape, levels, group or shape[1], turned)


@pytest.mark.parametrize("levels", [127, 7])
@pytest.mark.parametrize("group", [None, 4, 6, 32])
def test_an_error_is_at_most_half_a_step(levels, group):
    x = np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    it = scheme(x.shape, levels, group)
    codes, scales = it.encode(x)
    back = it.decode(codes, scales)
    steps = np.repeat(scales.astype(np.float32), it.group, axis=1)[:, :30]
    # The largest of a group may be cut off, in 4 bits alone.
    inside = np.abs(x) <= levels * steps
    assert (np.abs(back - x)[inside] <= steps[inside] / 2 + 1e-6).all()
    assert inside.all() or levels == 7
    assert inside.mean() > 0.8


def test_cutting_off_lessens_the_error_of_four_bits():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    it = scheme(x.shape, 7)
    error = lambda back: np.mean((back - x) ** 2)  # noqa: E731
    whole = np.abs(x).max(1, keepdims=True) / 7
    assert error(it.decode(*it.encode(x))) < error(np.rint(x / whole) * whole)


def test_rows_of_zeros_and_odd_sizes_survive():
    x = np.zeros((3, 7), np.float32)
    x[1, 6] = 2.0
    for levels in (127, 7):
        it = scheme(x.shape, levels, 4)
        np.testing.assert_allclose(it.decode(*it.encode(x)), x, rtol=0.01)


def test_long_matrices_are_encoded_as_short_ones(monkeypatch):
    x = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    whole = scheme(x.shape, 7, 4).encode(x)
    monkeypatch.setattr(slabs, "_BYTES", 160)
    for a, b in zip(whole, scheme(x.shape, 7, 4).encode(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_finite_has_no_codes(tmp_path):
    it = loaded_of(MODELS["llama"])
    it.trained.head[...] = it.trained.head[...].at[2, 5].set(np.inf)
    with pytest.raises(ConfigError, match=r"lm_head\.weight has values that are not finite"):
        quantized.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


CASES = [
    ("llama", {"kind": "int8"}),
    ("llama", {"kind": "int4"}),
    ("bert", {"kind": "int8", "group": 16}),
    pytest.param("t5", {"kind": "int4", "group": 8}, marks=pytest.mark.slow),
    pytest.param(
        "gpt2", {"kind": "int8", "group": 16, "shard_bytes": 20_000}, marks=pytest.mark.slow
    ),
    pytest.param("gemma", {"kind": "int8"}, marks=pytest.mark.slow),
    pytest.param("mixtral", {"kind": "int4", "group": 16}, marks=pytest.mark.slow),
    pytest.param("bert_classes", {"kind": "int8"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_rounded_model_is_certified_and_smaller(tmp_path, name, options):
    it = loaded_of(MODELS[name], stddev=0.05)
    exporter = quantized.make(parse(Config, options), **QUIET)
    folder = certified(exporter, it, tmp_path / "out")
    content = verify(folder)
    output = "class_logits" if name == "bert_classes" else "logits"
    assert 0 < content["figures"][output]["kl_divergence"] < 0.3
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights < 0.55 * 4 * content["parameters"]
    assert len(list(folder.glob("*.safetensors"))) > 1 or "shard_bytes" not in options


def test_matrices_are_rounded_and_the_rest_is_kept(tmp_path):
    it = loaded_of(MODELS["gpt2"])
    exporter = quantized.make(Config(kind="int4", group=8), **QUIET)
    exporter.export(it.model, it.tokenizer, it.run, tmp_path / "out")
    stored = Reader(tmp_path / "out")
    dtypes = {s.name: (stored.read(s.name).dtype, s.shape) for s in stored.specs()}
    block = "transformer.h.1."
    assert dtypes[f"{block}attn.c_attn.weight.codes"] == (np.uint8, (96, 16))
    assert dtypes[f"{block}attn.c_attn.weight.scales"] == (jnp.bfloat16, (96, 4))
    assert dtypes[f"{block}attn.c_attn.bias"] == (np.float32, (96,))
    assert dtypes["transformer.wte.weight.codes"] == (np.int8, (264, 32))
    assert dtypes["transformer.wpe.weight"] == (np.float32, (160, 32))
    loaded, config = quantized.load(tmp_path / "out")
    assert config.position == "learned"
    query = np.asarray(loaded.stack.layers.attention.query[...])
    assert np.abs(query - np.asarray(it.model.stack.layers.attention.query[...])).max() < 0.05
    bias = lambda m: np.asarray(m.stack.layers.mlp.up_bias[...])  # noqa: E731
    np.testing.assert_array_equal(bias(loaded), bias(it.model))


def test_others_refuse_the_folder_and_it_refuses_others(tmp_path):
    it = loaded_of(MODELS["llama"])
    quantized.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "q")
    hf.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "hf")
    with pytest.raises(ConfigError, match="quantization_config"):
        hf.load(tmp_path / "q")
    with pytest.raises(ConfigError, match="tells of no quantized export"):
        quantized.load(tmp_path / "hf")
    content = json.loads((tmp_path / "q" / "config.json").read_text())
    content["quantization_config"]["group"] = 8
    (tmp_path / "q" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"missing, extra or misshapen: .*scales"):
        quantized.load(tmp_path / "q")


def test_tensors_that_are_missing_are_named(tmp_path):
    it = loaded_of(MODELS["llama"])
    quantized.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing, extra or misshapen: model\.norm\.weight"):
        quantized.load(tmp_path / "q")


def test_a_model_that_four_bits_ruin_gets_no_name(tmp_path):
    it = loaded_of(MODELS["gpt2"], stddev=2.0)
    with pytest.raises(
        RunError, match="does not compute what the model does: logits: KL divergence"
    ):
        certified(quantized.make(Config(kind="int4", group="row"), **QUIET), it, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_are_read_as_they_are_written():
    assert parse(Config, {"kind": "int4"}).group == 32
    assert parse(Config, {}).group == "row"
    assert parse(Config, {"group": 64}).group == 64
    with pytest.raises(ConfigError, match="group = 1"):
        parse(Config, {"group": 1})
    with pytest.raises(ConfigError, match="choices: int8, int4"):
        parse(Config, {"kind": "int3"})


def test_parameters_are_those_of_the_rounded_weights(tmp_path):
    """One channel by hand."""
    it = loaded_of(MODELS["llama"])
    quantized.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "q")
    model, _ = quantized.load(tmp_path / "q")
    row = np.asarray(it.model.stack.layers.mlp.up[...])[1, :, 4]
    step = np.abs(row).max() / 127
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))["stack"]["layers"]["mlp"]["up"][1, :, 4]
    np.testing.assert_allclose(found, np.rint(row / step) * step, rtol=1e-6)
