"""Generation in batches with a key-value cache, by decoders and encoder-decoders.

One program per step: it runs the model on one token per row, draws the next and hands it back on the
device, so that step n + 1 is under way while the host reads token n. The prompt goes through a second
program, all but its last token, which the first step takes: so nothing computes the logits of a
prompt, and that program does not depend on how tokens are drawn.

Shapes come in powers of two (batch, prompt, cache), and the cache starts small and doubles, so that
few programs are compiled and a step never reads more than twice the keys that it needs. Shorter
prompts are padded on the left with segment 0; positions count from the start of each prompt. A prompt of
an encoder-decoder goes to its encoder, `eos` behind it, and the text starts from the pad token.

The engine keeps a copy of the parameters: layers apart, since slicing a stacked parameter costs a
copy of it per token, and matrices in the compute dtype, since they are then read in half the time. On
CPU it computes in float32 whatever the model was trained in: see Precision.for_generation.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.generate.beam import NOTHING, BeamConfig, Hypothesis, search
from llm_jax.generate.events import Alternative, Completion, RowStream, TokenEvent, completion
from llm_jax.generate.prompts import left_padded, power_of_two, right_padded
from llm_jax.generate.sampler import SamplingConfig, SamplingMethod, draw
from llm_jax.nn.cache import KVCache
from llm_jax.nn.precision import with_precision
from llm_jax.nn.transformer import unstack

SMALLEST_CACHE = 256  # below it, reading the cache costs nothing next to reading the weights
SMALLEST_PROMPT = 16

Prompt = str | Sequence[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a step knows of its rows: tokens and positions [B, 1] int32, keys [B], index scalar."""

    tokens: jax.Array
    positions: jax.Array
    keys: jax.Array
    index: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A step's result: tokens, log_probabilities [B]; the k best: ids, log probabilities [B, k]."""

    tokens: jax.Array
    log_probabilities: jax.Array
    best_tokens: jax.Array
    best_log_probabilities: jax.Array


class Engine:
    """Completes prompts with a model that has `init_cache`, or `encode` and `start`.

    Args:
      model: may be on several devices; shardings propagate from its parameters.
      max_length: most tokens of prompt and completion together, with an encoder of each of them; None is
        the model's max_length, which learned positions cannot exceed and others were not trained to.
      batch_size: most prompts that run together.

    Attributes:
      has_encoder: whether prompts go to an encoder and the text answers them, instead of going on.

    Raises:
      ConfigError: a model that cannot generate, or limits that do not fit it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 16,
    ):
        self.has_encoder = hasattr(model, "encode")
        if not (self.has_encoder or hasattr(model, "init_cache")):
            raise ConfigError(
                f"{type(model).__name__} cannot generate text: it has no init_cache; choices: "
                "gpt, encoder_decoder"
            )
        self._config, self.tokenizer, self.batch_size = model.config, tokenizer, batch_size
        self.max_length = model.config.max_length if max_length is None else max_length
        self._check_limits()
        model = with_precision(unstack(model), model.precision.for_generation())
        self._graphdef, state = nnx.split(model)
        leaves, self._treedef = jax.tree.flatten(state)
        dtype = model.precision.dtype
        # Norms compute in float32 with their one-dimensional scales, routers and relative biases with
        # their tables; all else is cast at its use.
        variables = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        self._leaves = [
            a.astype(dtype) if a.ndim > 1 and not {"router", None} & set(v.axes) else a
            for a, v in zip(leaves, variables, strict=True)
        ]
        if not self.has_encoder:
            self._empty_cache = jax.jit(model.init_cache, static_argnums=(0, 1))
        self._encode = jax.jit(self._encode_program, static_argnums=2)
        self._grow = jax.jit(KVCache.grown, static_argnums=1)
        self._fill = jax.jit(self._fill_program, donate_argnums=1)
        self._step = jax.jit(
            self._step_program, donate_argnums=(1, 2), static_argnames=("method", "num_best")
        )
        self._beams = jax.jit(self._beam_program, static_argnums=4)

    def _check_limits(self) -> None:
        config = self._config
        if self.max_length < 2:
            raise ConfigError(f"max_length {self.max_length} must be at least 2")
        if getattr(config, "position", None) == "learned" and self.max_length > config.max_length:
            raise ConfigError(
                f"max_length {self.max_length} exceeds the {config.max_length} learned positions "
                "of the model"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size {self.batch_size} must be at least 1")
        if self.tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the model only "
                f"{config.vocab_size}"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        on_token: Callable[[TokenEvent], None] | None = None,
        top_alternatives: int = 0,
        row_numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Completes every prompt; see `stream` for the arguments. `on_token` sees each event."""
        events: list[list[TokenEvent]] = [[] for _ in prompts]
        stream = self.stream(
            prompts, config, top_alternatives=top_alternatives, row_numbers=row_numbers
        )
        for event in stream:
            events[event.row].append(event)
            if on_token is not None:
                on_token(event)
        return [
            completion(self.prompt_tokens(prompt), row)
            for prompt, row in zip(prompts, events, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        top_alternatives: int = 0,
        row_numbers: Sequence[int] | None = None,
    ) -> Iterator[TokenEvent]:
        """Yields an event per token as it comes, the rows of a batch in turn.

        Args:
          prompts: text, which gets a bos in front, or ids taken as they are; "" and [] are a bos.
          top_alternatives: how many of the most probable tokens come with each event.
          row_numbers: seeds each row's randomness with `config.seed`; None is 0, 1, ... A prompt
            under the same number gives the same text in any batch.

        Raises:
          ConfigError: a prompt that does not fit in max_length, or ids that the model has not.
        """
        rows = [self.prompt_tokens(prompt) for prompt in prompts]
        numbers = list(range(len(rows))) if row_numbers is None else list(row_numbers)
        if len(numbers) != len(rows):
            raise ConfigError(f"{len(numbers)} row_numbers for {len(rows)} prompts")
        if not 0 <= top_alternatives <= self.tokenizer.vocab_size:
            raise ConfigError(
                f"top_alternatives {top_alternatives} must lie in 0..{self.tokenizer.vocab_size}"
            )
        for index, row in enumerate(rows):
            self._check_prompt(index, row)
        return self._stream(rows, numbers, config, top_alternatives)

    def _stream(self, rows, numbers, config, top_alternatives) -> Iterator[TokenEvent]:
        for first in range(0, len(rows), self.batch_size):
            part = slice(first, first + self.batch_size)
            streams = [
                RowStream(
                    first + i,
                    self.tokenizer,
                    max_tokens=config.max_tokens,
                    room=self.room(row),
                    stops=config.stops,
                )
                for i, row in enumerate(rows[part])
            ]
            yield from self._run(rows[part], numbers[part], streams, config, top_alternatives)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The ids that the model sees for a prompt."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            return [*ids, eos] if self.has_encoder else [bos, *ids]
        return [int(token) for token in prompt] or [eos if self.has_encoder else bos]

    def beam_search(self, prompts: Sequence[Prompt], config: BeamConfig) -> list[list[Hypothesis]]:
        """The best continuations of each prompt, best first; at most `config.num_beams` each.

        Raises:
          ConfigError: as `stream`; or prompts that leave no room for `config.max_tokens`.
        """
        rows = [self.prompt_tokens(prompt) for prompt in prompts]
        for index, row in enumerate(rows):
            self._check_prompt(index, row)
            if self.room(row) < config.max_tokens:
                raise ConfigError(
                    f"prompt {index} leaves room for {self.room(row)} tokens of max_length "
                    f"{self.max_length}: max_tokens is {config.max_tokens}"
                )
        found: list[list[Hypothesis]] = []
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            used = self._used(part)
            size = power_of_two(max(used + config.max_tokens, SMALLEST_CACHE))
            cache, state = self._start(part, [0] * len(part), 0, used, size)
            arrays = self._beams(self._leaves, cache, state.tokens, state.positions, config)
            finished, running = jax.device_get(arrays)
            for row in range(len(part)):
                # Where nothing ended, what is still running is the answer.
                beams = finished if finished.scores[row, 0] > NOTHING else running
                found.append(self._hypotheses(beams.tokens[row], beams.scores[row]))
        return found

    def _hypotheses(self, tokens: np.ndarray, scores: np.ndarray) -> list[Hypothesis]:
        eos = self.tokenizer.eos_id
        result = []
        for ids, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            if score > NOTHING:
                ids = ids[: ids.index(eos) + 1] if eos in ids else ids
                text = self.tokenizer.decode([i for i in ids if i != eos])
                result.append(Hypothesis(tuple(ids), text, score))
        return result

    def room(self, row: list[int]) -> int:
        """New tokens that fit after a prompt."""
        return self.max_length - (0 if self.has_encoder else len(row))

    def _used(self, rows: list[list[int]]) -> int:
        """Places of the cache that the prompts take, all but their last tokens."""
        longest = 0 if self.has_encoder else max(map(len, rows)) - 1
        return power_of_two(max(longest, SMALLEST_PROMPT)) if longest else 0

    def _check_prompt(self, index: int, row: list[int]) -> None:
        most = self.max_length if self.has_encoder else self.max_length - 1
        if len(row) > most:
            border = "eos" if self.has_encoder else "bos"
            raise ConfigError(
                f"prompt {index} has {len(row)} tokens with {border}: max_length {self.max_length} "
                f"leaves room for at most {most}"
            )
        wrong = [token for token in row if not 0 <= token < self.tokenizer.vocab_size]
        if wrong:
            raise ConfigError(
                f"prompt {index} holds token id {wrong[0]}: ids of this model lie in "
                f"0..{self.tokenizer.vocab_size - 1}"
            )

    def _run(
        self,
        rows: list[list[int]],
        numbers: list[int],
        streams: list[RowStream],
        config: SamplingConfig,
        top_alternatives: int,
    ) -> Iterator[TokenEvent]:
        """One batch, from its prompts to the last row's end."""
        used = self._used(rows)
        size = power_of_two(max(used + 1, SMALLEST_CACHE))
        cache, state = self._start(rows, numbers, config.seed, used, size)
        temperature, top_p = jnp.float32(config.temperature), jnp.float32(config.top_p or 1.0)
        pending: collections.deque[Drawn] = collections.deque()
        for _ in range(max(stream.limit for stream in streams)):
            if used == size:
                size *= 2
                cache = self._grow(cache, size)
            cache, state, drawn = self._step(
                self._leaves, cache, state, temperature, top_p,
                method=config.method, num_best=top_alternatives,
            )  # fmt: skip
            used += 1
            pending.append(drawn)
            if len(pending) > 1:  # the step just sent runs while the one before it is read
                yield from _events(pending.popleft(), streams)
            if all(stream.stopped for stream in streams):
                return
        yield from _events(pending.popleft(), streams)

    def _start(
        self, rows: list[list[int]], numbers: list[int], seed: int, used: int, size: int
    ) -> tuple[KVCache, Rows]:
        """A cache of `size` whose `used` places hold all of each prompt but its last token.

        With an encoder the cache attends to the prompts, and the last token is the pad token.
        """
        batch = power_of_two(len(rows))
        rows = rows + [rows[0][:1]] * (batch - len(rows))
        numbers = numbers + [0] * (batch - len(numbers))
        if self.has_encoder:
            longest = power_of_two(max(SMALLEST_PROMPT, *map(len, rows)))
            encoded = right_padded(rows, min(longest, self.max_length))
            cache = self._encode(self._leaves, encoded, size)
            rows = [[self.tokenizer.pad_id]] * batch
        else:
            cache = self._empty_cache(batch, size)
        if used:
            cache = self._fill(self._leaves, cache, left_padded(rows, used))
        return cache, Rows(
            tokens=jnp.asarray([row[-1:] for row in rows], jnp.int32),
            positions=jnp.asarray([[len(row) - 1] for row in rows], jnp.int32),
            keys=_row_keys(seed, np.asarray(numbers, np.uint32)),
            index=jnp.zeros((), jnp.int32),
        )

    def _model(self, leaves: list[jax.Array]) -> Model:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _fill_program(self, leaves, cache: KVCache, batch: dict[str, jax.Array]) -> KVCache:
        return self._model(leaves)(batch, cache=cache).cache

    def _encode_program(self, leaves, batch: dict[str, jax.Array], size: int) -> KVCache:
        model = self._model(leaves)
        return model.start(model.encode(batch), size)

    def _next_logits(self, leaves, tokens, positions, cache) -> tuple[jax.Array, KVCache]:
        """tokens, positions: [B, 1] to logits [B, V] of the tokenizer's ids, and the cache."""
        segment_ids = jnp.ones_like(tokens)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
        out = self._model(leaves)(batch, cache=cache)
        # A vocabulary padded for the mesh has ids that mean nothing.
        return out.logits[:, -1, : self.tokenizer.vocab_size], out.cache

    def _beam_program(self, leaves, cache, tokens, positions, config: BeamConfig):
        return search(
            functools.partial(self._next_logits, leaves), config, cache, tokens, positions,
            eos_id=self.tokenizer.eos_id, pad_id=self.tokenizer.pad_id,
        )  # fmt: skip

    def _step_program(
        self,
        leaves,
        cache: KVCache,
        rows: Rows,
        temperature: jax.Array,
        top_p: jax.Array,
        *,
        method: SamplingMethod,
        num_best: int,
    ) -> tuple[KVCache, Rows, Drawn]:
        logits, cache = self._next_logits(leaves, rows.tokens, rows.positions, cache)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, rows.index)
        tokens, log_probabilities = draw(logits, keys, temperature, top_p, method)
        best, best_tokens = jax.lax.top_k(logits, num_best)
        best -= jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        # A row that has stopped runs on, unread, beside those that have not.
        positions = jnp.minimum(rows.positions + 1, self.max_length - 1)
        rows = Rows(tokens[:, None], positions, rows.keys, rows.index + 1)
        return cache, rows, Drawn(tokens, log_probabilities, best_tokens, best)


@jax.jit
def _row_keys(seed: int, numbers: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)


def _events(drawn: Drawn, streams: list[RowStream]) -> Iterator[TokenEvent]:
    """The events of one step, for the rows still running."""
    drawn = jax.device_get(drawn)
    for i, stream in enumerate(streams):
        if stream.stopped:
            continue
        alternatives = tuple(
            Alternative(int(token), float(value))
            for token, value in zip(
                drawn.best_tokens[i], drawn.best_log_probabilities[i], strict=True
            )
        )
        yield stream.event(int(drawn.tokens[i]), float(drawn.log_probabilities[i]), alternatives)
