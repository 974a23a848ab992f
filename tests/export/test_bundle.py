"""run.py computes what the model does, reads as if written by hand, and needs numpy alone."""

import ast
import dataclasses
import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from decoder_cases import CASES, config_of, our_logits, random_model, run_of, tokens
from exports import certified
from saved_run import save_run
from tiny import run_config
from tokenizer_kinds import make_tokenizers

from llm_jax.checkpoint.load import LoadedModel
from llm_jax.core.config import ConfigError, component
from llm_jax.core.flags import RunError
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import bundle, certificate
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import vocabulary
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig, top_p_mask
from llm_jax.models.gpt import Config
from llm_jax.nn.moe import MoeConfig

BYTES = raw_bytes.make(raw_bytes.Config())
QUIET = {"say": lambda text: None}
# What no architecture of Hugging Face has.
OWN = {
    "relu_squared": {"activation": "relu_squared", "gated": False, "position": "none"},
    "post": {"norm_placement": "post", "norm": "layernorm", "mlp_bias": True},
    "window": {"attention_window": 5, "local_rope_theta": 50.0, "attention_soft_cap": 2.0},
    "learned_windows": {"position": "learned", "attention_window": 4, "global_every": 2},
    "shared_expert": {"experts": MoeConfig(num_experts=4, mlp_dim=16, shared_dim=24)},
    "plain_experts": {"experts": MoeConfig(num_experts=4, mlp_dim=16, gated=False, shared_dim=8)},
}
SIZES = {"vocab_size": 264, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_length": 48}


def export(config, folder, tokenizer=BYTES, **options):
    model = random_model(config)
    exporter = bundle.make(bundle.Config(**options), **QUIET)
    exporter.export(model, tokenizer, run_of(config), folder)
    return model


CONFIGS = {name: config_of(name) for name in CASES if name != "gpt2_full_vocabulary"}
CONFIGS |= {name: Config(**SIZES | fields) for name, fields in OWN.items()}
FEW = ("gpt2", "gemma2", "gemma3_scaled", "olmo2", "qwen3_moe", "window", "post")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The models and folders of a few cases, made when they are asked for."""
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def of(name):
        return export(CONFIGS[name], folder / name), folder / name

    return of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def texts():
    """run.py of every case."""
    words = vocabulary(BYTES)
    return {name: bundle.program(config, BYTES, words, 5) for name, config in CONFIGS.items()}


def logits_of(folder, rows, parts):
    """In this process, row by row, as many tokens at a time as `parts` say."""
    run = runpy.run_path(str(folder / "run.py"))
    params = run["load"](folder / "model.safetensors")
    found = []
    for row in rows.tolist():
        cache, start, pieces = run["empty_cache"](len(row)), 0, []
        for size in parts:
            x = run["forward"](params, row[start : start + size], start, cache)
            pieces.append(run["logits"](params, x))
            start += size
        assert start == len(row)
        found.append(np.concatenate(pieces))
    return np.stack(found)


def check_logits(model, folder):
    rows = tokens(model.config.vocab_size, 20)
    ours = our_logits(model, rows)
    for parts in ([20], [1, 7, 1, 1, 10]):
        found = logits_of(folder, rows, parts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, ours, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_logits_are_ours_at_once_and_from_the_cache(exported, name):
    check_logits(*exported(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(FEW)))
def test_logits_of_every_other_decoder(exported, name):
    check_logits(*exported(name))


def check_style(*paths):
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--config", "pyproject.toml", "--target-version", "py39", *map(str, paths)]
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run([*ruff, *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_is_clean_for_python_3_9_and_has_no_traces_of_a_template(
    texts, made, tmp_path
):
    texts = dict(texts)
    for kind, tokenizer in made.items():
        words = vocabulary(tokenizer)
        texts[kind] = bundle.program(CONFIGS["llama"], tokenizer, words, 5)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        ast.parse(text, feature_version=(3, 9))
        assert not re.search(r"#:|\bgiven[._]", text), name
    check_style(*tmp_path.iterdir())


def test_only_what_the_model_uses_is_there(texts):
    only = {
        "def experts": {"mixtral", "qwen3_moe", "shared_expert", "plain_experts"},
        "LOCAL_ROPE_THETA": {"gemma3", "gemma3_scaled"},
        "position_embed": {"gpt2", "gpt2_untied", "learned_windows"},
        "def layer_norm": {"gpt2", "gpt2_untied", "post"},
        "def stretch": {"llama_scaled", "qwen3_head_dim"},
        "math.erf": {"llama"},
    }
    for part, names in only.items():
        assert {name for name, text in texts.items() if part in text} == names, part
    functions = {name: len(re.findall("^ *def ", text, re.M)) for name, text in texts.items()}
    assert functions["relu_squared"] < functions["gemma3"]
    assert all(len(text.splitlines()) < 300 for text in texts.values())


def test_a_process_of_its_own_gives_the_logits(exported):
    model, folder = exported("gemma2")
    rows = tokens(model.config.vocab_size, 9)
    forward = bundle.make(**QUIET).load_back(folder)
    for length in (1, 2, 9):
        found = forward({"tokens": rows[:, :length]})["logits"]
        np.testing.assert_allclose(found, our_logits(model, rows[:, :length]), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("package", ["jax", "safetensors", "llm_jax", "tokenizers"])
def test_no_package_but_numpy_is_there(exported, tmp_path, package):
    _, folder = exported("gpt2")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    program = tmp_path / "run.py"
    program.write_text(
        program.read_text().replace("import sys\n", f"import sys\n\nimport {package}\n")
    )
    with pytest.raises(RunError, match=f"{package} must not be imported"):
        bundle.make(**QUIET).load_back(tmp_path)


def test_a_program_that_fails_or_talks_is_understood(exported, tmp_path):
    _, folder = exported("gpt2")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    program, text = tmp_path / "run.py", (folder / "run.py").read_text()
    rows = tokens(300, 3)
    program.write_text(text.replace("BOS, EOS =", 'print("hello " * 99)\nBOS, EOS ='))
    found = bundle.make(**QUIET).load_back(tmp_path)({"tokens": rows})["logits"]
    np.testing.assert_allclose(found, logits_of(folder, rows, [3]), atol=1e-4)
    with pytest.raises(RunError, match="fails: IndexError: "):
        bundle.make(**QUIET).load_back(tmp_path)({"tokens": rows + 300})
    program.write_text(text + "\nraise SystemExit(3)\n")
    with pytest.raises(RunError, match="the bundle in a process of its own fails: exit status 3"):
        bundle.make(**QUIET).load_back(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_in_sixteen_bits_are_read_as_they_were_rounded(tmp_path, dtype):
    config = config_of("qwen3_moe")
    model = export(config, tmp_path / "out", dtype=dtype)
    export(config, tmp_path / "whole")
    params = {}
    for folder in ("out", "whole"):
        run = runpy.run_path(str(tmp_path / folder / "run.py"))
        params[folder] = run["load"](tmp_path / folder / "model.safetensors")
    rounded, whole = (p.pop("layers")[1] | p for p in (params["out"], params["whole"]))
    for name, x in whole.items():
        assert rounded[name].dtype == np.float32 if "tokenizer" not in name else True
        exact = x.ndim < 2 or name.endswith("router")
        wanted = x if exact else x.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(rounded[name], wanted, err_msg=name)
    size = lambda name: (tmp_path / name / "model.safetensors").stat().st_size  # noqa: E731
    assert size("out") < 0.6 * size("whole")
    assert model.config.experts is not None


def program(folder, *arguments):
    """Runs run.py where nothing can be imported but the standard library and numpy."""
    code = (
        "import runpy, sys\n"
        "sys.path.append(sys.argv[1])\n"
        "class Only:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.partition('.')[0] not in {*sys.stdlib_module_names, 'numpy'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Only)\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    packages = Path(np.__file__).parents[1]
    command = [
        sys.executable,
        "-S",
        "-E",
        "-I",
        "-c",
        code,
        packages,
        folder / "run.py",
        *arguments,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, check=False)


def test_texts_are_those_of_the_engine(exported):
    for name, prompt in (("gemma3_scaled", "Hé, a longer prompt, 3"), ("qwen3_moe", "")):
        model, folder = exported(name)
        greedy = SamplingConfig(temperature=0.0, max_tokens=30)
        (wanted,) = Engine(model, BYTES).generate([prompt], greedy)
        done = program(folder, prompt, "--temperature", "0", "--max_tokens", "30")
        assert done.stdout.decode() == prompt + wanted.text + "\n", done.stderr.decode()


def test_a_text_ends_where_the_model_does(exported):
    model, folder = exported("gpt2")
    run = runpy.run_path(str(folder / "run.py"))
    params = run["load"](folder / "model.safetensors")
    always = lambda token: list(run["generate"](params, [256, 7], 100, lambda y: token))  # noqa: E731
    assert always(257) == [257]
    assert always(5) == [5] * (model.config.max_length - 2)
    (wanted,) = Engine(model, BYTES).generate([[256, 7]], SamplingConfig(0.0, max_tokens=100))
    found = run["generate"](params, [256, 7], 100, lambda y: run["draw"](y, 0, None, 1.0, None))
    assert tuple(found) == wanted.tokens


def test_draws_follow_the_probabilities_among_those_that_are_kept(exported):
    _, folder = exported("gpt2")
    draw = runpy.run_path(str(folder / "run.py"))["draw"]
    scores = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    random = np.random.default_rng(1)
    for temperature, top_k, top_p in ((1.0, None, 0.7), (0.5, 9, 1.0), (2.0, 40, 0.5)):
        kept = np.sort(scores[:259])[::-1][: top_k or 259][-1]
        shown = np.where(scores[:259] >= kept, scores[:259] / temperature, -np.inf)
        chances = np.exp(shown - shown.max())
        chances /= chances.sum()
        chances *= np.asarray(top_p_mask(chances[None], top_p))[0]
        chances /= chances.sum()
        drawn = [draw(scores, temperature, top_k, top_p, random) for _ in range(3000)]
        counts = np.bincount(drawn, minlength=259) / 3000
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(chances))
        np.testing.assert_allclose(counts, chances, atol=0.04)
    assert draw(scores, 0, None, 1.0, None) == np.argmax(scores[:259])
    assert draw(scores, 1.0, 1, 1.0, random) == np.argmax(scores[:259])


def test_a_seed_gives_the_same_text_again(exported):
    _, folder = exported("gpt2")
    texts = [program(folder, "x", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(b"x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x" * 64], "the prompt has 65 tokens, and the model sees 64"),
        (["--temperature", "-1"], "temperature >= 0"),
        (["--temperature", "nan"], "temperature >= 0"),
        (["--top_p", "0"], "0 < top_p <= 1"),
        (["--top_k", "0"], "top_k >= 1"),
        (["--max_tokens", "0"], "max_tokens >= 1"),
        ([b"\xff".decode("utf-8", "surrogateescape")], "no Unicode text"),
    ],
)
def test_wrong_arguments_are_answered_in_a_line(exported, arguments, said):
    done = program(exported("gpt2")[1], *arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert said in done.stderr.decode().splitlines()[-1]


def test_what_has_no_bundle_says_so_before_anything_is_written(tmp_path):
    config, out = Config(**SIZES), tmp_path / "out"
    exporter = bundle.make(**QUIET)
    run = run_of(config)
    other = dataclasses.replace(run, model=component("models", "bert").Config(**{
        "vocab_size": 264, "embed_dim": 32, "num_layers": 1, "num_heads": 2}))  # fmt: skip
    with pytest.raises(ConfigError, match="no model 'bert'; choices: gpt"):
        exporter.export(random_model(config), BYTES, other, out)
    small = Config(**SIZES | {"vocab_size": 100})
    with pytest.raises(ConfigError, match="vocab_size 100 is smaller"):
        exporter.export(random_model(small), BYTES, run_of(small), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        export(config, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_tokenizer_that_cuts_otherwise_gets_no_folder(tmp_path, monkeypatch):
    wrong = lambda name, given: compose(name, given).replace('encode("utf-8")', 'encode("utf-16")')  # noqa: E731
    monkeypatch.setattr(bundle, "compose", wrong)
    with pytest.raises(RunError, match="the export's tokenizer makes"):
        export(Config(**SIZES), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def certified_llama(out):
    config = CONFIGS["llama_biases"]
    loaded = LoadedModel(random_model(config), run_of(config), BYTES, step=3)
    return certified(bundle.make(**QUIET), loaded, out)


def test_a_changed_program_is_noticed(tmp_path):
    out = certified_llama(tmp_path / "out")
    content = certificate.verify(out)
    assert content["figures"]["logits"]["equal_tokens"] == 1.0
    assert "run.py imports numpy and the standard library alone" in content["held"]
    path = out / "run.py"
    path.write_text(path.read_text().replace("ROPE_THETA = 10000.0", "ROPE_THETA = 20000.0"))
    with pytest.raises(RunError, match=r"run\.py is not what was certified"):
        certificate.verify(out)


def test_a_program_that_computes_otherwise_gets_no_folder(tmp_path, monkeypatch):
    changed = lambda *given: compose(*given).replace("ROPE_THETA = 10000.0", "ROPE_THETA = 20000.0")  # noqa: E731
    monkeypatch.setattr(bundle, "compose", changed)
    with pytest.raises(RunError, match="does not compute what the model does: logits"):
        certified_llama(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_changed_on_the_way_get_no_folder(tmp_path, monkeypatch):
    original = bundle.Stored.array

    def array(self):
        x = original(self)
        return x if x.shape != (48, 48) else x + np.float32(1e-2)

    monkeypatch.setattr(bundle.Stored, "array", array)
    with pytest.raises(RunError, match="does not compute what the model does: logits"):
        certified_llama(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path, monkeypatch):
    text = Path("docs/export_bundle.md").read_text()
    block = re.search(r"```\n(python -m llm_jax\.export .*?)```", text, re.DOTALL)[1]
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
    assert len(said) == 4
    assert "certified: " in said[0]
    assert said[1].startswith("def main(")
    assert said[3].startswith("out is what was certified")
