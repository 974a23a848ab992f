"""Every tokenizer gives back every text, never yields a special token, and equals its export."""

import itertools
import pickle
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import (
    AWKWARD,
    KINDS,
    TEXTS,
    make_tokenizers,
    small_sentencepiece,
    stdlib_texts,
    train_like_llama,
)

from llm_jax.core.config import ConfigError, parse_component
from llm_jax.data import tokenizers
from llm_jax.data.tokenizers import sentencepiece, tiktoken
from llm_jax.data.tokenizers.sentencepiece_proto import PieceType, read_model, with_control_pieces
from llm_jax.data.tokenizers.training_sample import sample_chunks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_and_has_no_special_token(made, kind):
    tokenizer = made[kind]

    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens)
        whole = tokenizer.decode_bytes(ids)
        assert whole.removeprefix(tokenizer._prefix) == text.encode()
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == whole
        special = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]
        assert tokenizer.decode(special) == text

    for text in AWKWARD:
        check(text)
    settings(max_examples=120, deadline=None, derandomize=True)(given(TEXTS)(check))()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single(made, kind):
    tokenizer = made[kind]
    texts = (*AWKWARD, *stdlib_texts(2))
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_named(made, kind):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character"):
        made[kind].encode("ab\ud800")
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character"):
        made[kind].encode_batch(["fine", "ab\ud800▁"])


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_pickle(made, kind, tmp_path):
    tokenizer = made[kind]
    tokenizer.save(tmp_path)
    for again in (tokenizers.load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)
        assert again.encode_batch(AWKWARD) == tokenizer.encode_batch(AWKWARD)
        assert (again.vocab_size, again.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)


def test_fingerprints_differ(made):
    assert len({tokenizers.fingerprint(made[kind]) for kind in KINDS}) == len(KINDS)


def test_a_changed_model_is_refused(made, tmp_path):
    made["bpe"].save(tmp_path)
    made["unigram"].save(tmp_path / "other")
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "other/tokenizer.model").read_bytes())
    with pytest.raises(ConfigError, match="is not the model that tokenizer_meta"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_are_refused(made, kind):
    for wrong in (-1, made[kind].vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside 0.."):
            made[kind].decode([5, wrong])


def test_pieces_for_people(made):
    tokenizer = made["bpe"]
    shown = {tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)}
    assert {"<s>", "<0xE4>", "\\n", "self"} <= shown
    assert not any("\n" in piece or "▁" in piece for piece in shown)
    raw = made["raw_bytes"]
    assert [raw.id_to_piece(i) for i in (0xE4, 10, 65, 92, 256)] == [
        "<0xE4>",
        "\\n",
        "A",
        "\\\\",
        "<s>",
    ]


def test_half_a_character_can_be_held_back(made):
    for kind in KINDS:
        ids = made[kind].encode("😀")
        assert made[kind].decode_bytes(ids[:-1]) in made[kind].decode_bytes(ids)
    assert made["raw_bytes"].decode(made["raw_bytes"].encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(made, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = made[kind]
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for role in ("bos", "eos", "pad"):
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")

    def check(text):
        if kind in ("hf_llama", "hf_metaspace") and ("▁" in text or text.startswith(" ")):
            return  # the given tokenizer.json itself loses these
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs(text).input_ids == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids, skip_special_tokens=True) == text

    for text in [*AWKWARD, *stdlib_texts(3)]:
        check(text)
    settings(max_examples=100, deadline=None, derandomize=True)(given(TEXTS)(check))()


def test_training_is_deterministic_whatever_the_threads():
    for model_type in ("bpe", "unigram"):
        models = {
            small_sentencepiece(
                model_type=model_type, num_threads=threads, training_bytes=50_000
            ).model_bytes()
            for threads in (1, 2, None)
        }
        assert len(models) == 1


def test_pieces_know_lines_and_indentation():
    tokenizer = small_sentencepiece(vocab_size=2048, training_bytes=1_000_000)
    pieces = {tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)}
    assert {"        ", "self."} <= pieces
    assert any("\\n    " in piece for piece in pieces)
    unseen = Path(sysconfig.get_paths()["stdlib"], "textwrap.py").read_text()
    assert len(unseen.encode()) / len(tokenizer.encode(unseen)) > 2.8


def test_the_progress_is_told():
    lines = []
    config = sentencepiece.Config(vocab_size=400, training_bytes=20_000)
    tokenizers.make_tokenizer(config, lambda: stdlib_texts(3), lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("training sentencepiece bpe on 0.0")


def test_the_sample_is_bounded_even_and_stops_reading():
    texts = [f"{i:05d}\n" + "x" * 2000 for i in range(1000)]
    chunks = sample_chunks(texts, max_bytes=100_000, scan_bytes=10**9)
    assert 50_000 <= sum(map(len, chunks)) <= 100_000
    numbers = [int(chunk[:5]) for chunk in chunks]
    assert {b - a for a, b in itertools.pairwise(numbers)} == {numbers[1] - numbers[0]}
    assert numbers[0] < 40
    assert numbers[-1] > 960
    assert sample_chunks(texts, max_bytes=100_000, scan_bytes=10**9) == chunks
    seen = []
    sample_chunks((seen.append(text) or text for text in texts), max_bytes=9000, scan_bytes=50_000)
    assert len(seen) < 30


@given(st.lists(st.text(max_size=30)))
@example(["a▁b\n" * 3000, "\n" * 9000])
@settings(max_examples=40, deadline=None)
def test_a_sample_of_everything_is_everything(texts):
    chunks = sample_chunks(texts, max_bytes=10**9, scan_bytes=10**9)
    assert b"".join(chunks).decode() == "".join(texts).replace("▁", "")


def test_wrong_configs_give_one_line(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "bad.tiktoken").write_text("nonsense\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "cut.model").write_bytes(train_like_llama()[:5000])
    cases = [
        ({"name": "sentencepeace"}, "did you mean 'sentencepiece'"),
        ({"name": "sentencepiece", "vocab_size": 100}, "vocab_size = 100: must exceed 260"),
        ({"name": "sentencepiece", "model_type": "bpee"}, "did you mean 'bpe'"),
        ({"name": "sentencepiece", "path": "nowhere.model"}, "no SentencePiece model at nowhere"),
        ({"name": "sentencepiece", "path": f"{tmp_path}/bad.model"}, "not a SentencePiece model"),
        ({"name": "sentencepiece", "path": f"{tmp_path}/cut.model"}, "not a SentencePiece model"),
        ({"name": "tiktoken", "encoding": "cl100k_bass"}, "did you mean 'cl100k_base'"),
        ({"name": "tiktoken", "encoding": f"{tmp_path}/bad.tiktoken"}, "line 1 is not"),
        ({"name": "huggingface"}, "huggingface needs path"),
        ({"name": "huggingface", "path": "nowhere"}, "no tokenizer.json at nowhere"),
        ({"name": "huggingface", "path": str(tmp_path)}, "is no tokenizer.json"),
        ({"name": "raw_bytes", "vocab_size": 300}, "raw_bytes has 259"),
    ]
    for section, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            tokenizers.make_tokenizer(
                parse_component("data.tokenizers", section, "tokenizer"), list
            )
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no text to train"):
        tokenizers.make_tokenizer(sentencepiece.Config(), list)
    with pytest.raises(ConfigError, match="cannot train 262 pieces"):
        small_sentencepiece(vocab_size=262)
    with pytest.raises(ConfigError, match="no tokenizer in"):
        tokenizers.load_tokenizer(tmp_path / "none")


def test_no_network_for_a_known_encoding(made, tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(ConfigError, match=r"download https://.*cl100k_base.tiktoken"):
        tiktoken.make(tiktoken.Config())
    (tmp_path / "cl100k_base.tiktoken").write_bytes(made["tiktoken"].model_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert tiktoken.make(tiktoken.Config()).eos_id == 100257


@pytest.mark.parametrize("pattern_of", list(tiktoken.ENCODINGS))
def test_word_patterns_agree_with_transformers(made, pattern_of, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tiktoken.TiktokenTokenizer(made["tiktoken"].model_bytes(), pattern_of, 1000)
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*AWKWARD, *stdlib_texts(2)]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_lossy_models_need_consent(tmp_path):
    model = train_like_llama()
    (tmp_path / "llama.model").write_bytes(model + bytes([3 << 3 | 2, 2, 4 << 3, 1]))
    path = str(tmp_path / "llama.model")
    assert read_model(Path(path).read_bytes()).remove_extra_whitespaces
    with pytest.raises(ConfigError, match="it removes repeated spaces; lossless=False"):
        sentencepiece.make(sentencepiece.Config(path=path))
    tokenizer = sentencepiece.make(sentencepiece.Config(path=path, lossless=False))
    assert tokenizer.decode(tokenizer.encode("def  f")) == "def f"


# Where such pieces may overlap, SentencePiece's unigram takes the last, Hugging Face the first.
@pytest.mark.parametrize(("kind", "own"), [("bpe", ["▁▁▁"]), ("unigram", [])])
def test_pieces_of_ones_own_keep_their_ids_in_hugging_face(kind, own, tmp_path):
    transformers = pytest.importorskip("transformers")
    symbols = [*own, "<x>", "▁def", "ab\n", "  "]
    options = {"model_type": kind, "user_defined_symbols": symbols, "add_dummy_prefix": False}
    (tmp_path / "own.model").write_bytes(train_like_llama(**options))
    tokenizer = sentencepiece.make(sentencepiece.Config(path=str(tmp_path / "own.model")))
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a   b    def f<x>\n\n      x", "  two", "cab\nab \n", "<x><x> def   def"]
    for text in [*AWKWARD, *texts]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_a_piece_that_is_never_found_hides_no_other_in_hugging_face(tmp_path):
    """One with a space: SentencePiece looks for U+2581."""
    transformers = pytest.importorskip("transformers")
    model = train_like_llama(allow_whitespace_only_pieces=True, add_dummy_prefix=False)
    own = with_control_pieces(model, ["  "])[:-1] + bytes([PieceType.USER_DEFINED])
    (tmp_path / "own.model").write_bytes(own)
    tokenizer = sentencepiece.make(sentencepiece.Config(path=str(tmp_path / "own.model")))
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (two,) = tokenizer.encode("  ")
    assert two != tokenizer.vocab_size - 1
    for text in ["a  b", "  ", "x    y"]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
