"""The model at the last token of a text, with what it kept of the tokens before.

The tokens before go into the cache, the last one through the model alone. So what is captured is that of
one query: attention of [L, N, S] instead of [L, N, S, S], and no memory that grows with the square of the
text beyond a layer's own. Texts are padded to powers of two, so that few programs are compiled.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, ModelOutput
from llm_jax.generate.prompts import left_padded, power_of_two

SMALLEST = 128  # shorter texts would save less time than it takes to compile for them


def check_tokens(model: Model, tokens: Sequence[int]) -> None:
    """Raises ConfigError unless these are ids of a decoder, one at least, no more than it has places for."""
    if not hasattr(model, "init_cache"):
        raise ConfigError(f"{type(model).__name__} is no decoder: there is nothing to look into")
    if not 1 <= len(tokens) <= model.config.max_length:
        raise ConfigError(
            f"{len(tokens)} tokens: expected 1 to {model.config.max_length}, the model's max_length"
        )
    size = model.config.vocab_size
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong:
        raise ConfigError(f"token id {wrong[0]}: ids of this model lie in 0..{size - 1}")


def last_token(model: Model, tokens: Sequence[int], capture: str) -> jax.Array:
    """What `capture` names, of a text's last token.

    Args:
      tokens: with the bos that the model wants.
      capture: "attention" gives [L, 1, K, G, 1, S] float32, of whose S places the last len(tokens) are
        those of the text; "residual" gives [L, 1, 1, D].

    Raises:
      ConfigError: as `check_tokens`.
    """
    check_tokens(model, tokens)
    used = power_of_two(max(len(tokens) - 1, SMALLEST))
    last = {"tokens": tokens[-1], "positions": len(tokens) - 1, "segment_ids": 1}
    last = {name: np.full((1, 1), value, np.int32) for name, value in last.items()}
    graphdef, state = nnx.split(model)
    return _captured(graphdef, state, left_padded([list(tokens)], used), last, capture)


@functools.partial(jax.jit, static_argnames=("graphdef", "capture"))
def _captured(graphdef, state, before, last, capture: str) -> jax.Array:
    model = nnx.merge(graphdef, state)
    cache = model.init_cache(1, before["tokens"].shape[1] + 1)
    cache = model(before, cache=cache).cache
    out: ModelOutput = model(last, cache=cache, capture=(capture,))
    return out.captured[capture]
