"""The functions compute what the model does, in any size, for three platforms, without llm_jax."""

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from decoder_cases import CASES, config_of, our_logits, random_model, run_of, tokens
from exports import ENCODER, MODELS, certified, loaded_of
from flax import nnx
from safetensors.numpy import load_file
from saved_run import save_run
from tiny import run_config
from tokenizer_kinds import make_tokenizers

from llm_jax.checkpoint.load import LoadedModel
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import certificate, functions, stablehlo
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import vocabulary
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.models import bert, encoder_decoder

BYTES = raw_bytes.make(raw_bytes.Config())
QUIET = {"say": lambda text: None}
FEW = ("gemma3",)
COMPILE = """
import runpy, sys
import jax, numpy as np
from jax.experimental import topologies
from safetensors.numpy import load_file

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
here = jax.sharding.SingleDeviceSharding(device)
shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
params = jax.tree.map(shape, load_file(sys.argv[1] + "/model.safetensors"))
int32 = lambda *dims: shape(np.zeros(dims, np.int32))
cache = jax.tree.map(shape, runpy.run_path(sys.argv[1] + "/run.py")["empty_cache"](3, 40))
for name, rest in {
    "forward": (int32(3, 9),),
    "prefill": (int32(3, 9), int32(3), cache),
    "decode": (int32(3), int32(3), int32(), cache),
}.items():
    data = open(f"{sys.argv[1]}/{name}.stablehlo", "rb").read()
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    compiled = call.trace(params, *rest).lower(lowering_platforms=("tpu",)).compile()
    print(name, compiled.as_text().count("tpu_custom_call"))
"""
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def export(config, folder, tokenizer=BYTES, say=lambda text: None, **options):
    model = random_model(config)
    exporter = stablehlo.make(stablehlo.Config(**options), say=say)
    exporter.export(model, tokenizer, run_of(config), folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models and folders, made when they are asked for."""
    folder = tmp_path_factory.mktemp("stablehlo")

    @functools.cache
    def of(name):
        # Longer than where kernels other than the reference are the choice.
        config = dataclasses.replace(config_of(name), max_length=2048)
        return export(config, folder / name), folder / name

    return of


def check_logits(model, folder):
    rows = tokens(model.config.vocab_size, 14)
    forward = stablehlo.make(**QUIET).load_back(folder)
    np.testing.assert_allclose(
        forward({"tokens": rows})["logits"], our_logits(model, rows), atol=5e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", FEW)
def test_a_process_without_llm_jax_gives_the_logits(exported, name):
    check_logits(*exported(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(FEW) - {"gpt2_full_vocabulary"}))
def test_logits_of_every_other_decoder(exported, name):
    check_logits(*exported(name))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_takes_the_artefact(exported, run_python):
    _, folder = exported("qwen3_moe")
    done = run_python("-c", COMPILE, folder, env=TPU)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["forward", "0", "prefill", "0", "decode", "0"]


def test_prompts_of_different_lengths_go_on_as_in_the_engine(exported):
    model, folder = exported("gemma3")
    run = runpy.run_path(str(folder / "run.py"))
    prompts = [[256, 7, 8, 9, 10, 11, 12, 13, 14], [256], [256, 90, 91]]
    greedy = lambda logits: np.argmax(logits, -1).astype(np.int32)  # noqa: E731
    steps = run["generate"](run["load_params"](), prompts, 20, greedy)
    found = np.stack(list(steps), axis=1)
    assert found.shape == (3, 20)
    wanted = Engine(model, BYTES).generate(prompts, SamplingConfig(0.0, max_tokens=20))
    for row, completion in zip(found.tolist(), wanted, strict=True):
        assert tuple(row[: len(completion.tokens)]) == completion.tokens


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_one_artefact_of_plain_operations_is_for_all_platforms_and_sizes(exported, name):
    _, folder = exported(name)
    for function, symbols in {"forward": "BT", "prefill": "BTC", "decode": "BC"}.items():
        data = (folder / f"{function}.stablehlo").read_bytes()
        found = jax.export.deserialize(bytearray(data))
        assert found.platforms == ("cpu", "cuda", "tpu")
        # What binds to a platform is a custom call; those below are checks of sizes and shardings.
        calls = set(re.findall(r"custom_call @(\w+)", found.mlir_module()))
        assert calls <= {"shape_assertion", "Sharding"}
        sizes = " ".join(str(n) for x in found.in_avals for n in x.shape)
        assert set(re.findall(r"[A-Z]", sizes)) == set(symbols)
        assert (
            found.calling_convention_version
            <= jax.export.maximum_supported_calling_convention_version
        )


def test_parameters_are_arguments_that_the_manifest_lists_in_order(exported):
    model, folder = exported("qwen3_moe")
    manifest = json.loads((folder / "manifest.json").read_text())
    params = load_file(folder / "model.safetensors")
    assert sum(x.size for x in params.values()) == sum(
        x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    for name, told in manifest["functions"].items():
        data = (folder / f"{name}.stablehlo").read_bytes()
        found = jax.export.deserialize(bytearray(data))
        shapes = [[n if isinstance(n, int) else str(n) for n in x.shape] for x in found.in_avals]
        assert [argument["shape"] for argument in told["arguments"]] == shapes
        assert [a["dtype"] for a in told["arguments"]] == [x.dtype.name for x in found.in_avals]
        assert len(data) < 200_000
        names = [a["name"] for a in told["arguments"] if a["name"].startswith("params[")]
        assert names == [f"params[{key!r}]" for key in sorted(params)]
        for argument in told["arguments"][: len(params)]:
            assert argument["shape"] == list(params[argument["name"][8:-2]].shape)
    results = [r["name"] for r in manifest["functions"]["decode"]["results"]]
    assert results == ["logits", "cache['keys'][0]", "cache['keys'][1]", "cache['values'][0]", "cache['values'][1]"]  # fmt: skip


def test_a_longer_row_than_the_model_has_is_refused(exported):
    _, folder = exported("gemma3")
    run = runpy.run_path(str(folder / "run.py"))
    with pytest.raises(ValueError, match="T"):
        run["load"]("forward")(run["load_params"](), np.zeros((1, 2049), np.int32))


@pytest.mark.slow
def test_sixteen_bits(tmp_path):
    config = config_of("gemma2")
    model = export(config, tmp_path / "out", compute_dtype="bfloat16")
    params = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(x.dtype) for x in params.values() if x.ndim > 1} == {"bfloat16"}
    assert {str(x.dtype) for x in params.values() if x.ndim == 1} == {"float32"}
    run = runpy.run_path(str(tmp_path / "out" / "run.py"))
    assert run["empty_cache"](1, 4)["keys"][0].dtype == "bfloat16"
    rows = tokens(config.vocab_size, 12)
    found = run["load"]("forward")(run["load_params"](), rows)
    # Random weights are far steeper than trained ones: only the bulk of the probabilities is compared.
    assert found.dtype == np.float32
    error = np.sqrt(np.mean((np.asarray(found) - our_logits(model, rows)) ** 2))
    assert 0 < error < 0.1 * np.std(our_logits(model, rows))


def program(folder, *arguments):
    command = [sys.executable, "-I", "-B", folder / "run.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, check=False)


@pytest.mark.slow
def test_the_program_writes_the_text_of_the_engine(exported):
    model, folder = exported("gemma3")
    (wanted,) = Engine(model, BYTES).generate(["Hé"], SamplingConfig(0.0, max_tokens=12))
    done = program(folder, "Hé", "--temperature", "0", "--max_tokens", "12")
    assert done.stdout.decode() == "Hé" + wanted.text + "\n", done.stderr.decode()
    assert not (folder / "__pycache__").exists()


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_written_leaves_ids(tmp_path):
    class Own:
        """A tokenizer that only we have."""

        name, vocab_size, bos_id, eos_id, pad_id = "own", 259, 256, 257, 258

    said = []
    config = config_of("gpt2")
    model = export(config, tmp_path / "out", Own(), said.append)
    assert "run.py takes ids of tokens, not text: tokenizer 'own' cannot be written" in said[0]
    run = tmp_path / "out" / "run.py"
    assert "class Tokenizer" not in run.read_text()
    (wanted,) = Engine(model, BYTES).generate([[256, 7, 8]], SamplingConfig(0.0, max_tokens=5))
    done = program(tmp_path / "out", "7,8", "--temperature", "0", "--max_tokens", "5")
    found = tuple(int(token) for token in done.stdout.split())
    assert found == tuple(token for token in wanted.tokens if token != 257), done.stderr.decode()
    for prompt, said in (("7,x", "not ids of tokens"), ("7,259", "lie in 0..258")):
        done = program(tmp_path / "out", prompt)
        assert done.returncode == 2
        assert said in done.stderr.decode().splitlines()[-1]


def test_what_is_written_is_clean(tmp_path):
    exporter = stablehlo.make(**QUIET)
    (tmp_path / "made").mkdir()
    tokenizers = {"ids": None, **make_tokenizers(tmp_path / "made")}
    shutil.rmtree(tmp_path / "made")
    cases = [(kind, config_of("gpt2"), tokenizer) for kind, tokenizer in tokenizers.items()]
    cases += [(f"{name}_ids", config, None) for name, config in OTHERS.items()]
    cases += [(name, config, tokenizers["bpe"]) for name, config in OTHERS.items()]
    made = {}
    for name, config, tokenizer in cases:
        words = tokenizer and vocabulary(tokenizer)
        if config not in made:
            made[config] = functions.FAMILIES[config.name](loaded_of(config).model, "float32")
        text = compose("stablehlo_run", exporter._given(made[config], BYTES, words, ["logits"]))
        ast.parse(text, feature_version=(3, 11))
        (tmp_path / f"{name}.py").write_text(text)
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", "pyproject.toml", str(tmp_path)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


OTHERS = {
    "t5": MODELS["t5"],
    "transformer": encoder_decoder.Config(**ENCODER, max_length=48, num_decoder_layers=1),
    "marian": encoder_decoder.Config(
        **ENCODER, max_length=48, tie_embeddings=False, head_bias=True
    ),
    "bert": MODELS["bert"],
    "roberta": bert.Config(**ENCODER, num_positions=50, num_token_types=1, head="masked_lm"),
    "bert_classes": MODELS["bert_classes"],
    "answers": bert.Config(**ENCODER, num_positions=40, head="question_answering"),
    "sentences": MODELS["sentences"],
}
OTHERS_FEW = ("t5",)


@pytest.mark.parametrize("name", OTHERS_FEW)
def test_models_with_encoders_are_certified(tmp_path, name):
    out = certified(stablehlo.make(**QUIET), loaded_of(OTHERS[name]), tmp_path / "out")
    content = json.loads((out / certificate.NAME).read_text())
    assert content["figures"].keys() == {"logits"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OTHERS) - set(OTHERS_FEW)))
def test_other_models_with_encoders_are_certified(tmp_path, name):
    out = certified(stablehlo.make(**QUIET), loaded_of(OTHERS[name]), tmp_path / "out")
    figures = certificate.verify(out)["figures"].keys()
    several = {
        "bert": {"logits", "class_logits"}, "bert_classes": {"class_logits"}, "sentences": {"hidden"},
    }  # fmt: skip
    assert figures == several.get(name, {"logits"})


@pytest.mark.slow
def test_answers_are_those_of_the_engine(tmp_path):
    loaded = loaded_of(OTHERS["transformer"], stddev=0.4)
    out = tmp_path / "out"
    stablehlo.make(**QUIET).export(loaded.model, BYTES, loaded.run, out)
    run = runpy.run_path(str(out / "run.py"))
    prompts = [[7, 8, 9, 10, 11, 257], [20, 257], [257]]
    greedy = lambda logits: np.argmax(logits, -1).astype(np.int32)  # noqa: E731
    found = np.stack(list(run["generate"](run["load_params"](), prompts, 12, greedy)), axis=1)
    config = SamplingConfig(0.0, max_tokens=12)
    wanted = Engine(loaded.model, BYTES).generate([*prompts, "ab"], config)
    for row, completion in zip(found.tolist(), wanted[:3], strict=True):
        assert tuple(row[: len(completion.tokens)]) == completion.tokens
    done = program(out, "ab", "--temperature", "0", "--max_tokens", "12")
    assert done.stdout.decode() == wanted[3].text + "\n", done.stderr.decode()


@pytest.mark.slow
def test_padding_of_an_encoder_changes_nothing(tmp_path):
    loaded = loaded_of(OTHERS["sentences"], stddev=0.4)
    stablehlo.make(**QUIET).export(loaded.model, BYTES, loaded.run, tmp_path / "out")
    run = runpy.run_path(str(tmp_path / "out" / "run.py"))
    forward, params = run["load"]("forward"), run["load_params"]()
    tokens = np.random.default_rng(0).integers(0, 256, (2, 11)).astype(np.int32)
    types = np.array([[0] * 5 + [1] * 6] * 2, np.int32)
    padded = forward(params, tokens, types, np.array([11, 7], np.int32))["hidden"]
    short = forward(params, tokens[1:, :7], types[1:, :7], np.array([7], np.int32))["hidden"]
    np.testing.assert_allclose(padded[1, :7], short[0], atol=1e-5)
    done = program(tmp_path / "out", "a text")
    assert done.stdout.startswith(b"hidden (1, 8, 32)\n"), done.stderr.decode()


def certified_gpt2(out):
    config = config_of("gpt2")
    return certified(
        stablehlo.make(**QUIET), LoadedModel(random_model(config), run_of(config), BYTES, 3), out
    )


@pytest.mark.slow
def test_a_changed_function_is_noticed(tmp_path):
    out = certified_gpt2(tmp_path / "out")
    assert certificate.verify(out)["figures"]["logits"]["equal_tokens"] == 1.0
    path = out / "decode.stablehlo"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"decode\.stablehlo is not what was certified"):
        certificate.verify(out)


def test_a_decode_that_computes_otherwise_gets_no_folder(tmp_path, monkeypatch):
    original = functions.Decoder.decode

    def decode(self, params, token, padding, length, cache):
        return original(self, params, token, padding + 1, length, cache)

    monkeypatch.setattr(functions.Decoder, "decode", decode)
    with pytest.raises(RunError, match="does not compute what the model does: logits"):
        certified_gpt2(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_family_is_refused(tmp_path):
    run = run_of(config_of("gpt2"))
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, name="other"))
    exporter = stablehlo.make(**QUIET)
    model = random_model(config_of("gpt2"))
    with pytest.raises(ConfigError, match="no model 'other'; choices: gpt, encoder_decoder, bert"):
        exporter.export(model, BYTES, other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "llm_jax\[stablehlo\]"'):
        stablehlo.make()


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path, monkeypatch):
    text = Path("docs/export_stablehlo.md").read_text()
    block = re.search(r"```\n(python -m llm_jax\.export .*?)```", text, re.DOTALL)[1]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    model = {"vocab_size": 264, "max_length": 64, "init_stddev": 0.2}
    run = run_config(model=model, data={"tokenizer": {"name": "raw_bytes"}})
    save_run(tmp_path / "runs" / "mine", run)
    monkeypatch.chdir(tmp_path)
    said = []
    for line in block.splitlines():
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said.append(done.stdout)
    assert "certified: " in said[0]
    assert said[-1].startswith("out is what was certified")
    names = {}
    exec(compile(code, "docs/export_stablehlo.md", "exec"), names)
    assert names["logits"].shape == (2, 3, 264)
