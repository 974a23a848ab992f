"""The folder an export makes, and which folders the import takes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError, component
from llm_jax.core.flags import RunError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf, safetensors_file
from llm_jax.models.gpt import Config, make
from llm_jax.models.hf_tensors import INDEX, SINGLE
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import unstack
from llm_jax.training.config import resolve

LLAMA = {"vocab_size": 300, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
GPT2 = {
    "vocab_size": 300, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_length": 32,
    "norm": "layernorm", "norm_bias": True, "position": "learned", "activation": "gelu_tanh",
    "gated": False, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
    "tie_embeddings": True,
}  # fmt: skip


def run_of(fields):
    return resolve(
        {
            "model": {"name": "gpt", **fields},
            "data": {
                "sources": [{"name": "text", "path": "unread.txt"}],
                "tokenizer": {"name": "raw_bytes"},
                "sequence_length": 16,
            },
            "train": {"num_steps": 1, "batch_size": 1},
        }
    )


def model_of(fields):
    """Random without a compilation."""
    abstract = nnx.eval_shape(
        lambda: make(Config(**fields), precision=Precision(), rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def params_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def export(fields, out, *, say=lambda text: None, **options):
    model = model_of(fields)
    exporter = hf.make(hf.Config(**options), say=say)
    exporter.export(model, raw_bytes.make(raw_bytes.Config()), run_of(fields), out)
    return model


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE)


def test_an_export_is_a_whole_folder(tmp_path):
    said = []
    export(GPT2, tmp_path / "deep" / "out", say=said.append)
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with safe_open(tmp_path / "deep" / "out" / SINGLE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (safe_open is no mapping)
    assert len(said) == 1
    assert said[0].startswith("verified: ")
    generation = json.loads((tmp_path / "deep" / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def test_shards_keep_to_their_limit_and_hold_the_same_tensors(tmp_path):
    model = export(LLAMA, tmp_path / "one")
    export(LLAMA, tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    parts = {path.name: load_file(path) for path in files}
    for part in parts.values():
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 20_000
    whole = load_file(tmp_path / "one" / SINGLE)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(parts[file][name], whole[name])
    loaded, _ = hf.load(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), params_of(model))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    export(LLAMA, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        export(LLAMA, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_export_that_reads_back_wrong_gets_no_name(tmp_path, monkeypatch):
    write = safetensors_file.write_safetensors

    def with_a_flipped_bit(path, specs, tensors, metadata):
        write(path, specs, tensors, metadata)
        content = load_file(path)
        content["lm_head.weight"].view(np.uint8)[0, 0] ^= 1
        save_file(content, path)

    monkeypatch.setattr(safetensors_file, "write_safetensors", with_a_flipped_bit)
    with pytest.raises(RunError, match=r"lm_head\.weight does not read back"):
        export(LLAMA, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_reads_back_otherwise_gets_no_name(tmp_path, monkeypatch):
    original = hf._write_json

    def write(path, value):
        original(path, {**value, "rms_norm_eps": 1e-3} if path.name == "config.json" else value)

    monkeypatch.setattr(hf, "_write_json", write)
    with pytest.raises(RunError, match=r"config\.json reads back"):
        export(LLAMA, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_nan_is_exported_as_it_is(tmp_path):
    model = model_of(LLAMA)
    model.embed[...] = model.embed[...].at[3, 5].set(np.nan)
    tokenizer = raw_bytes.make(raw_bytes.Config())
    hf.make(say=lambda text: None).export(model, tokenizer, run_of(LLAMA), tmp_path / "out")
    assert np.isnan(load_file(tmp_path / "out" / SINGLE)["model.embed_tokens.weight"][3, 5])


def test_what_cannot_be_exported_says_so_before_anything_is_written(tmp_path):
    exporter, tokenizer = hf.make(), raw_bytes.make(raw_bytes.Config())
    out = tmp_path / "out"
    small, plain = LLAMA | {"vocab_size": 100}, LLAMA | {"gated": False}
    with pytest.raises(ConfigError, match="vocab_size 100 is smaller"):
        exporter.export(model_of(small), tokenizer, run_of(small), out)
    with pytest.raises(ConfigError, match="object cannot be written"):
        exporter.export(model_of(LLAMA), object(), run_of(LLAMA), out)
    with pytest.raises(ConfigError, match="gated"):
        exporter.export(model_of(plain), tokenizer, run_of(plain), out)
    with pytest.raises(ValueError, match=r"stack\.layers\.0"):
        exporter.export(unstack(model_of(LLAMA)), tokenizer, run_of(LLAMA), out)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    export(LLAMA, tmp_path / "out")

    def change(tensors):
        tensors["model.layers.1.mlp.surprise"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        return tensors

    rewrite(tmp_path / "out", change)
    with pytest.raises(ConfigError) as error:
        hf.load(tmp_path / "out")
    for part in ("missing model.layers.1.mlp.up_proj.weight", "extra model.layers.1.mlp.surprise",
                 "shape of model.norm.weight is (31,), not (32,)"):  # fmt: skip
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_old_gpt2_files_load(tmp_path):
    """Without the prefix, with the buffers and the copy of the tied head that they have."""
    model = export(GPT2, tmp_path / "out")

    def age(tensors):
        old = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        for layer in range(2):
            old[f"h.{layer}.attn.bias"] = np.ones((1, 1, 32, 32), np.uint8)
            old[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4)[None]
        old["lm_head.weight"] = old["wte.weight"].copy()
        return old

    rewrite(tmp_path / "out", age)
    loaded, _ = hf.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), params_of(model))
    rewrite(tmp_path / "out", lambda old: old | {"lm_head.weight": old["wte.weight"] + 1})
    with pytest.raises(ConfigError, match="ties them"):
        hf.load(tmp_path / "out")


def test_llama_buffers_are_passed_over(tmp_path):
    export(LLAMA, tmp_path / "out")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(tmp_path / "out", lambda tensors: tensors | buffer)
    hf.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = export(LLAMA, tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: {k: x.astype(dtype) for k, x in tensors.items()})
    loaded, _ = hf.load(tmp_path / "out")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params_of(model))
    jax.tree.map(np.testing.assert_array_equal, params_of(loaded), rounded)


def test_integers_are_no_parameters(tmp_path):
    export(LLAMA, tmp_path / "out")
    change = {"model.norm.weight": np.ones(32, np.int32)}
    rewrite(tmp_path / "out", lambda tensors: tensors | change)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is stored as I32"):
        hf.load(tmp_path / "out")


def test_folders_that_are_no_models_say_what_they_lack(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ConfigError, match=r"'bloom' cannot be read; choices: .*gpt2, llama"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        hf.load(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"no header")
    with pytest.raises(ConfigError, match="cannot be read"):
        hf.load(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"wte.weight": "gone.safetensors"}}')
    with pytest.raises(ConfigError, match=r"lacks gone\.safetensors"):
        hf.load(tmp_path)


def test_the_exporter_is_found_by_name():
    assert component("export", "hf") is hf
