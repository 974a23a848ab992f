# ruff: noqa
# fmt: off
#: begin
"""Runs the language model beside this file, exported as StableHLO.

Needs jax, flatbuffers and safetensors.

#: if tokenizer
    python run.py "def main(" --max_tokens 100
#: else
    python run.py 17,4,52 --max_tokens 100
#: end

Three functions, serialized by jax.export for given.platforms. B rows, T tokens and C >= T
places of the cache may be any numbers; each new combination is compiled when it first comes.

    forward(params, tokens [B, T]) -> logits [B, T, V]
    prefill(params, tokens [B, T], padding [B], cache) -> logits [B, V] of the last token, cache
    decode(params, tokens [B], padding [B], length, cache) -> logits [B, V], cache

tokens, padding and length are int32, logits float32. params are all arrays of model.safetensors by
name. The cache is {"keys": [...], "values": [...]}, an array [B, K, C, H] for each layer. Prompts of
different lengths are padded on the left: padding counts those tokens of each row. length counts the
tokens in the cache, padding among them. manifest.json says all of it for programs.
"""

import argparse
#: if tokenizer
import codecs
#: end
#: if bpe
import heapq
#: end
#: if byte_level
import itertools
#: end
#: if byte_level or user_defined
import re
#: end
import sys
#: if byte_level or normalize
import unicodedata
#: end
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = given.num_layers, given.num_kv_heads, given.head_dim
MAX_LENGTH = given.max_length  # tokens of prompt and answer together
NUM_TOKENS = given.num_tokens  # of the tokenizer; logits behind them mean nothing
BOS, EOS = given.bos_id, given.eos_id
HERE = Path(__file__).resolve().parent


#: if tokenizer
#: include tokenizer


#: end
def load(name):
    """One of the functions; the last argument of prefill and decode, the cache, is used up."""
    exported = jax.export.deserialize(bytearray((HERE / f"{name}.stablehlo").read_bytes()))
    cache = {"prefill": (3,), "decode": (4,)}.get(name, ())
    return jax.jit(exported.call, donate_argnums=cache)


def load_params():
    return jax.device_put(load_file(HERE / "model.safetensors"))


def empty_cache(batch_size, room):
    shape = (batch_size, NUM_KV_HEADS, room, HEAD_DIM)
    zeros = lambda: [jnp.zeros(shape, "given.cache_dtype") for _ in range(NUM_LAYERS)]  # noqa: E731
    return {"keys": zeros(), "values": zeros()}


def generate(params, prompts, max_tokens, choose):
    """Yields the next token of each row: [B] int32; prompts: lists of ids, of any lengths."""
    prefill, decode = load("prefill"), load("decode")
    longest = max(map(len, prompts))
    padding = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    tokens = np.array([[EOS] * (longest - len(prompt)) + prompt for prompt in prompts], np.int32)
    room = min(longest + max_tokens, MAX_LENGTH)
    logits, cache = prefill(params, tokens, padding, empty_cache(len(prompts), room))
    for length in range(longest, room):
        new = choose(np.asarray(logits)[:, :NUM_TOKENS])
        yield new
        if length + 1 < room:
            logits, cache = decode(params, new, padding, np.int32(length), cache)


def main():
    parser = argparse.ArgumentParser(description="Goes on with a text.")
    #: if tokenizer
    parser.add_argument("prompt", nargs="?", default="", help="how the text begins")
    #: else
    parser.add_argument("prompt", nargs="?", default="", help="ids of tokens: 17,4,52")
    #: end
    parser.add_argument("--max_tokens", type=int, default=200, help="at most so many new ones")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the best token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args()
    if options.max_tokens < 1 or not options.temperature >= 0 or options.seed < 0:
        parser.error("max_tokens >= 1, temperature >= 0 and seed >= 0 are needed")
    random = np.random.default_rng(options.seed)

    def choose(logits):
        if options.temperature > 0:  # Gumbel's noise makes the best one a draw by probability
            logits = logits / options.temperature + random.gumbel(size=logits.shape)
        return np.argmax(logits, axis=-1).astype(np.int32)

    #: if tokenizer
    #: if raw_bytes
    tokenizer = Tokenizer({})
    #: else
    tokenizer = Tokenizer(load_file(HERE / "vocabulary.safetensors"))
    #: end
    try:
        prompt = [BOS, *tokenizer.encode(options.prompt)]
    except UnicodeEncodeError:
        parser.error("the prompt is no Unicode text")
    #: else
    try:
        prompt = [BOS, *(int(part) for part in options.prompt.split(",") if part)]
    except ValueError:
        parser.error(f"the prompt is not ids of tokens, as 17,4,52: {options.prompt!r}")
    if not all(0 <= token < NUM_TOKENS for token in prompt):
        parser.error(f"ids of tokens lie in 0..{NUM_TOKENS - 1}")
    #: end
    if len(prompt) >= MAX_LENGTH:
        parser.error(f"the prompt has {len(prompt)} tokens, and the model sees {MAX_LENGTH}")
    #: if tokenizer
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.write(options.prompt)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    #: end
    for (token,) in generate(load_params(), [prompt], options.max_tokens, choose):
        if token == EOS:
            break
        #: if tokenizer
        sys.stdout.write(utf8.decode(tokenizer.pieces[token]))
        #: else
        sys.stdout.write(f"{token} ")
        #: end
        sys.stdout.flush()
    #: if tokenizer
    sys.stdout.write(utf8.decode(b"", final=True) + "\n")
    #: else
    sys.stdout.write("\n")
    #: end


if __name__ == "__main__":
    main()
