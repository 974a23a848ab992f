# ruff: noqa
# fmt: off
#: begin
"""Runs the model beside this file, exported as StableHLO.

Needs jax, flatbuffers and safetensors.

#: if encoder and tokenizer
    python run.py "a text"
#: elif encoder
    python run.py 17,4,52
#: elif tokenizer
    python run.py "def main(" --max_tokens 100
#: else
    python run.py 17,4,52 --max_tokens 100
#: end

#: if encoder
One function, serialized by jax.export for given.platforms. B rows and T tokens may be
any numbers; each new combination is compiled when it first comes.

    forward(params, tokens [B, T], token_types [B, T], length [B]) -> outputs

Rows are padded on the right: length counts the real tokens of each. token_types are 0, or 1 in the
second text of a pair. The three are int32. outputs is a dict of float32:
given.outputs.
params are all arrays of model.safetensors by name. manifest.json says all of it for programs.
#: else
Three functions, serialized by jax.export for given.platforms. Sizes may be any numbers:
#: if decoder
B rows, T tokens, C >= T places of the cache; each new combination is compiled when it first comes.

    forward(params, tokens [B, T]) -> logits [B, T, V]
    prefill(params, tokens [B, T], padding [B], cache) -> logits [B, V] of the last token, cache
    decode(params, token [B], padding [B], length, cache) -> logits [B, V], cache

Prompts of different lengths are padded on the left: padding counts those tokens of each row. length
counts the tokens in the cache, padding among them.
#: else
B rows, S tokens that are read, T that are written, C places of the cache; each new combination is
compiled when it first comes.

    forward(params, encoder_tokens [B, S], encoder_length [B], tokens [B, T]) -> logits [B, T, V]
    encode(params, encoder_tokens [B, S], encoder_length [B]) -> memory
    decode(params, token [B], length, encoder_length [B], memory, cache) -> logits [B, V], cache

What is read is padded on the right: encoder_length counts the real tokens of each row. What is
written begins with the token START; length counts the tokens in the cache.
#: end
All of these are int32, logits float32. params are all arrays of model.safetensors by name. A cache is
{"keys": [...], "values": [...]}, for each layer an array [given.cache_letters]. manifest.json says
all of it for programs.
#: end
"""

import argparse
#: if tokenizer and not encoder
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
#: if not encoder
import sys
#: end
#: if byte_level or normalize
import unicodedata
#: end
from pathlib import Path

import jax
#: if not encoder
import jax.numpy as jnp
#: end
import numpy as np
from safetensors.numpy import load_file

#: if not encoder
NUM_LAYERS = given.num_layers
#: end
#: if decoder
MAX_LENGTH = given.max_length  # tokens of prompt and answer together
#: elif encoder
MAX_LENGTH = given.max_length  # tokens
#: else
MAX_LENGTH = given.max_length  # tokens that are read, and tokens that are written
#: end
#: if not encoder
NUM_TOKENS = given.num_tokens  # of the tokenizer; logits behind them mean nothing
#: else
NUM_TOKENS = given.num_tokens  # of the tokenizer
#: end
BOS, EOS = given.bos_id, given.eos_id
#: if encoder_decoder
START = given.pad_id
#: end
HERE = Path(__file__).resolve().parent


#: if tokenizer
#: include tokenizer


#: end
def load(name):
    #: if encoder
    """One of the functions."""
    #: else
    """One of the functions; the cache, its last argument, is used up."""
    #: end
    exported = jax.export.deserialize(bytearray((HERE / f"{name}.stablehlo").read_bytes()))
    #: if decoder
    cache = {"prefill": (3,), "decode": (4,)}.get(name, ())
    return jax.jit(exported.call, donate_argnums=cache)
    #: elif encoder_decoder
    cache = {"decode": (5,)}.get(name, ())
    return jax.jit(exported.call, donate_argnums=cache)
    #: else
    return jax.jit(exported.call)
    #: end


def load_params():
    return jax.device_put(load_file(HERE / "model.safetensors"))


#: if not encoder
def empty_cache(batch_size, room):
    shape = (given.cache_shape)
    zeros = lambda: [jnp.zeros(shape, "given.cache_dtype") for _ in range(NUM_LAYERS)]  # noqa: E731
    return {"keys": zeros(), "values": zeros()}


#: end
#: if decoder
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


#: elif encoder_decoder
def generate(params, prompts, max_tokens, choose):
    """Yields the next token of each row: [B] int32; prompts: lists of ids, of any lengths."""
    encode, decode = load("encode"), load("decode")
    longest = max(map(len, prompts))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.array([prompt + [EOS] * (longest - len(prompt)) for prompt in prompts], np.int32)
    room = min(max_tokens, MAX_LENGTH)
    memory, cache = encode(params, tokens, lengths), empty_cache(len(prompts), room)
    new = np.full(len(prompts), START, np.int32)
    for length in range(room):
        logits, cache = decode(params, new, np.int32(length), lengths, memory, cache)
        new = choose(np.asarray(logits)[:, :NUM_TOKENS])
        yield new


#: end
def main():
    #: if decoder
    parser = argparse.ArgumentParser(description="Goes on with a text.")
    #: elif encoder_decoder
    parser = argparse.ArgumentParser(description="Answers a text.")
    #: else
    parser = argparse.ArgumentParser(description="Reads a text.")
    #: end
    #: if tokenizer
    parser.add_argument("prompt", nargs="?", default="", help="the text")
    #: else
    parser.add_argument("prompt", nargs="?", default="", help="ids of tokens: 17,4,52")
    #: end
    #: if not encoder
    parser.add_argument("--max_tokens", type=int, default=200, help="at most so many new ones")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the best token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    #: end
    options = parser.parse_args()
    #: if not encoder
    if options.max_tokens < 1 or not options.temperature >= 0 or options.seed < 0:
        parser.error("max_tokens >= 1, temperature >= 0 and seed >= 0 are needed")
    random = np.random.default_rng(options.seed)

    def choose(logits):
        if options.temperature > 0:  # Gumbel's noise makes the best one a draw by probability
            logits = logits / options.temperature + random.gumbel(size=logits.shape)
        return np.argmax(logits, axis=-1).astype(np.int32)

    #: end
    #: if tokenizer
    #: if raw_bytes
    tokenizer = Tokenizer({})
    #: else
    tokenizer = Tokenizer(load_file(HERE / "vocabulary.safetensors"))
    #: end
    try:
        ids = tokenizer.encode(options.prompt)
    except UnicodeEncodeError:
        parser.error("the prompt is no Unicode text")
    #: else
    try:
        ids = [int(part) for part in options.prompt.split(",") if part]
    except ValueError:
        parser.error(f"the prompt is not ids of tokens, as 17,4,52: {options.prompt!r}")
    if not all(0 <= token < NUM_TOKENS for token in ids):
        parser.error(f"ids of tokens lie in 0..{NUM_TOKENS - 1}")
    #: end
    #: if decoder
    prompt = [BOS, *ids]
    if len(prompt) >= MAX_LENGTH:
        parser.error(f"the prompt has {len(prompt)} tokens, and the model sees {MAX_LENGTH}")
    #: else
    #: if encoder
    prompt = [BOS, *ids, EOS]
    #: else
    prompt = [*ids, EOS]
    #: end
    if len(prompt) > MAX_LENGTH:
        parser.error(f"the prompt has {len(prompt)} tokens, and the model sees {MAX_LENGTH}")
    #: end
    #: if encoder
    tokens = np.array([prompt], np.int32)
    length = np.array([len(prompt)], np.int32)
    outputs = load("forward")(load_params(), tokens, np.zeros_like(tokens), length)
    for name, output in outputs.items():
        print(f"{name} {output.shape}\n{np.asarray(output[0])}")
    #: else
    #: if tokenizer
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    #: if decoder
    sys.stdout.write(options.prompt)
    #: end
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
    #: end


if __name__ == "__main__":
    main()
