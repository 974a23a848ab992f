"""The logit lens (nostalgebraist 2020): what the model would say next if it ended after each layer.

The final norm and the head read the residual stream of every layer, though only that of the last was
trained to be read. So the last row is the model's own prediction.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model
from llm_jax.interpret.last_token import last_token
from llm_jax.nn.head import head_logits


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """Of L layers, the k most probable next tokens; and of one token asked for.

    tokens: [L, k] int32, log_probabilities: [L, k] float32, best first.
    target_log_probabilities: [L] float32. target_ranks: [L] int32, 0 for the most probable.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray
    target_log_probabilities: np.ndarray
    target_ranks: np.ndarray


def logit_lens(
    model: Model, tokens: Sequence[int], target: int, *, vocab_size: int, num_best: int
) -> LogitLens:
    """What each layer predicts after the last of `tokens`.

    Args:
      model: a decoder with a final norm and a head.
      target: an id of the vocabulary, whose chances are asked for.
      vocab_size: of the tokenizer; ids beyond it mean nothing.

    Raises:
      ConfigError: as `attention_map`; or a target that is no id.
    """
    if not 0 <= target < vocab_size:
        raise ConfigError(f"target {target}: ids of this model lie in 0..{vocab_size - 1}")
    residual = last_token(model, tokens, "residual")
    graphdef, state = nnx.split(model)
    num_best = min(num_best, vocab_size)
    read = _read(graphdef, state, residual[:, 0], jnp.int32(target), vocab_size, num_best)
    return LogitLens(*map(np.asarray, read))


@functools.partial(jax.jit, static_argnames=("graphdef", "vocab_size", "num_best"))
def _read(graphdef, state, residual, target, vocab_size: int, num_best: int):
    """residual: [L, 1, D], the layers as rows of a batch."""
    model = nnx.merge(graphdef, state)
    token = jnp.zeros((1, 1), jnp.int32)
    head = model(
        {"tokens": token}
    ).head  # nothing else of this call is used, so nothing is computed
    logits = head_logits(model.precision, model.final_norm(residual), head)[:, 0, :vocab_size]
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)  # [L, V]
    best, tokens = jax.lax.top_k(log_probabilities, num_best)
    mine = log_probabilities[:, target]
    ranks = jnp.sum(log_probabilities > mine[:, None], axis=-1)
    return tokens, best, mine, ranks
