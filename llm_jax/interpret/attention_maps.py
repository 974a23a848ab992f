"""Where each head of each layer looks, from one token of a text."""

from collections.abc import Sequence

import numpy as np

from llm_jax.core.types import Model
from llm_jax.interpret.last_token import last_token


def attention_map(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """[L, N, S] float32: how much of each head's attention from the last token each of S tokens gets.

    Args:
      model: a decoder.
      tokens: S ids, with the bos that the model wants.

    Returns:
      Rows that sum to 1; zeros where a layer's window does not reach.

    Raises:
      ConfigError: no decoder, or ids that it has not or has no places for.
    """
    weights = np.asarray(last_token(model, tokens, "attention"))  # [L, 1, K, G, 1, places]
    layers, places = weights.shape[0], weights.shape[-1]
    return weights.reshape(layers, -1, places)[:, :, -len(tokens) :]
