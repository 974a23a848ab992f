"""Generation for many requests at once, by decoders and encoder-decoders: continuous batching.

`submit` takes a request, `step` says what became known since the last call; `generate` and `stream` are
loops around the two. A step does two things: it sends a piece of the prompts that wait to the device
(generate/prefill.py), and it sends the texts that are being written one token on (generate/batch.py). The
host reads a step while the device is at the next one.

Requests come in as they were submitted, each when a slot is free. What a request is answered with does not
depend on what else is there, up to the last bits of the logits: matrix products of other sizes sum in
another order. Its randomness is its own (generate/sampler.py).

A prompt of an encoder-decoder goes to its encoder, `eos` behind it, and the text starts from the pad token.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model, Tokenizer
from llm_jax.generate.batch import Batch, Read
from llm_jax.generate.beam import BeamConfig, Hypothesis
from llm_jax.generate.beam_search import BeamSearch
from llm_jax.generate.events import Alternative, Completion, RowStream, TokenEvent, completion
from llm_jax.generate.prefill import SMALLEST_CHUNK, Encoded, Prefill, next_group
from llm_jax.generate.prefix import PrefixCache
from llm_jax.generate.programs import Programs
from llm_jax.generate.prompts import power_of_two
from llm_jax.generate.requests import Request
from llm_jax.generate.sampler import SamplingConfig

Prompt = str | Sequence[int]


class Engine:
    """Completes prompts with a model that has `init_cache`, or `encode` and `start`.

    Args:
      model: may be on several devices: heads of the cache lie as those of its parameters do, all else is
        propagated from them.
      max_length: most tokens of prompt and completion together, with an encoder of each of them; None is
        the model's max_length, which learned positions cannot exceed and others were not trained to.
      num_slots: most requests that run together.
      chunk_tokens: most tokens of prompts that are computed between two tokens of a text; a power of two.
        An encoder reads a longer prompt whole.
      prefix_tokens: how many tokens of earlier prompts and texts keep their keys, for prompts that begin
        with them; 0: none.

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
        num_slots: int = 16,
        chunk_tokens: int = 256,
        prefix_tokens: int = 8192,
    ):
        self.has_encoder = hasattr(model, "encode")
        if not (self.has_encoder or hasattr(model, "init_cache")):
            raise ConfigError(
                f"{type(model).__name__} cannot generate text: it has no init_cache; choices: "
                "gpt, encoder_decoder"
            )
        self.tokenizer, self.num_slots, self._chunk_tokens = tokenizer, num_slots, chunk_tokens
        self.max_length = model.config.max_length if max_length is None else max_length
        self._check_limits(model.config)
        self._programs = Programs(model, tokenizer.vocab_size, self.max_length - 1)
        self._prefix_tokens = 0 if self.has_encoder else prefix_tokens
        self._waiting: collections.deque[Request] = collections.deque()
        self._requests: dict[int, Request] = {}
        self._next_id, self._is_streaming = 0, False
        self._forget()
        self._beams = BeamSearch(self._programs, tokenizer, self.max_length)

    def _check_limits(self, config) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length {self.max_length} must be at least 2")
        if getattr(config, "position", None) == "learned" and self.max_length > config.max_length:
            raise ConfigError(
                f"max_length {self.max_length} exceeds the {config.max_length} learned positions "
                "of the model"
            )
        if self.has_encoder and self.max_length > config.max_length:
            raise ConfigError(
                f"max_length {self.max_length} exceeds the {config.max_length} of the model, whose "
                "encoder reads no more"
            )
        if self.num_slots < 1:
            raise ConfigError(f"num_slots {self.num_slots} must be at least 1")
        chunk = self._chunk_tokens
        if chunk < SMALLEST_CHUNK or chunk != power_of_two(chunk):
            raise ConfigError(
                f"chunk_tokens {chunk} must be a power of two, at least {SMALLEST_CHUNK}"
            )
        if self.tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the model only "
                f"{config.vocab_size}"
            )

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingConfig,
        *,
        number: int = 0,
        top_alternatives: int = 0,
        prompt_log_probabilities: bool = False,
    ) -> int:
        """Puts a request in the queue; returns its id, which is `row` of its events.

        Args:
          prompt: text, which gets a bos in front, with an encoder an eos behind it, or ids taken as they are;
            "" and [] are that one token.
          number: of the request's randomness, together with `sampling.seed`: the same two give the same text.
          top_alternatives: how many of the most probable tokens come with each event.
          prompt_log_probabilities: the first event has those of the prompt's tokens, all but the first.

        Raises:
          ConfigError: a prompt that does not fit in max_length, or ids that the model has not.
        """
        if self._is_streaming:
            raise ConfigError("a stream is open: read it to its end, or close it, and then submit")
        tokens = self.prompt_tokens(prompt)
        self._check_prompt("the prompt", tokens)
        self._check_sampling(sampling, top_alternatives)
        if prompt_log_probabilities and self.has_encoder:
            raise ConfigError("an encoder's prompt has no log probabilities")
        return self._submit(tokens, sampling, number, top_alternatives, prompt_log_probabilities)

    def _submit(self, tokens, sampling, number, top_alternatives, scored) -> int:
        self._next_id += 1
        stream = RowStream(
            self._next_id,
            self.tokenizer,
            max_tokens=sampling.max_tokens,
            room=self.room(tokens),
            stops=sampling.stops,
        )
        decoder = [self.tokenizer.pad_id] if self.has_encoder else tokens
        request = Request(
            self._next_id,
            tokens,
            decoder,
            sampling,
            number % 2**32,
            top_alternatives,
            scored,
            stream,
        )
        self._requests[request.id] = request
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request without further events; ids that are unknown or over are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        self._end(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a slot, those whose prompts are being computed included."""
        return len(self._requests) - len(self._waiting)

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens so far whose keys were there already."""
        return self._prefix.reused

    def step(self) -> list[TokenEvent]:
        """Goes on with what was submitted, and returns the events that became known; may be none.

        Where it raises, all requests are lost, and the engine serves others.
        """
        try:
            self._admit()
            sent = self._batch.step(may_shrink=not self._waiting)
            return [self._event(read) for read in self._batch.read(leave=1 if sent else 0)]
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        """Nothing runs or waits, and caches are made anew: those there were may have been donated."""
        for request in self._requests.values():
            request.over = True
        self._requests.clear()
        self._waiting.clear()
        self._group: Prefill | Encoded | None = None
        self._batch = Batch(self._programs)
        self._prefix = PrefixCache(self._programs, self._prefix_tokens)

    def _admit(self) -> None:
        """Sends a piece of the prompts that wait; where no text is held up by them, all that go in one piece."""
        held_up = self._batch.wants_step
        if self._group is not None and all(request.over for request in self._group.requests):
            self._group = None
        while self._group is not None or (self._waiting and self._free_slots()):
            if self._group is None:
                self._group = self._next_group()
            if not self._group.done:
                self._group.advance()
            if self._group.done:
                self._insert(self._group)
                self._group = None
            if held_up or self._group is not None:
                return

    def _free_slots(self) -> int:
        return self.num_slots - len(self._batch.running)

    def _next_group(self) -> Prefill | Encoded:
        free = self._free_slots()
        if self.has_encoder:
            group, longest = [], SMALLEST_CHUNK
            while self._waiting and len(group) < free:
                longest = max(longest, power_of_two(len(self._waiting[0].prompt)))
                if group and (len(group) + 1) * longest > self._chunk_tokens:
                    break
                group.append(self._waiting.popleft())
            return Encoded(self._programs, group, self.max_length)
        return next_group(
            self._programs, self._waiting, self._prefix, most=free, chunk_tokens=self._chunk_tokens
        )

    def _insert(self, group: Prefill | Encoded) -> None:
        expected = min(len(self._waiting), self._free_slots() - len(group.requests))
        self._batch.insert(group, expected=expected)
        for row, request in enumerate(group.requests):
            self._prefix.save(group.cache, row, request.decoder[:-1], group.columns(row))

    def _event(self, read: Read) -> TokenEvent:
        request = read.request
        request.generated.append(read.token)
        alternatives = tuple(Alternative(*best) for best in read.best)
        event = request.stream.event(read.token, read.log_probability, alternatives)
        if request.scored and event.index == 0:
            values = np.concatenate([np.zeros(0), *(scores[0] for scores in request.prompt_scores)])
            known = tuple(values[: len(request.decoder) - 1].tolist())
            event = dataclasses.replace(event, prompt_log_probabilities=known)
        if event.stop_reason is not None:
            self._end(request)
        return event

    def _end(self, request: Request) -> None:
        request.over = True
        del self._requests[request.id]
        if request in self._batch.requests:
            cache, row, columns = self._batch.remove(request)
            self._prefix.save(cache, row, request.known, columns)

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
          prompts: as of `submit`.
          top_alternatives: how many of the most probable tokens come with each event.
          row_numbers: seeds each row's randomness with `config.seed`; None is 0, 1, ... A prompt
            under the same number gives the same text in any batch.

        Raises:
          ConfigError: as `submit`; or requests that were submitted and are not over.
        """
        rows = [self.prompt_tokens(prompt) for prompt in prompts]
        numbers = list(range(len(rows))) if row_numbers is None else list(row_numbers)
        if len(numbers) != len(rows):
            raise ConfigError(f"{len(numbers)} row_numbers for {len(rows)} prompts")
        for index, row in enumerate(rows):
            self._check_prompt(f"prompt {index}", row)
        self._check_sampling(config, top_alternatives)
        return self._stream(rows, numbers, config, top_alternatives)

    def _stream(self, rows, numbers, config, top_alternatives) -> Iterator[TokenEvent]:
        if self._requests:
            raise ConfigError(f"{len(self._requests)} requests are not over: read them by step()")
        ids = [
            self._submit(row, config, number, top_alternatives, False)
            for row, number in zip(rows, numbers, strict=True)
        ]
        indices = {request_id: index for index, request_id in enumerate(ids)}
        self._is_streaming = True
        try:
            while self._requests:
                for event in self.step():
                    yield dataclasses.replace(event, row=indices[event.row])
        finally:
            self._is_streaming = False
            for request_id in ids:
                self.cancel(request_id)

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
            self._check_prompt(f"prompt {index}", row)
            if self.room(row) < config.max_tokens:
                raise ConfigError(
                    f"prompt {index} leaves room for {self.room(row)} tokens of max_length "
                    f"{self.max_length}: max_tokens is {config.max_tokens}"
                )
        parts = range(0, len(rows), self.num_slots)
        found = (self._beams.search(rows[i : i + self.num_slots], config) for i in parts)
        return [best for part in found for best in part]

    def room(self, row: list[int]) -> int:
        """New tokens that fit after a prompt."""
        return self.max_length - (0 if self.has_encoder else len(row))

    def _check_prompt(self, name: str, row: list[int]) -> None:
        most = self.max_length if self.has_encoder else self.max_length - 1
        if len(row) > most:
            border = "eos" if self.has_encoder else "bos"
            raise ConfigError(
                f"{name} has {len(row)} tokens with {border}: max_length {self.max_length} "
                f"leaves room for at most {most}"
            )
        wrong = [token for token in row if not 0 <= token < self.tokenizer.vocab_size]
        if wrong:
            raise ConfigError(
                f"{name} holds token id {wrong[0]}: ids of this model lie in "
                f"0..{self.tokenizer.vocab_size - 1}"
            )

    def _check_sampling(self, config: SamplingConfig, top_alternatives: int) -> None:
        vocab_size = self.tokenizer.vocab_size
        if not 0 <= top_alternatives <= vocab_size:
            raise ConfigError(f"top_alternatives {top_alternatives} must lie in 0..{vocab_size}")
        wrong = [token for token in config.logit_bias if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"logit_bias holds token id {wrong[0]}: ids of this model lie in 0..{vocab_size - 1}"
            )
