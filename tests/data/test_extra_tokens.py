"""Special tokens beyond bos, eos and pad: they have ids, no text is encoded as them, exports know them."""

import json
import pickle

import pytest
from test_tokenizers import AWKWARD, small_sentencepiece, stdlib_texts, train_like_llama

from llm_jax.core.config import ConfigError, parse_component, to_dict
from llm_jax.data import tokenizers
from llm_jax.data.tokenizers import huggingface, raw_bytes, sentencepiece

EXTRA = ("[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_1>", "<|user|>", "<|中文|>")
KINDS = ["bpe", "unigram", "given_bpe", "raw_bytes"]
PLAIN = [*AWKWARD, " a [MASK] b<extra_id_0><|user|>", "".join(EXTRA), "[MASK] " * 50, "<|中文|>é"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama.model"
    path.write_bytes(train_like_llama())
    options = {"training_bytes": 60_000, "vocab_size": 600, "extra_tokens": EXTRA}
    return {
        "bpe": small_sentencepiece(**options),
        "unigram": small_sentencepiece(model_type="unigram", **options),
        "given_bpe": sentencepiece.make(
            sentencepiece.Config(path=str(path), extra_tokens=EXTRA, vocab_size=600)
        ),
        "raw_bytes": raw_bytes.make(raw_bytes.Config(extra_tokens=EXTRA)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_they_come_after_all_other_ids_and_from_no_text(made, kind):
    tokenizer = made[kind]
    size = {"bpe": 600, "unigram": 600, "given_bpe": 507, "raw_bytes": 266}[kind]
    assert tokenizer.vocab_size == size
    ids = [tokenizer.token_id(token) for token in EXTRA]
    assert ids == list(range(size - len(EXTRA), size))
    assert [tokenizer.id_to_piece(i) for i in ids] == list(EXTRA)
    assert tokenizer.token_id("</s>") == tokenizer.eos_id
    assert tokenizer.token_id("e") is tokenizer.token_id("[mask]") is None
    for text, encoded in zip(PLAIN, tokenizer.encode_batch(PLAIN), strict=True):
        assert not set(encoded) & set(tokenizer.special_tokens)
        assert encoded == tokenizer.encode(text)
        assert tokenizer.decode([*ids, *encoded, *ids]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_they_survive_saving(made, kind, tmp_path):
    tokenizer = made[kind]
    tokenizer.save(tmp_path)
    for again in (tokenizers.load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)
        assert again.token_id("[MASK]") == tokenizer.token_id("[MASK]")
        assert again.encode_batch(PLAIN) == tokenizer.encode_batch(PLAIN)


def test_without_them_nothing_changes(made):
    plain = raw_bytes.make(raw_bytes.Config())
    assert plain.settings() == {}  # as it was saved before there were extra tokens
    assert tokenizers.fingerprint(plain) != tokenizers.fingerprint(made["raw_bytes"])
    assert plain.token_id("[MASK]") is None
    assert to_dict(raw_bytes.Config())["vocab_size"] == 259


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_knows_them(made, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = made[kind]
    tokenizer.save_huggingface(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer.token_id(token) for token in EXTRA]
    assert theirs.convert_tokens_to_ids(list(EXTRA)) == ids
    assert theirs.convert_ids_to_tokens(ids) == list(EXTRA)
    assert len(theirs) == tokenizer.vocab_size
    assert set(ids) <= set(theirs.all_special_ids)
    assert (theirs.mask_token, theirs.cls_token, theirs.sep_token) == ("[MASK]", "[CLS]", "[SEP]")
    for text in [*PLAIN, *stdlib_texts(1)]:
        encoded = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == encoded
        assert theirs.decode([ids[0], *encoded, *ids], skip_special_tokens=True) == text
    parsed = theirs("a[MASK]", add_special_tokens=False, split_special_tokens=False).input_ids
    assert parsed == [*tokenizer.encode("a"), ids[2]]


def test_no_piece_is_learnt_from_them():
    texts = ["x [MASK] y <extra_id_0>\n" * 400]
    config = sentencepiece.Config(vocab_size=320, extra_tokens=("[MASK]", "<extra_id_0>"))
    tokenizer = tokenizers.make_tokenizer(config, lambda: texts)
    assert not any("MASK" in tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size - 2))
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_what_cannot_be_one(tmp_path):
    (tmp_path / "llama.model").write_bytes(train_like_llama())
    path = str(tmp_path / "llama.model")
    cases = [
        ({"name": "raw_bytes", "extra_tokens": ("<s>",)}, "'<s>' is in the vocabulary already"),
        ({"name": "raw_bytes", "extra_tokens": ("a b",)}, "'a b': expected printable"),
        ({"name": "raw_bytes", "extra_tokens": ("",)}, "'': expected printable"),
        (
            {"name": "raw_bytes", "extra_tokens": ("x",), "vocab_size": 259},
            r"raw_bytes has 260 \(256, bos, eos, pad and 1 extra tokens\)",
        ),
        ({"name": "sentencepiece", "extra_tokens": ("x", "x")}, "'x' is in the vocabulary"),
        ({"name": "sentencepiece", "extra_tokens": ("<0x41>",)}, "'<0x41>' is in the vocabulary"),
        ({"name": "sentencepiece", "extra_tokens": ("x",), "vocab_size": 261}, "must exceed 261"),
        ({"name": "sentencepiece", "extra_tokens": ("e",), "path": path}, "llama.model: extra_tok"),
        ({"name": "tiktoken", "extra_tokens": ("x",)}, "extra_tokens: unknown key"),
        ({"name": "huggingface", "extra_tokens": ("x",)}, "extra_tokens: unknown key"),
    ]
    for section, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            tokenizers.make_tokenizer(
                parse_component("data.tokenizers", section, "tokenizer"), list
            )
        assert "\n" not in str(caught.value)


def write_wordpiece(folder, **roles):
    """A small BERT tokenizer, cut off and padded at 128 tokens as the real ones are."""
    library = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "cat", "sat", "##s", "mat", "##ch", ",", "["]
    words += [f"{mark}{c}" for c in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocab = {text: i for i, text in enumerate([*special, *words])}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "mask", "pad", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | roles))
    return str(folder)


def test_wordpiece_of_bert(tmp_path):
    path = write_wordpiece(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"cannot give back every text.*lossless=False"):
        huggingface.make(huggingface.Config(path=path))
    tokenizer = huggingface.make(huggingface.Config(path=path, lossless=False))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 0)
    assert [tokenizer.token_id(t) for t in ("[CLS]", "[SEP]", "[MASK]", "the")] == [2, 3, 4, None]
    ids = tokenizer.encode("The cats sat, matching [MASK]")
    assert not set(ids) & {0, 2, 3, 4}
    assert tokenizer.decode([2, *tokenizer.encode("The cats sat"), 3, 0]) == "the cats sat"
    assert len(tokenizer.encode("cat " * 200)) == 200
    tokenizer.save(tmp_path / "saved")
    again = tokenizers.load_tokenizer(tmp_path / "saved")
    assert again.token_id("[MASK]") == 4
    transformers = pytest.importorskip("transformers")
    again.save_huggingface(tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.encode("The cats sat") == [2, *tokenizer.encode("The cats sat"), 3]
    assert (theirs.mask_token, theirs.cls_token, theirs.sep_token) == ("[MASK]", "[CLS]", "[SEP]")


def test_a_bos_that_is_named_goes_before_cls(tmp_path):
    path = write_wordpiece(tmp_path / "named", bos_token="[UNK]", eos_token="[SEP]")
    tokenizer = huggingface.make(huggingface.Config(path=path, lossless=False))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 3)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_stays_with_the_tokenizer(tmp_path, place):
    source, copy, exported = (tmp_path / name for name in ("source", "copy", "exported"))
    raw_bytes.make(raw_bytes.Config()).save_huggingface(source)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if place == "chat_template.jinja":
        (source / place).write_text(template)
    else:
        written = json.loads((source / place).read_text())
        (source / place).write_text(json.dumps(written | {"chat_template": template}))
    tokenizer = huggingface.make(huggingface.Config(path=str(source)))
    assert tokenizer.chat_template == template
    copy.mkdir()
    tokenizer.save(copy)
    assert tokenizers.load_tokenizer(copy).chat_template == template
    tokenizer.save_huggingface(exported)
    assert huggingface.make(huggingface.Config(path=str(exported))).chat_template == template
