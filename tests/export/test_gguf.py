"""GGUF: every architecture that llama.cpp and we both compute, read back, and by llama.cpp itself."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exports import GEMMA2, GEMMA3, GPT2, LLAMA, MIXTRAL, MODELS, SIZES, certified, loaded_of
from tokenizer_kinds import train_like_llama

from llm_jax.core.config import ConfigError, component, parse
from llm_jax.data.tokenizers import huggingface, sentencepiece, tiktoken
from llm_jax.export.certificate import verify
from llm_jax.export.probes import forward_of
from llm_jax.models.gpt import Config
from llm_jax.models.gpt.hf import FAMILY
from llm_jax.nn.rope import RopeScaling

gguf_package = pytest.importorskip("gguf")
from llm_jax.export import gguf, gguf_models, gguf_vocabulary  # noqa: E402

QUIET = {"say": lambda text: None}
BIASES = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
SCALING = RopeScaling(
    factor=4.0, low_frequency_factor=1.0, high_frequency_factor=3.0, original_max_length=16
)
LINEAR = RopeScaling("linear", factor=4.0)
NORMALIZED = dataclasses.replace(MIXTRAL["experts"], experts_per_token=3)
# The name in the table of Hugging Face, the one of llama.cpp, and what differs from SIZES.
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", GPT2 | {"tie_embeddings": False, "mlp_dim": 96}),
    "llama": ("llama", LLAMA),
    "llama_biases": ("llama", LLAMA | BIASES | {"head_dim": 16, "tie_embeddings": True}),
    "llama_scaled": ("llama", LLAMA | {"rope_scaling": SCALING, "rope_theta": 100.0}),
    "llama_linear": ("llama", {"rope_scaling": LINEAR, "num_kv_heads": 1}),
    "mistral": ("llama", LLAMA | {"attention_window": 144}),
    "mixtral": ("llama", MIXTRAL),
    "qwen2": ("qwen2", LLAMA | {"attention_bias": True}),
    "qwen3": ("qwen3", LLAMA | {"qk_norm": True, "head_dim": 16, "rope_scaling": LINEAR}),
    "qwen3_moe": ("qwen3moe", {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "experts": NORMALIZED}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2_27b": ("gemma2", GEMMA2 | {"num_layers": 46}),
    "gemma3": ("gemma3", GEMMA3 | {"attention_scale": 20**-0.5}),
    "gemma3_linear": ("gemma3", GEMMA3 | {"global_every": None, "rope_scaling": LINEAR}),
    "olmo2": (
        "olmo2",
        LLAMA | {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"},
    ),
    "olmo2_tied": (
        "olmo2",
        {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads", "tie_embeddings": True},
    ),
}  # fmt: skip
FAST = ("llama", "gemma2", "mixtral")
TEXTS = (
    "def f(x):\n    return  x\r\n\n\t# end  ",
    " one  two Three, it's <x> 1234567 don 't .<x>x   ",
    "中文 字符 é é ﬁ Ａ 😀👨‍👩‍👧 ﻿ ",
    "\x01\x7f <s></s><unk><pad><|endoftext|><0x41> [MASK]",
    "",
)


def made(case, **fields):
    return loaded_of(Config(**SIZES | CASES[case][1]), **fields)


def export(case, folder, dtype="f32", **fields):
    it = made(case, **fields)
    return it, certified(gguf.make(gguf.Config(dtype=dtype), **QUIET), it, folder)


cases = pytest.mark.parametrize(
    "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


@cases
def test_what_is_read_back_computes_the_same(tmp_path, case):
    _, folder = export(case, tmp_path / "out")
    content = verify(folder)
    assert content["figures"]["logits"]["largest_difference"] < 1e-5
    fields = gguf_package.GGUFReader(folder / gguf.FILE).fields
    assert fields["general.architecture"].contents() == CASES[case][0]
    assert {path.name for path in folder.iterdir()} == {
        "model.gguf",
        "README.md",
        "certificate.json",
    }


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_fewer_bits_cost_what_they_may(tmp_path, dtype):
    it, folder = export("llama", tmp_path / "out", dtype)
    figures = verify(folder)["figures"]["logits"]
    assert 0 < figures["kl_divergence"] < {"f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}[dtype]
    tensors = {
        t.name: t.tensor_type.name for t in gguf_package.GGUFReader(folder / gguf.FILE).tensors
    }
    assert tensors["output_norm.weight"] == "F32"
    assert tensors["blk.1.ffn_up.weight"] == dtype.upper()
    assert it.run.model.mlp_dim % 32 == 0


def test_rows_that_blocks_do_not_divide_stay_in_sixteen_bits(tmp_path):
    config = Config(**SIZES | {"mlp_dim": 72, "embed_dim": 32})
    it = loaded_of(config)
    gguf.make(gguf.Config(dtype="q8_0"), **QUIET).export(
        it.model, it.tokenizer, it.run, tmp_path / "o"
    )
    reader = gguf_package.GGUFReader(tmp_path / "o" / gguf.FILE)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


REFUSED = {
    "activation": (LLAMA | {"activation": "gelu"}, "model.activation = 'gelu' \\(it takes silu\\)"),
    "window": (LLAMA | {"attention_window": 7}, "model.attention_window = 7"),
    "relu": (GPT2 | {"activation": "relu"}, "GPT2LMHeadModel otherwise"),
    "heads": (
        LLAMA | {"attention_bias": True, "head_dim": 6, "attention_out_bias": False},
        "model.head_dim = 6 \\(it takes 8",
    ),
    "scaling": (
        LLAMA | {"qk_norm": True, "rope_scaling": SCALING},
        "rope_scaling.kind = 'llama3' \\(it takes 'linear' or None\\)",
    ),
    "router": (
        {"qk_norm": True, "num_kv_heads": 2,
         "experts": dataclasses.replace(NORMALIZED, normalize_weights=False)},
        "experts.normalize_weights = False",
    ),
    "caps": (GEMMA2 | {"final_soft_cap": None}, "model.final_soft_cap = None \\(it takes a number\\)"),
    "no class": ({"gated": False}, "no Hugging Face architecture computes this model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_in_one_line(tmp_path, case):
    fields, message = REFUSED[case]
    it = loaded_of(Config(**SIZES | fields))
    with pytest.raises(ConfigError, match=message) as error:
        gguf.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_families_are_refused_with_the_choices(tmp_path, name):
    it = loaded_of(MODELS[name])
    with pytest.raises(
        ConfigError, match=r"llama\.cpp gets no model .*choices: GPT2LMHeadModel, Llama"
    ):
        gguf.make(**QUIET).export(it.model, it.tokenizer, it.run, tmp_path / "out")


def test_every_decoder_of_the_table_is_known_or_refused():
    assert {a.class_name for a in FAMILY.architectures} == gguf_models.CONVENTIONS.keys()


def test_files_that_are_no_gguf_say_so(tmp_path):
    path = tmp_path / gguf.FILE
    for content in (b"", b"GGUF", b"no header at all, but long enough for one"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as GGUF"):
            gguf.load(path)
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        gguf.load(tmp_path / "absent.gguf")


def test_the_exporter_is_found_by_name_and_its_option_checked():
    assert component("export", "gguf") is gguf
    with pytest.raises(ConfigError, match="choices: f32, f16, bf16, q8_0"):
        parse(gguf.Config, {"dtype": "q4_0"})


def trained_sentencepiece(**fields):
    texts = ["def main(argument):\n    return argument + 1\n", "it is the word of the day\n"] * 200
    config = sentencepiece.Config(vocab_size=320, extra_tokens=("[MASK]",), **fields)
    return sentencepiece.train(config, texts)


def tiktoken_like(tmp_path):
    import base64

    pieces = [bytes([b]) for b in range(256)] + [b"in", b" t", b"  ", b"he", b" the", b"ing", b"or"]
    path = tmp_path / "own.tiktoken"
    path.write_text("".join(f"{base64.b64encode(p).decode()} {i}\n" for i, p in enumerate(pieces)))
    return path


def tokenizers(tmp_path):
    path = tiktoken_like(tmp_path)
    made = {
        "sentencepiece": trained_sentencepiece(),
        "gpt2": tiktoken.make(tiktoken.Config(encoding=str(path), pattern_of="r50k_base")),
        "gpt4": tiktoken.make(tiktoken.Config(encoding=str(path), pattern_of="cl100k_base")),
    }
    for name, pieces in {"pieces": ["<x>"], "spaces": ["▁▁", "<x>"]}.items():
        path = tmp_path / f"{name}.model"
        path.write_bytes(train_like_llama(user_defined_symbols=pieces, add_dummy_prefix=False))
        made[name] = sentencepiece.make(sentencepiece.Config(path=str(path)))
    for name in ("sentencepiece", "gpt4", "pieces"):
        made[name].save_huggingface(tmp_path / name)
        config = huggingface.Config(path=str(tmp_path / name))
        made[f"{name} as tokenizer.json"] = huggingface.make(config)
    return made


def test_unigrams_and_unknown_patterns_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="it is no bpe"):
        gguf_vocabulary.vocabulary_of(trained_sentencepiece(model_type="unigram"))
    it = tokenizers(tmp_path)["gpt4"]
    it.save_huggingface(tmp_path / "odd")
    content = json.loads((tmp_path / "odd" / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}|\P{N}+"
    (tmp_path / "odd" / "tokenizer.json").write_text(json.dumps(content))
    odd = huggingface.make(huggingface.Config(path=str(tmp_path / "odd")))
    with pytest.raises(
        ConfigError, match=r"word patterns have none like this tokenizer's; .* gpt-2"
    ):
        gguf_vocabulary.vocabulary_of(odd)


def test_a_tokenizer_json_that_does_more_than_sentencepiece_is_refused(tmp_path):
    it = trained_sentencepiece()
    it.save_huggingface(tmp_path)

    def metaspace(**fields):
        return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", **fields}

    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                 "invert": False}  # fmt: skip
    swap = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    for change, said in [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase cannot be written for other"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "words by Digits"),
        ({"pre_tokenizer": metaspace(split=True)}, "words by Metaspace"),
        ({"pre_tokenizer": at_spaces}, "words by Split"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"pre_tokenizer": metaspace(split=False)}, None),
        ({"pre_tokenizer": at_spaces, "normalizer": swap}, None),  # as Gemma has it
    ]:
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        change = {**change, "model": {**content["model"], **change.get("model", {})}}
        described = {**content, **change}
        if said is None:
            found = gguf_vocabulary._of_fallback(described, it.vocab_size)
            assert not found.space_prefix
            continue
        with pytest.raises(ConfigError, match=said) as error:
            gguf_vocabulary._of_fallback(described, it.vocab_size)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("as_json", [False, True])
def test_user_defined_pieces_are_those_of_the_raw_text(tmp_path, as_json):
    for prefix in (False, True):
        folder = tmp_path / str(prefix)
        folder.mkdir()
        model = train_like_llama(user_defined_symbols=["▁▁", "<x>"], add_dummy_prefix=prefix)
        (folder / "own.model").write_bytes(model)
        it = sentencepiece.make(sentencepiece.Config(path=str(folder / "own.model")))
        if as_json:
            it.save_huggingface(folder)
            it = huggingface.make(huggingface.Config(path=str(folder)))
        if prefix:
            with pytest.raises(ConfigError, match="user-defined pieces and puts a space before"):
                gguf_vocabulary.vocabulary_of(it)
            continue
        found = gguf_vocabulary.vocabulary_of(it)
        own = [t for t, kind in zip(found.tokens, found.types, strict=True) if kind == 4]
        assert own == ["  ", "<x>"]
        assert "▁t" in found.tokens


def byte_level(**fields):
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, **fields}


def split(**fields):
    pattern = {"Regex": tiktoken.ENCODINGS["cl100k_base"].huggingface_pattern}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **fields}


@pytest.mark.parametrize(
    ("steps", "has_merges", "name"),
    [
        ([split(), byte_level()], True, "dbrx"),
        ([byte_level(use_regex=True)], True, "gpt-2"),
        ([byte_level()], False, "gpt-2"),
        ([byte_level()], True, None),
        ([split()], True, None),
        ([split()], False, None),
        ([], False, None),
        ([], True, None),
        ([split(), byte_level(add_prefix_space=True)], True, None),
        ([byte_level(add_prefix_space=True)], False, None),
        ([split(behavior="Removed"), byte_level()], True, None),
        ([split(invert=True), byte_level()], True, None),
        ([byte_level(), split()], True, None),
        ([split(), byte_level(), byte_level()], True, None),
    ],
)
def test_words_are_cut_as_llama_cpp_does_or_refused(steps, has_merges, name):
    description = {"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if name is not None:
        assert gguf_vocabulary._pattern(description, has_merges=has_merges) == name
        return
    with pytest.raises(ConfigError, match="word patterns have none like this"):
        gguf_vocabulary._pattern(description, has_merges=has_merges)


def test_rows_without_a_token_are_told(tmp_path):
    it = made("llama")  # 264 rows, 259 tokens
    found = gguf_vocabulary.vocabulary_of(it.tokenizer).padded(264)
    assert found.tokens[-1] == "[PAD263]"
    assert found.types[-1] == gguf_package.TokenType.UNUSED
    assert found.types[256] == gguf_package.TokenType.CONTROL
    assert found.pre == "gpt-2"


# llama.cpp itself ------------------------------------------------------------------------------


def llama_cpp_python() -> str | None:
    """The interpreter that has llama_cpp: $LLAMA_CPP_PYTHON, or this one."""
    chosen = os.environ.get("LLAMA_CPP_PYTHON")
    if chosen:
        return chosen
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


needs_llama_cpp = pytest.mark.skipif(
    llama_cpp_python() is None,
    reason="llama.cpp is not here: pip install llama-cpp-python, or set LLAMA_CPP_PYTHON",
)


def ask(folder, **questions):
    """Answers of llama.cpp; see ask_llama_cpp.py."""
    script = Path(__file__).with_name("ask_llama_cpp.py")
    questions = {"length": 128, "texts": [], "rows": [], "prompts": [], "count": 0, **questions}
    result = subprocess.run(
        [llama_cpp_python(), script, folder / gguf.FILE],
        input=json.dumps(questions), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_we_do(tmp_path, case):
    it, folder = export(case, tmp_path / "out", stddev=0.15)
    rows = np.random.default_rng(3).integers(0, 259, (2, 100)).astype(np.int32)
    answers = ask(folder, rows=rows.tolist(), prompts=rows[:, :9].tolist(), count=12)
    forward = forward_of(it.model)
    # Its GELU is a table of float16.
    tolerance = 2e-2 if it.run.model.experts is None and it.run.model.activation != "silu" else 1e-3
    for row, theirs in zip(rows, answers["logits"], strict=True):
        ours = forward({"tokens": row[None]})["logits"][0]
        np.testing.assert_allclose(theirs, ours, atol=tolerance * np.abs(ours).max())
        assert np.std(ours) > 0.01
    for row, theirs in zip(rows, answers["greedy"], strict=True):
        assert theirs == greedy(forward, row[:9].tolist(), 12)
    window = it.run.model.attention_window
    assert answers["context_length"] == (window if case == "mistral" else SIZES["max_length"])


def greedy(forward, ids, count):
    """At one length, so that there is one program; what follows a token does not count."""
    row = np.zeros((1, 100), np.int32)
    row[0, : len(ids)] = ids
    for place in range(len(ids), len(ids) + count):
        row[0, place] = forward({"tokens": row})["logits"][0, place - 1].argmax()
    return row[0, len(ids) : len(ids) + count].tolist()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_reads_fewer_bits(tmp_path, dtype):
    _, folder = export("llama", tmp_path / "out", dtype)
    row = np.arange(40, dtype=np.int32)
    ours = gguf.make(**QUIET).load_back(folder)({"tokens": row[None]})["logits"][0]
    (theirs,) = ask(folder, rows=[row.tolist()])["logits"]
    # It rounds activations to 8 bits where weights have them.
    np.testing.assert_allclose(theirs, ours, atol=0.02 * np.abs(ours).max())


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_tokenizes_as_we_do(tmp_path):
    for name, tokenizer in {**tokenizers(tmp_path), "raw bytes": None}.items():
        config = Config(**SIZES | {"vocab_size": 510})
        it = loaded_of(config, **({} if tokenizer is None else {"tokenizer": tokenizer}))
        folder = tmp_path / "exported" / name
        gguf.make(**QUIET).export(it.model, it.tokenizer, it.run, folder)
        rows = [it.tokenizer.encode(text) for text in TEXTS if text]
        answers = ask(folder, texts=TEXTS, rows=rows)
        assert answers["tokens"] == [it.tokenizer.encode(text) for text in TEXTS], name
        assert answers["with_bos"] == [it.tokenizer.bos_id], name
