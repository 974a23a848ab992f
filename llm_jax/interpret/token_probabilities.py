"""How probable each token of a text is after those before it, and what else could have stood there."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.types import Model
from llm_jax.generate.prompts import power_of_two, right_padded
from llm_jax.interpret.last_token import SMALLEST, check_tokens
from llm_jax.nn.head import head_logits

_CHUNK = 128  # positions whose logits are held at once


@dataclasses.dataclass(frozen=True)
class TokenProbabilities:
    """Of S tokens but the first: log_probabilities [S - 1]; best_* [S - 1, k], best first; float32, int32."""

    log_probabilities: np.ndarray
    best_tokens: np.ndarray
    best_log_probabilities: np.ndarray


def token_probabilities(
    model: Model, tokens: Sequence[int], *, vocab_size: int, num_best: int
) -> TokenProbabilities:
    """Args as of `logit_lens`; raises ConfigError as `attention_map`."""
    check_tokens(model, tokens)
    length = min(power_of_two(max(len(tokens), SMALLEST)), model.config.max_length)
    row = right_padded([list(tokens)], length)
    batch = {name.removeprefix("encoder_"): array for name, array in row.items()}
    targets = np.zeros((1, length), np.int32)
    targets[0, : len(tokens) - 1] = tokens[1:]
    graphdef, state = nnx.split(model)
    scores = _scores(graphdef, state, batch, targets, vocab_size, min(num_best, vocab_size))
    return TokenProbabilities(*(np.asarray(a)[: len(tokens) - 1] for a in scores))


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab_size", "num_best"))
def _scores(graphdef, state, batch, targets, vocab_size: int, num_best: int):
    model = nnx.merge(graphdef, state)
    out = model(batch)

    def chunk(inputs):
        hidden, targets = inputs  # [chunk, D], [chunk]
        logits = head_logits(model.precision, hidden[None], out.head)[0, :, :vocab_size]
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        best, tokens = jax.lax.top_k(log_probabilities, num_best)
        mine = jnp.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]
        return mine, tokens, best

    # Logits of a whole text would be the largest array by far.
    return _by_chunks(chunk, out.hidden[0], targets[0])


def _by_chunks(function, hidden, targets):
    """`function` over [T, D] and [T], _CHUNK positions at a time."""
    length = targets.shape[0]
    more = -length % _CHUNK
    hidden = jnp.pad(hidden, ((0, more), (0, 0))).reshape(-1, _CHUNK, hidden.shape[-1])
    targets = jnp.pad(targets, (0, more)).reshape(-1, _CHUNK)
    results = jax.lax.map(function, (hidden, targets))
    return jax.tree.map(lambda a: a.reshape(length + more, *a.shape[2:])[:length], results)
