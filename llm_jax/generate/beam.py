"""Beam search: the most probable continuations, several at a time, in one program.

Each step extends every beam by every token and keeps the best; a continuation that ends leaves the beams
and is scored by its log probability over a power of its length. The rules, ties and the time to stop are
those of transformers' `generate(num_beams=...)`, so both give the same text. Wu et al. 2016 (GNMT,
section 7) is the source of the other normalization, the one of the Transformer of 2017 (section 6.1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from llm_jax.core.config import ConfigError
from llm_jax.nn.cache import KVCache

_NEVER = -1e9  # a score that no text gets
NOTHING = -1e8  # a place without a text scores below


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How many beams, and how lengths compare.

    length_penalty: alpha; above 0 favours longer texts, since log probabilities are negative.
    normalization: what log probabilities are divided by: "length" ** alpha, as in transformers, or
      "gnmt" ((5 + length) / 6) ** alpha. The length counts an eos.
    max_tokens: new tokens of a text, an eos included.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    normalization: Literal["length", "gnmt"] = "length"
    max_tokens: int = 128

    def __post_init__(self):
        for field in ("num_beams", "max_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} {getattr(self, field)} must be at least 1")
        if self.normalization not in ("length", "gnmt"):
            raise ConfigError(
                f"normalization {self.normalization!r} is unknown; choices: length, gnmt"
            )

    def divisor(self, length: jax.Array) -> jax.Array:
        length = length.astype(jnp.float32)
        base = length if self.normalization == "length" else (5.0 + length) / 6.0
        return base**self.length_penalty


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """tokens: the new ones, an eos that ended them included. score: log probability over the divisor."""

    tokens: tuple[int, ...]
    text: str
    score: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """k beams for each of B prompts, or k finished texts. tokens: [B, k, T]; scores: [B, k]."""

    tokens: jax.Array
    scores: jax.Array

    def take(self, index: jax.Array) -> "Beams":
        """index: [B, k'] of beams."""
        tokens = jnp.take_along_axis(self.tokens, index[..., None], axis=1)
        return Beams(tokens, jnp.take_along_axis(self.scores, index, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """improvable: [B], whether a running beam may still beat a finished text."""

    step: jax.Array
    cache: KVCache
    last: jax.Array  # [B k, 1]
    positions: jax.Array  # [B k, 1]
    running: Beams
    finished: Beams
    improvable: jax.Array


# (tokens [N, 1], positions [N, 1], cache) to (logits [N, V], cache)
NextLogits = Callable[[jax.Array, jax.Array, KVCache], tuple[jax.Array, KVCache]]


def search(
    next_logits: NextLogits,
    config: BeamConfig,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    eos_id: int,
    pad_id: int,
) -> tuple[Beams, Beams]:
    """Runs the search, traced: (finished texts, beams still running at the end), best first.

    Args:
      cache: of B prompts, all but their last tokens, with room for max_tokens.
      tokens, positions: [B, 1], those last tokens.

    Returns:
      A score of -1e9 stands where there are fewer finished texts than beams.
    """
    k, length, batch = config.num_beams, config.max_tokens, tokens.shape[0]
    repeat = functools.partial(jnp.repeat, repeats=k, axis=0)
    empty = jnp.full((batch, k, length), pad_id, jnp.int32)
    nothing = jnp.full((batch, k), _NEVER, jnp.float32)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache.of_rows(repeat),
        last=repeat(tokens),
        positions=repeat(positions),
        # All beams are the same text at first: only one of them counts.
        running=Beams(empty, nothing.at[:, 0].set(0.0)),
        finished=Beams(empty, nothing),
        improvable=jnp.ones(batch, bool),
    )
    body = functools.partial(_extend, next_logits, config, eos_id)
    going_on = lambda s: (s.step < length) & jnp.any(s.improvable)  # noqa: E731
    state = jax.lax.while_loop(going_on, body, state)
    return state.finished, state.running


def _extend(next_logits: NextLogits, config: BeamConfig, eos_id: int, state: _State) -> _State:
    k, batch = config.num_beams, state.improvable.shape[0]
    logits, cache = next_logits(state.last, state.positions, state.cache)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, k, -1)
    totals = (log_probs + state.running.scores[..., None]).reshape(batch, -1)
    # Twice as many as beams: k of them go on even if all others end.
    scores, index = jax.lax.top_k(totals, 2 * k)
    beam, token = index // logits.shape[-1], index % logits.shape[-1]
    candidates = state.running.take(beam)
    candidates = Beams(candidates.tokens.at[:, :, state.step].set(token), scores)
    ended = (token == eos_id) | (state.step == config.max_tokens - 1)

    going_on, chosen = jax.lax.top_k(scores + ended * _NEVER, k)
    running = dataclasses.replace(candidates.take(chosen), scores=going_on)
    # Only the best k may end: the others are there to fill the beams.
    counts = ended & (jnp.arange(2 * k) < k) & state.improvable[:, None] & (scores > NOTHING)
    final = jnp.where(counts, scores / config.divisor(state.step + 1), _NEVER)
    both = Beams(
        jnp.concatenate([state.finished.tokens, candidates.tokens], 1),
        jnp.concatenate([state.finished.scores, final], 1),
    )
    finished = both.take(jax.lax.top_k(both.scores, k)[1])

    rows = (jnp.arange(batch)[:, None] * k + jnp.take_along_axis(beam, chosen, 1)).reshape(-1)
    cache = cache.of_rows(lambda a: a[rows], places=False)
    # A running beam's score is compared as if it ended here.
    best = running.scores[:, 0] / config.divisor(state.step + 1)
    worst = jnp.min(finished.scores, 1)
    return _State(
        step=state.step + 1,
        cache=cache,
        last=jnp.take_along_axis(token, chosen, 1).reshape(-1, 1).astype(jnp.int32),
        positions=state.positions + 1,
        running=running,
        finished=finished,
        improvable=state.improvable & (best > worst),
    )
