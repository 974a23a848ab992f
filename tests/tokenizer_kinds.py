"""One small tokenizer of each kind, and texts that they disagree on, if on any."""

import base64
import collections
import io
import itertools
import json
import sysconfig
from pathlib import Path

from hypothesis import strategies as st

from llm_jax.data import tokenizers
from llm_jax.data.tokenizers import huggingface, raw_bytes, sentencepiece, tiktoken

KINDS = [
    "bpe",
    "unigram",
    "dummy_prefix",
    "raw_bytes",
    "tiktoken",
    "hf_byte_level",
    "hf_llama",
    "hf_metaspace",
]

AWKWARD = [
    "",
    " ",
    "  a   b ",
    "\x00",
    "a\x00b",
    "\r\n\r\n",
    "\t\tx\n\n    y\n        z",
    "▁",
    " ▁x▁ ▁▁y ▁",
    "<s>",
    "</s><unk><pad> <|endoftext|>",
    "<0x41><0xE4>",
    "\ufeffx",
    "e\u0301 \u1100\u1161 ﬁ Ａ",
    "中文字符 测试，标点。",
    "😀👨‍👩‍👧 \U0010ffff",
    "\u2585 \u2047 ⁇ \u00a0\u2028",
    "def __init__(self, x):\n        return self.x  # ok\n",
    "'ll 1234567 don't \n \n  \n",
]
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [" ", "    ", "\n", "\r\n", "\t", "▁", "self.", "=", "<s>", "é", "中", "1", "..."]
    )
).map("".join)


def stdlib_texts(count: int) -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-h]*.py"))[:count]]


def small_sentencepiece(**options):
    config = sentencepiece.Config(**{"vocab_size": 700, "training_bytes": 150_000, **options})
    return tokenizers.make_tokenizer(config, lambda: stdlib_texts(12))


def write_ranks(path: Path, text: str, num_merges: int) -> None:
    """Byte-level BPE in its textbook form, over words."""
    words = collections.Counter(tuple(bytes([b]) for b in (" " + w).encode()) for w in text.split())
    pieces = [bytes([b]) for b in range(256)]
    for _ in range(num_merges):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = collections.Counter()
        for word, count in words.items():
            joined = []
            for piece in word:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            merged[tuple(joined)] += count
        words = merged
        pieces.append(b"".join(best))
    lines = [
        f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(dict.fromkeys(pieces))
    ]
    path.write_text("\n".join(lines) + "\n")


def train_like_llama(**options) -> bytes:
    """A `.model` with a dummy prefix, as Llama 2 has."""
    import sentencepiece as library

    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in stdlib_texts(4) for line in text.splitlines()),
        model_writer=model,
        vocab_size=500,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **{"model_type": "bpe", **options},
    )
    return model.getvalue()


def llama_tokenizer_json(directory: Path, tokenizer) -> None:
    """The classic layout: U+2581 by a normalizer, swapped back and stripped by the decoder."""
    tokenizer.save_huggingface(directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    model["vocab"] = {text.replace(" ", "▁"): i for text, i in model["vocab"].items()}
    model["merges"] = [[part.replace(" ", "▁") for part in pair] for pair in model["merges"]]
    swap = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    swap_back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    prepend = {"type": "Prepend", "prepend": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, swap]}
    content["decoder"]["decoders"].insert(0, swap_back)
    path.write_text(json.dumps(content))


def metaspace_tokenizer_json(directory: Path, tokenizer) -> None:
    """The newer layout of the same: a pre-tokenizer instead of the normalizer."""
    llama_tokenizer_json(directory, tokenizer)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    path.write_text(json.dumps(content))


def make_tokenizers(folder: Path) -> dict:
    """By the names in KINDS."""
    (folder / "llama.model").write_bytes(train_like_llama())
    write_ranks(folder / "own.tiktoken", " ".join(stdlib_texts(1))[:20_000], 150)
    result = {
        "bpe": small_sentencepiece(),
        "unigram": small_sentencepiece(model_type="unigram", training_bytes=60_000),
        "dummy_prefix": sentencepiece.make(sentencepiece.Config(path=str(folder / "llama.model"))),
        "raw_bytes": raw_bytes.make(raw_bytes.Config()),
        "tiktoken": tiktoken.make(tiktoken.Config(encoding=str(folder / "own.tiktoken"))),
    }
    result["tiktoken"].save_huggingface(folder / "byte_level")
    llama_tokenizer_json(folder / "llama", result["dummy_prefix"])
    metaspace_tokenizer_json(folder / "metaspace", result["dummy_prefix"])
    for name in ("byte_level", "llama", "metaspace"):
        config = huggingface.Config(path=str(folder / name))
        result[f"hf_{name}"] = huggingface.make(config)
    return result
