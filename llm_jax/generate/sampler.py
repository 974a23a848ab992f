"""From logits to the next token, for rows that are each drawn in another way.

The order is that of transformers: logit bias, repetition penalty, temperature, top-k, top-p, min-p. One
program serves any mixture of rows. Its numbers are arrays with one entry per row; `SamplingMethod` says which
parts any row needs, and a part changes nothing in a row that did not ask for it.

What is unusual is what it does not do: nothing sorts the vocabulary, which would take several times
as long as the model on a CPU (22 ms for 16 rows of 8192 against 0.5 ms here). Top-k and top-p find the
smallest logit or probability that they keep by bisection over the bits of a float32: some 30 masked sums,
exact to the last bit, and the cost stays linear in the vocabulary. Greedy decoding pays for none of it.

Every row draws by noise of its own over the whole vocabulary, so a row's tokens depend neither on its batch
nor on the parts that other rows need.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError

_BITS_OF_TWO = 0x40000000  # float32 2.0, above every probability
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_LEAST = 1e-6  # temperature, top_p and penalty below it act as it does


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, and how many.

    temperature: 0.0 is greedy, and then top_k, top_p, min_p and seed have no effect.
    top_k: keeps the k most probable tokens; None keeps all.
    top_p: keeps the fewest tokens whose probability, after top_k, reaches p; None keeps all.
    seed: of the randomness, together with the number of the request and the index of a token.
    max_tokens: new tokens per prompt.
    stops: the text ends before the first of these strings.
    min_p: keeps the tokens at least p times as probable as the first; None keeps all.
    repetition_penalty: divides the logits of tokens in prompt or text where positive, multiplies them where
      negative (Keskar et al. 2019, section 4.1); 1.0 changes nothing.
    logit_bias: token id to what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    max_tokens: int = 128
    stops: tuple[str, ...] = ()
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not all(self.stops):
            raise ConfigError(f"stops {self.stops} must not hold an empty string")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must lie in (0, 1], or be None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p {self.min_p} must lie in [0, 1], or be None for all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(
                f"repetition_penalty {self.repetition_penalty} must be above 0; 1 changes nothing"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed} must lie in 0..{2**32 - 1}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens} must be at least 1")
        wrong = [value for value in self.logit_bias.values() if not math.isfinite(value)]
        if wrong:
            raise ConfigError(f"logit_bias {wrong[0]} must be a finite number")

    @property
    def method(self) -> "SamplingMethod":
        drawn = self.temperature > 0
        return SamplingMethod(
            drawn=drawn,
            top_k=drawn and self.top_k is not None,
            top_p=drawn and self.top_p is not None and self.top_p < 1,
            edited=self.repetition_penalty != 1 or bool(self.logit_bias),
            bias=len(self.logit_bias),
        )


@dataclasses.dataclass(frozen=True)
class SamplingMethod:
    """The part of SamplingConfigs that shapes the program; numbers are traced arguments.

    Only what takes time is a choice, since each combination is another program.

    drawn: not greedy; min_p, too, costs nothing beside that.
    edited: a repetition penalty or logit bias.
    bias: most entries of a logit_bias.
    """

    drawn: bool = False
    top_k: bool = False
    top_p: bool = False
    edited: bool = False
    bias: int = 0

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> "SamplingMethod":
        """What any of them needs, with room for 16, 64, 256 ... entries of a bias."""
        parts = [dataclasses.astuple(config.method) for config in configs]
        drawn, top_k, top_p, edited, bias = map(max, zip(*parts, strict=True))
        room = next(4**n for n in range(2, 16) if bias <= 4**n)
        return cls(drawn, top_k, top_p, edited, room if edited else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """One entry per row, [B]: float32, int32 or uint32; values that keep everything where there is no limit.

    bias_tokens, bias_values: [B, n]; zeros where there is no further entry.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    bias_tokens: jax.Array
    bias_values: jax.Array

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], method: SamplingMethod) -> "Sampling":
        """As NumPy arrays; what float32 cannot hold is the nearest that it can compute with."""
        floats = lambda values: np.array(list(values), np.float32)  # noqa: E731
        tokens = np.zeros((len(configs), method.bias), np.int32)
        values = np.zeros((len(configs), method.bias), np.float32)
        for row, config in enumerate(configs):
            for place, (token, value) in enumerate(config.logit_bias.items()):
                tokens[row, place], values[row, place] = token, min(max(value, -1e9), 1e9)
        return cls(
            floats(c.temperature and max(c.temperature, _LEAST) for c in configs),
            np.array([min(c.top_k or _HIGHEST, _HIGHEST) for c in configs], np.int32),
            floats(max(c.top_p or 1.0, _LEAST) for c in configs),
            floats(c.min_p or 0.0 for c in configs),
            floats(min(max(c.repetition_penalty, _LEAST), 1 / _LEAST) for c in configs),
            tokens,
            values,
        )


def sample(
    logits: jax.Array, keys: jax.Array, config: SamplingConfig, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row, all in the same way; see `draw`."""
    configs = [config] * logits.shape[0]
    return draw(logits, keys, Sampling.of(configs, config.method), config.method, seen)


def draw(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    method: SamplingMethod,
    seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] typed PRNG keys, one per row.
      seen: [B, V] bool, the tokens that a repetition penalty is for; None: no row has one.

    Returns:
      tokens [B] int32, and their log probabilities [B] float32 under the model itself, which is
      before all that is done to the logits here.
    """
    scores = processed(logits, sampling, method, seen)
    if method.drawn:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        scores = scores + jnp.where(sampling.temperature[:, None] > 0, noise, 0.0)
    tokens = first_argmax(scores)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def processed(
    logits: jax.Array, sampling: Sampling, method: SamplingMethod, seen: jax.Array | None = None
) -> jax.Array:
    """Logits [B, V] of the distribution that tokens are drawn from; -inf for those that are left out."""
    column = lambda a: jnp.asarray(a)[:, None]  # noqa: E731
    if method.edited:
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, sampling.bias_tokens].add(sampling.bias_values)
    if method.edited and seen is not None:
        penalty = column(sampling.penalty)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not method.drawn:
        return logits
    temperature = column(sampling.temperature)
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    if method.top_k:
        logits = jnp.where(top_k_mask(logits, column(sampling.top_k)), logits, -jnp.inf)
    if method.top_p:
        top_p = column(sampling.top_p)
        kept = (top_p >= 1) | top_p_mask(jax.nn.softmax(logits), top_p)
        logits = jnp.where(kept, logits, -jnp.inf)
    # Ratios of probabilities are differences of logits: what was left out before does not matter.
    border = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(column(sampling.min_p))
    return jnp.where(logits >= border, logits, -jnp.inf)


def first_argmax(x: jax.Array) -> jax.Array:
    """The first index of the greatest of each row: [B, V] to [B] int32.

    As jnp.argmax, which XLA does not vectorize on a CPU, where it takes 10 times as long.
    """
    size = x.shape[-1]
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    best = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), places, size)
    return jnp.minimum(jnp.min(best, axis=-1), size - 1)  # a row of NaN has no greatest


def top_p_mask(probabilities: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """True for the fewest most probable tokens that together reach top_p.

    Args:
      probabilities: [B, V] float32, each row sums to 1.
      top_p: a number, or [B, 1].

    Returns:
      [B, V] bool. Tokens exactly as probable as the last one needed are kept too.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)  # same order, for floats >= 0
    reaches = lambda border: jnp.sum(  # noqa: E731
        jnp.where(bits >= border, probabilities, 0), axis=-1, keepdims=True
    ) >= top_p  # fmt: skip
    return bits >= _greatest(reaches, probabilities.shape[0], 0, _BITS_OF_TWO)


def top_k_mask(logits: jax.Array, k: jax.Array | int) -> jax.Array:
    """True for the k greatest, of equal ones the first: [B, V] float32 to bool; k: a number, or [B, 1]."""
    rows, size = logits.shape
    bits = jax.lax.bitcast_convert_type(logits + 0.0, jnp.int32)  # -0.0 becomes 0.0
    order = jnp.where(bits < 0, bits ^ _HIGHEST, bits)  # as integers in the order of the floats
    k = jnp.minimum(k, size)
    count = lambda mask: jnp.sum(mask, axis=-1, keepdims=True)  # noqa: E731
    border = _greatest(lambda least: count(order >= least) >= k, rows, _LOWEST, _HIGHEST)
    above, equal = order > border, order == border
    left = k - count(above)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # The last place that may be taken: the greatest before which too few have been.
    last = _greatest(lambda place: count(equal & (places < place)) < left, rows, 0, size)
    return above | (equal & (places <= last))


def _greatest(holds, rows: int, low: int, high: int) -> jax.Array:
    """The greatest integer in [low, high) that satisfies `holds`, by rows: [rows, 1] int32.

    holds: of [rows, 1] to bool of the same shape; true at `low`, and once false, false for all above.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    bounds = (jnp.full((rows, 1), low, jnp.int32), jnp.full((rows, 1), high, jnp.int32))
    steps = (high - low).bit_length()
    return jax.lax.fori_loop(0, steps, halve, bounds)[0]
