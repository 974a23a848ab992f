"""Batches of records, and a few steps of training on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.types import Head, ModelOutput
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.models import bert
from llm_jax.nn.precision import Precision
from llm_jax.transforms import reference

CHAT_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def bytes_tokenizer(*extra):
    return raw_bytes.make(raw_bytes.Config(extra_tokens=extra))


def batch_of(objective, records, tokenizer, length, *, first_id=0, names=None):
    """What the objective's transforms make of records; names None: the loader has none."""
    ids = np.arange(first_id, first_id + len(records), dtype=np.int64)
    element = {"examples": records, "row_ids": ids}
    if names is not None:
        element["names"] = names
    for transform in objective.transforms(tokenizer, length):
        element = transform.map(element)
    return element


def assert_is_of_spec(batch, objective, batch_size, length):
    spec = objective.batch_spec(batch_size, length)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (s.shape, s.dtype) for n, s in spec.items()
    }


def text_of(tokenizer, ids):
    """As text, special tokens included."""
    return "".join(tokenizer.id_to_piece(int(i)) for i in ids)


class Lookup(nnx.Module):
    """Next-token logits from the token alone: nothing that takes long to compile."""

    precision = Precision.on("cpu", "float32")

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        draw = lambda: jnp.asarray(rng.normal(size=(272, 8)), jnp.float32)  # noqa: E731
        self.embed = nnx.Param(draw(), axes=("vocab", "embed"))
        self.head = nnx.Param(draw(), axes=("vocab", "embed"))

    def __call__(self, batch, *, train=False, key=None):
        hidden = self.embed[...][batch["tokens"]]
        head = Head(self.head[...], "btd,vd->btv")
        return ModelOutput(hidden @ head.weights.T, hidden, head)


class FakeEncoder:
    """logits: of what stands at each place; class_logits: of all that is no padding. Either may be None."""

    precision = Precision.on("cpu", "float32")

    def __init__(self, num_token_classes=None, num_classes=None):
        rng = np.random.default_rng(0)
        self.tables = {
            name: None if size is None else jnp.asarray(rng.normal(size=(272, size)), jnp.float32)
            for name, size in (("logits", num_token_classes), ("class_logits", num_classes))
        }

    def __call__(self, batch, *, train=False, key=None):
        each = {n: None if t is None else t[batch["tokens"]] for n, t in self.tables.items()}
        if each["class_logits"] is not None:
            real = (batch["segment_ids"] > 0)[..., None]
            each["class_logits"] = jnp.sum(each["class_logits"] * real, axis=1)
        return ModelOutput(**each)


def tiny_bert(head, num_labels=None, seed=0, length=64):
    config = bert.Config(
        vocab_size=272, embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, num_positions=length,
        head=head, num_labels=num_labels,
    )  # fmt: skip
    return made(bert, config, seed)


def made(family, config, seed=0):
    """With parameters from numpy: to compile an initialization takes longer than all else here."""
    make = lambda: family.make(  # noqa: E731
        config, precision=Precision.on("cpu", "float32"), rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        is_scale = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(is_scale + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))


def sums(model, objective, batch, train=False):
    """LossOutput of a batch, under jit."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state, batch):
        return objective.loss(nnx.merge(graphdef, state), batch, key=None, train=train)

    return loss(state, batch)


def descend(model, objective, batch, steps=5, rate=0.3):
    """The loss before each of some steps of plain gradient descent on one batch."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, batch):
        def mean(params):
            model = nnx.merge(graphdef, params, rest)
            loss = objective.loss(model, batch, key=jax.random.key(0), train=True).loss
            return loss.sum / jnp.maximum(loss.weight, 1.0)

        loss, gradient = jax.value_and_grad(mean)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), loss

    losses = []
    for _ in range(steps):
        params, loss = step(params, batch)
        losses.append(float(loss))
    return losses


def log_softmax(logits, axis=-1):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis, keepdims=True))


@functools.cache
def pieces_tokenizer():
    """SentencePiece, whose pieces hold several characters, some of them a space."""
    from llm_jax.data.tokenizers import make_tokenizer, sentencepiece

    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "café",
        "rain",
        "fell",
        "over",
        "Paris",
        "in",
        "France",
        "and",
        "Köln",
        "1889",
    ]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12)) + "." for _ in range(300)]
    config = sentencepiece.Config(vocab_size=400, extra_tokens=CHAT_MARKS)
    return make_tokenizer(config, lambda: texts)


@functools.cache
def word_piece_tokenizer():
    """BERT's kind: lower case, no accents, no spaces; a word that it cannot spell is [UNK]."""
    import json

    from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "eiffel",
        "tower",
        "is",
        "in",
        "paris",
        "cafe",
    ]
    pieces += [
        *"abcdefghijklmnopqrstuvwxyz0123456789(),.-?",
        *(f"##{c}" for c in "abcdefginorstuy189"),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i in range(4)
    ]  # fmt: skip
    model = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    }  # fmt: skip
    roles = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    return HuggingFaceTokenizer(json.dumps(model).encode(), roles)


def kept(model):
    """The model with the first value of every parameter, in place."""
    return reference.apply(model, nnx.Rngs(0), config=reference.Config())
