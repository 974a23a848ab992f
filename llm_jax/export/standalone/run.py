# ruff: noqa
# fmt: off
#: begin
"""A language model of given.num_parameters parameters in one file, to read and to run.

    python run.py "def main(" --max_tokens 100 --temperature 0.8

Needs Python 3.9 or newer and numpy, and beside it model.safetensors: parameters and vocabulary.

A language model tells for each piece of text ("token") how likely it comes next. It works thus:

1. `Tokenizer` cuts a text into tokens and gives the number of each.
2. Each number picks a row of a table, a vector of EMBED_DIM numbers.
#: if learned
   A vector that stands for its position is added.
#: end
3. NUM_LAYERS layers change these vectors, one after the other (`forward`). In a layer, `attention`
   lets each token gather from those before it, and then each goes by itself through
#: if moe
   a few of many small networks (`experts`).
#: else
   a small network (`mlp`).
#: end
4. The vector of the last token, times a table of all tokens, is the score ("logit") of each to come
   next (`logits`).
5. One is drawn (`draw`) and put behind the text, and it goes on at 2 with this token alone: what later
   tokens need of earlier ones, their keys and values, is kept in a cache (`generate`).

Letters in comments on shapes: T new tokens, S tokens so far, D = EMBED_DIM, N = NUM_HEADS,
#: if grouped
K = NUM_KV_HEADS, G = N / K, H = HEAD_DIM, F the inner width of `mlp`, V = VOCAB_SIZE.
#: else
H = HEAD_DIM, F the inner width of `mlp`, V = VOCAB_SIZE.
#: end

llm_jax composed this file for the one model beside it: what that model does not use is not here.
"""

import argparse
import codecs
#: if bpe
import heapq
#: end
#: if byte_level
import itertools
#: end
import json
#: if gelu or llama3_scaling
import math
#: end
#: if byte_level or user_defined
import re
#: end
import sys
#: if byte_level or normalize
import unicodedata
#: end
from pathlib import Path

import numpy as np

VOCAB_SIZE = given.vocab_size
#: if padded_vocabulary
NUM_TOKENS = given.num_tokens  # the scores behind them mean nothing
#: end
MAX_LENGTH = given.max_length  # tokens of prompt and answer together
NUM_LAYERS = given.num_layers
EMBED_DIM = given.embed_dim
NUM_HEADS = given.num_heads
#: if grouped
NUM_KV_HEADS = given.num_kv_heads  # of keys and values; each serves several heads of queries
#: end
HEAD_DIM = given.head_dim
#: if moe
EXPERTS_PER_TOKEN = given.experts_per_token
#: end
#: if windowed
WINDOW = given.window  # so many positions a token sees, its own included
#: end
#: if windowed and mixed
GLOBAL_EVERY = given.global_every  # every n-th layer sees all
#: end
#: if rotary
ROPE_THETA = given.rope_theta
#: end
#: if local_rope
LOCAL_ROPE_THETA = given.local_rope_theta  # of layers with a window
#: end
NORM_EPSILON = given.norm_epsilon
BOS, EOS = given.bos_id, given.eos_id  # the tokens that begin and end a text


def load(path):
    """Reads a safetensors file: the size of a header in 8 bytes, the header as JSON, the data.

    Gives arrays by name; under "layers" those of each layer.
    """
    data = np.memmap(path, np.uint8, "r")  # read from the file where it is needed
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U8": "u1"}
    params = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        x = np.asarray(data[start + begin : start + end]).view(dtypes[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            x = (x.astype("<u4") << 16).view("<f4")
        elif entry["dtype"] == "F16":
            x = x.astype("<f4")
        params[name] = x.reshape(entry["shape"])
    params["layers"] = [{} for _ in range(NUM_LAYERS)]
    for name in [name for name in params if name.startswith("layers.")]:
        _, layer, name_in_layer = name.split(".", 2)
        params["layers"][int(layer)][name_in_layer] = params.pop(name)
    return params


#: include tokenizer


#: if layernorm
def layer_norm(x, p, name):
    """Moves every vector to mean 0 and scales it to variance 1 (Ba et al. 2016)."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPSILON)
    #: if norm_bias
    return x * p[name + ".scale"] + p[name + ".bias"]
    #: else
    return x * p[name + ".scale"]
    #: end


#: end
#: if rmsnorm
def rms_norm(x, p, name):
    """Scales every vector to a mean square of 1 (Zhang and Sennrich 2019)."""
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPSILON)
    #: if unit_offset
    return x * (1 + p[name + ".scale"])
    #: else
    return x * p[name + ".scale"]
    #: end


#: end
def softmax(scores):
    """Positive numbers that sum to 1, the greater the greater the scores."""
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


#: if rotary
def turn_of(positions, frequencies):
    """Cosine and sine, each [T, H / 2], of the angles by which tokens at these positions are turned."""
    angles = positions[:, None].astype(np.float32) * frequencies.astype(np.float32)
    return np.cos(angles), np.sin(angles)


def rotate(x, turn):
    """Turns pairs of numbers by angles that grow with the position (Su et al. 2021): x [N, T, H].

    So the product of a query and a key tells how far apart they stand. The two of a pair lie half a
    head apart.
    """
    cos, sin = turn
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(theta):
    """Radians per position of each pair, from 1 down to about 1 / theta: [H / 2]."""
    return theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


#: if llama3_scaling
def stretch(frequencies):
    """Slows the low frequencies, so that far positions look as those did in training (Llama 3.1)."""
    turns = given.rope_original_length * frequencies / (2 * math.pi)  # within the first length
    fast = np.clip((turns - given.rope_low) / (given.rope_high - given.rope_low), 0, 1)
    return frequencies * (fast + (1 - fast) / given.rope_factor)


FREQUENCIES = stretch(rope_frequencies(ROPE_THETA))
#: else
#: if linear_scaling
FREQUENCIES = rope_frequencies(ROPE_THETA) / given.rope_factor  # slower, for longer texts
#: else
FREQUENCIES = rope_frequencies(ROPE_THETA)
#: end
#: end
#: if local_rope
LOCAL_FREQUENCIES = rope_frequencies(LOCAL_ROPE_THETA)
#: end


#: end
def heads(x, p, name):
    """Queries, keys or values of x [T, D], for each head its own: [N, T, H]."""
    y = x @ p[f"attention.{name}"]
    #: if attention_bias
    y = y + p[f"attention.{name}_bias"]
    #: end
    #: if qk_norm_over_all
    if name != "value":
        y = rms_norm(y, p, f"attention.{name}_norm")
    #: end
    y = y.reshape(len(x), -1, HEAD_DIM)
    #: if qk_norm_per_head
    if name != "value":
        y = rms_norm(y, p, f"attention.{name}_norm")
    #: end
    return y.swapaxes(0, 1)


def attention(x, p, given_view, cache):
    """Lets each token gather from those before it: [T, D] to [T, D] (Vaswani et al. 2017).

    The better a token's query fits the key of another one, the more of that one's value it gets.
    visible: [T, S], which tokens each one sees; cache: keys and values of this layer.
    """
    query, key, value = (heads(x, p, name) for name in ("query", "key", "value"))
    #: if rotary
    query, key = rotate(query, turn), rotate(key, turn)
    #: end
    num_new, seen = visible.shape
    cache[0, :, seen - num_new : seen], cache[1, :, seen - num_new : seen] = key, value
    #: if grouped
    keys, values = cache[:, :, :seen]  # [K, S, H]
    query = query.reshape(NUM_KV_HEADS, -1, HEAD_DIM)  # [K, G * T, H], by the keys they go with
    #: else
    keys, values = cache[:, :, :seen]  # [N, S, H]
    #: end
    #: if grouped
    scores = given.scale * (query @ keys.swapaxes(1, 2)).reshape(NUM_HEADS, num_new, seen)
    #: else
    scores = given.scale * (query @ keys.swapaxes(1, 2))  # [N, T, S]
    #: end
    #: if soft_cap
    scores = given.soft_cap * np.tanh(scores / given.soft_cap)  # none beyond this
    #: end
    weights = softmax(np.where(visible, scores, -np.inf))
    #: if grouped
    y = (weights.reshape(NUM_KV_HEADS, -1, seen) @ values).reshape(NUM_HEADS, num_new, HEAD_DIM)
    #: else
    y = weights @ values  # [N, T, H]
    #: end
    y = y.swapaxes(0, 1).reshape(num_new, -1)  # the heads of each token side by side
    #: if attention_out_bias
    return y @ p["attention.out"] + p["attention.out_bias"]
    #: else
    return y @ p["attention.out"]
    #: end


#: if gelu
def activation(x):
    """GELU (Hendrycks and Gimpel 2016): x, times the share of a normal distribution below x."""
    return x * (0.5 + 0.5 * ERF(x * 0.5**0.5))


ERF = np.vectorize(math.erf, otypes=[np.float32])  # numpy has none


#: end
#: if gelu_tanh
def activation(x):
    """GELU as GPT-2 computes it: x, times about the share of a normal distribution below x."""
    return x * (0.5 + 0.5 * np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


#: end
#: if silu
def activation(x):
    """SiLU: x times the logistic function of x, written so that no exp overflows."""
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


#: end
#: if relu
def activation(x):
    return np.maximum(x, 0)


#: end
#: if relu_squared
def activation(x):
    return np.square(np.maximum(x, 0))


#: end
#: if moe
def experts(x, p):
    """Sends each token through the experts that its router finds best: [T, D] to [T, D]."""
    probabilities = softmax(x @ p["mlp.router"])  # [T, E], of E experts
    chosen = np.argsort(-probabilities, kind="stable")[:, :EXPERTS_PER_TOKEN]
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    #: if normalize_weights
    weights = weights / weights.sum(-1, keepdims=True)
    #: end
    #: if shared_expert
    #: if gated
    y = mlp(x, p["mlp.shared.up"], p["mlp.shared.gate"], p["mlp.shared.down"])  # all pass this one
    #: else
    y = mlp(x, p["mlp.shared.up"], p["mlp.shared.down"])  # all pass this one
    #: end
    #: else
    y = np.zeros_like(x)
    #: end
    for e in np.unique(chosen):
        token, place = np.nonzero(chosen == e)
        #: if gated
        out = mlp(x[token], p["mlp.up"][e], p["mlp.gate"][e], p["mlp.down"][e])
        #: else
        out = mlp(x[token], p["mlp.up"][e], p["mlp.down"][e])
        #: end
        y[token] += weights[token, place][:, None] * out
    return y


#: if gated
def mlp(x, up, gate, down):
    """One expert: [T, D] to [T, F] and back; what passes is gated by a second product (Shazeer 2020)."""
    return (activation(x @ gate) * (x @ up)) @ down


#: else
def mlp(x, up, down):
    """One expert: [T, D] to [T, F] and back."""
    return activation(x @ up) @ down


#: end
#: else
def mlp(x, p):
    #: if gated
    """[T, D] to [T, F] and back; what passes is gated by a second product (Shazeer 2020)."""
    #: if mlp_bias
    hidden, gate = x @ p["mlp.up"] + p["mlp.up_bias"], x @ p["mlp.gate"] + p["mlp.gate_bias"]
    return (activation(gate) * hidden) @ p["mlp.down"] + p["mlp.down_bias"]
    #: else
    return (activation(x @ p["mlp.gate"]) * (x @ p["mlp.up"])) @ p["mlp.down"]
    #: end
    #: else
    """[T, D] to [T, F] and back."""
    #: if mlp_bias
    hidden = activation(x @ p["mlp.up"] + p["mlp.up_bias"])
    return hidden @ p["mlp.down"] + p["mlp.down_bias"]
    #: else
    return activation(x @ p["mlp.up"]) @ p["mlp.down"]
    #: end
    #: end


#: end
def forward(params, tokens, start, cache):
    """The vectors [T, D] of new tokens after all layers; notes their keys and values in the cache.

    start: the position of the first of them; cache: [NUM_LAYERS, 2, heads, room, H].
    """
    positions = np.arange(start, start + len(tokens))
    x = params["embed"][tokens]
    #: if scale_embeddings
    x = x * np.float32(EMBED_DIM**0.5)
    #: end
    #: if learned
    x = x + params["position_embed"][positions]
    #: end
    distance = positions[:, None] - np.arange(start + len(tokens))  # [T, S]
    visible = distance >= 0
    #: if windowed and not mixed
    visible &= distance < WINDOW
    #: end
    #: if rotary
    turn = turn_of(positions, FREQUENCIES)
    #: end
    #: if mixed
    #: if local_rope
    nearby = (visible & (distance < WINDOW), turn_of(positions, LOCAL_FREQUENCIES))
    everything = (visible, turn)
    #: elif rotary
    nearby, everything = (visible & (distance < WINDOW), turn), (visible, turn)
    #: else
    nearby, everything = (visible & (distance < WINDOW),), (visible,)
    #: end
    #: end
    for layer, p in enumerate(params["layers"]):
        #: if mixed
        view = nearby if (layer + 1) % GLOBAL_EVERY else everything
        #: end
        #: if pre
        x = x + attention(given.norm(x, p, "attention_norm"), p, given.call, cache[layer])
        x = x + given.mlp(given.norm(x, p, "mlp_norm"), p)
        #: end
        #: if output
        x = x + given.norm(attention(x, p, given.call, cache[layer]), p, "attention_norm")
        x = x + given.norm(given.mlp(x, p), p, "mlp_norm")
        #: end
        #: if post
        x = given.norm(x + attention(x, p, given.call, cache[layer]), p, "attention_norm")
        x = given.norm(x + given.mlp(x, p), p, "mlp_norm")
        #: end
        #: if both
        y = attention(given.norm(x, p, "attention_norm"), p, given.call, cache[layer])
        x = x + given.norm(y, p, "attention_out_norm")
        y = given.mlp(given.norm(x, p, "mlp_norm"), p)
        x = x + given.norm(y, p, "mlp_out_norm")
        #: end
    return given.norm(x, params, "final_norm")


def logits(params, x):
    """The score of every token to be the next one: [..., D] to [..., V]."""
    #: if final_soft_cap
    y = x @ given.head_matrix
    return given.final_soft_cap * np.tanh(y / given.final_soft_cap)  # none beyond this
    #: else
    return x @ given.head_matrix
    #: end


def empty_cache(room):
    """Keys and values of so many tokens, for each layer and head."""
    #: if grouped
    return np.zeros((NUM_LAYERS, 2, NUM_KV_HEADS, room, HEAD_DIM), np.float32)
    #: else
    return np.zeros((NUM_LAYERS, 2, NUM_HEADS, room, HEAD_DIM), np.float32)
    #: end


def draw(scores, temperature, top_k, top_p, random):
    """The next token: the best one at temperature 0, else one of the likely ones by chance."""
    #: if padded_vocabulary
    scores = scores[:NUM_TOKENS]
    #: end
    if temperature == 0:
        return int(np.argmax(scores))
    best = np.argsort(-scores, kind="stable")[:top_k]  # the best first; all of them for None
    chances = softmax(scores[best].astype(np.float64) / temperature)
    needed = np.cumsum(chances) - chances < top_p  # until they reach top_p together
    chances = chances[needed] / chances[needed].sum()
    return int(random.choice(best[needed], p=chances))


def generate(params, tokens, max_tokens, next_token):
    """Yields tokens that go on after those given, until EOS comes or there is no more room."""
    room = min(len(tokens) + max_tokens, MAX_LENGTH)
    cache, start, new = empty_cache(room), 0, tokens
    while start + len(new) < room:
        x = forward(params, new, start, cache)
        start += len(new)
        new = [next_token(logits(params, x[-1]))]
        yield new[0]
        if new[0] == EOS:
            return


def main():
    parser = argparse.ArgumentParser(description="Goes on with a text.")
    parser.add_argument("prompt", nargs="?", default="", help="how the text begins")
    parser.add_argument("--max_tokens", type=int, default=200, help="at most so many new ones")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the best token")
    parser.add_argument("--top_k", type=int, help="draw from the k best tokens")
    parser.add_argument("--top_p", type=float, default=0.95, help="... that reach p together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args()
    if options.max_tokens < 1 or not options.temperature >= 0 or not 0 < options.top_p <= 1:
        parser.error("max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1 are needed")
    if options.seed < 0 or (options.top_k is not None and options.top_k < 1):
        parser.error("seed >= 0 and top_k >= 1 are needed")
    path = Path(__file__).with_name("model.safetensors")
    if not path.is_file():
        parser.error(f"{path} is missing: the model lies there")
    params = load(path)
    tokenizer = Tokenizer(params)
    try:
        tokens = [BOS, *tokenizer.encode(options.prompt)]
    except UnicodeEncodeError:
        parser.error("the prompt is no Unicode text")
    if len(tokens) >= MAX_LENGTH:
        parser.error(f"the prompt has {len(tokens)} tokens, and the model sees {MAX_LENGTH}")
    random = np.random.default_rng(options.seed)
    choices = (options.temperature, options.top_k, options.top_p, random)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.write(options.prompt)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    for token in generate(params, tokens, options.max_tokens, lambda y: draw(y, *choices)):
        sys.stdout.write(utf8.decode(tokenizer.pieces[token]))
        sys.stdout.flush()
    sys.stdout.write(utf8.decode(b"", final=True) + "\n")


if __name__ == "__main__":
    main()
