"""The tokenizer that exports carry cuts texts as the libraries do, or is refused."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from tokenizer_kinds import AWKWARD, KINDS, TEXTS, make_tokenizers, stdlib_texts, train_like_llama

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import huggingface, sentencepiece, tiktoken
from llm_jax.export import bundle
from llm_jax.export import vocabulary as vocabularies
from llm_jax.export.standalone import compose
from llm_jax.export.vocabulary import vocabulary


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def plain_tokenizer(tokenizer):
    words = vocabulary(tokenizer)
    imports = "import heapq, itertools, re, unicodedata\nimport numpy as np\n"
    names = {}
    exec(imports + compose("tokenizer", words.given), names)
    return names["Tokenizer"](words.tensors)


def check_encoding(tokenizer, texts=AWKWARD, examples=80):
    plain = plain_tokenizer(tokenizer)
    assert b"".join(plain.pieces) == tokenizer.decode_bytes(range(tokenizer.vocab_size))

    def check(text):
        if all(unicodedata.category(character) != "Cn" for character in text):
            assert plain.encode(text) == tokenizer.encode(text)

    for text in (*texts, *bundle.PROBES):
        check(text)
    settings(max_examples=examples, deadline=None, derandomize=True)(given(TEXTS)(check))()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_ours_are(made, kind):
    check_encoding(made[kind], (*AWKWARD, *stdlib_texts(1)))


@pytest.mark.parametrize("pattern_of", tiktoken.ENCODINGS)
def test_words_of_each_known_encoding(made, tmp_path, pattern_of):
    ranks = tmp_path / "own.tiktoken"
    ranks.write_bytes(made["tiktoken"].model_bytes())
    tokenizer = tiktoken.make(tiktoken.Config(encoding=str(ranks), pattern_of=pattern_of))
    check_encoding(tokenizer, examples=40)
    tokenizer.save_huggingface(tmp_path / "hf")
    check_encoding(huggingface.make(huggingface.Config(path=str(tmp_path / "hf"))), examples=40)


def test_pieces_that_are_found_before_all_others(made, tmp_path):
    symbols = [
        "\n\n",
        "ab",
        "abc",
        "é",
        "  ",
    ]  # the last one is never found: see export/vocabulary.py
    model = train_like_llama(user_defined_symbols=symbols, add_dummy_prefix=False)
    (tmp_path / "own.model").write_bytes(model)
    tokenizer = sentencepiece.make(sentencepiece.Config(path=str(tmp_path / "own.model")))
    check_encoding(tokenizer, ["abcab ab\n\n\nabé  ab", "aabcé", "\n\n\n\n\n"])
    made["hf_byte_level"].save_huggingface(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    new = {"id": made["hf_byte_level"].vocab_size, "content": "<|im_start|>", "special": False,
           "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    content["added_tokens"].append(new)
    content["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(content))
    config = huggingface.Config(path=str(path.parent), lossless=False)
    tokenizer = huggingface.make(config)
    check_encoding(tokenizer, ["<|im_start|>user e\u0301<|im_start|><|im_start", "e\u0301 ﬁ"], 40)


def changed_json(made, kind, folder, change):
    made[kind].save_huggingface(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return huggingface.make(huggingface.Config(path=str(folder), lossless=False))


def test_what_plain_python_cannot_follow_is_refused_in_a_line(made, tmp_path):
    def digits(content):
        steps = content["pre_tokenizer"]["pretokenizers"]
        steps.insert(0, {"type": "Digits", "individual_digits": True})

    changes = {
        ("hf_byte_level", "cuts words by Digits"): digits,
        ("hf_byte_level", "normalizer Lowercase"): lambda c: c.update(normalizer={"type": "Lowercase"}),
        ("hf_byte_level", "cut by"): lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(
            pattern={"Regex": r"(?<=a)b|.+"}
        ),
        ("hf_llama", "byte fallback and ignore_merges"): lambda c: c["model"].update(
            ignore_merges=True
        ),
        ("hf_llama", "no byte fallback"): lambda c: c["model"].update(byte_fallback=False),
        ("hf_llama", "model WordPiece"): lambda c: c.update(
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": False},
            model={"type": "WordPiece", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2},
                   "unk_token": "<unk>", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 9}, normalizer=None,
        ),
    }  # fmt: skip
    for number, ((kind, said), change) in enumerate(changes.items()):
        with pytest.raises(ConfigError, match=said) as error:
            vocabulary(changed_json(made, kind, tmp_path / str(number), change))
        assert "\n" not in str(error.value)
        assert "choices: raw_bytes, tiktoken" in str(error.value)
    with pytest.raises(
        ConfigError, match="tokenizer 'object' cannot be written for other programs"
    ):
        vocabulary(object())


def test_patterns_are_read_or_refused():
    for pattern, wanted in {
        r"\p{L}++| ?[^\s\p{N}]": r"[\p{L}]+| ?[^\s\p{N}]",
        r"\S\s?+(a|b)": r"[^\s][\s]?(?:a|b)",
        r"\s++$": r"[\s]+\Z",
    }.items():
        assert vocabularies._for_re(pattern) == wanted
    for pattern in (r"\d+", r"[\S]", r"(?<!a)b", r"\p{Greek}", "a.b", r"\b"):
        with pytest.raises(ConfigError, match="words are cut by"):
            vocabularies._for_re(pattern)
