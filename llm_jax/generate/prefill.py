"""Prompts on their way into a cache of their own, in pieces of bounded size.

Between two pieces the texts that are being written get their next tokens, so a long prompt holds nobody up.
Several short prompts share a piece, a row each. What was computed before is not computed again
(generate/prefix.py). The last token of a prompt is left to the first step: so nothing computes the
logits of a prompt, and these programs do not depend on how tokens are drawn.
"""

import collections
from collections.abc import Sequence

import numpy as np

from llm_jax.generate.prefix import PrefixCache
from llm_jax.generate.programs import Programs
from llm_jax.generate.prompts import power_of_two, right_padded
from llm_jax.generate.requests import Request
from llm_jax.nn.cache import KVCache

SMALLEST_CHUNK = 16


class Prefill:
    """Some requests, each a row of `cache`."""

    def __init__(
        self,
        programs: Programs,
        requests: Sequence[Request],
        prefix: PrefixCache,
        places: Sequence[np.ndarray],
        chunk: int,
    ):
        self.requests = list(requests)
        self._programs, self._chunk, self._done = programs, chunk, 0
        self._starts = [len(mine) for mine in places]
        self._after = max(self._starts)  # where the tokens that are computed begin
        self._left = max(
            len(r.decoder) - 1 - s for r, s in zip(requests, self._starts, strict=True)
        )
        pieces = -(-self._left // chunk)
        length = power_of_two(max(self._after + pieces * chunk, SMALLEST_CHUNK))
        empty = programs.empty_cache(power_of_two(len(self.requests)), length)
        self.cache: KVCache = prefix.load(empty, places)

    @property
    def done(self) -> bool:
        return self._done >= self._left

    def advance(self) -> None:
        """Sends the next piece to the device."""
        start, left = self._done, self._left - self._done
        length = min(self._chunk, power_of_two(max(left, SMALLEST_CHUNK)))
        shape = (self.cache.places.positions.shape[0], length)
        names = ("tokens", "positions", "segment_ids", "targets")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        for row, (request, begin) in enumerate(zip(self.requests, self._starts, strict=True)):
            first = begin + start
            tokens = request.decoder[first : first + length + 1]
            size = max(len(tokens) - 1, 0)
            batch["tokens"][row, :size] = tokens[:-1]
            batch["targets"][row, :size] = tokens[1:]
            batch["positions"][row, :size] = first + np.arange(size)
            batch["segment_ids"][row, :size] = 1
        scored = any(request.scored for request in self.requests)
        if not scored:
            del batch["targets"]
        self.cache, scores = self._programs.fill(self.cache, batch, scored=scored)
        for request in self.requests if scored else ():
            request.prompt_scores.append(scores)
        self._done += length

    def columns(self, row: int) -> np.ndarray:
        """Where the tokens of a row stand in the cache, all but its last."""
        known, size = self._starts[row], len(self.requests[row].decoder) - 1
        return np.concatenate([np.arange(known), self._after + np.arange(size - known)])


class Encoded:
    """The same of an encoder-decoder, whose prompts the encoder reads all at once."""

    done = True

    def __init__(self, programs: Programs, requests: Sequence[Request], max_length: int):
        self.requests = list(requests)
        prompts = [request.prompt for request in requests]
        more = power_of_two(len(prompts)) - len(prompts)
        longest = min(power_of_two(max(SMALLEST_CHUNK, *map(len, prompts))), max_length)
        batch = right_padded(prompts + [prompts[0][:1]] * more, longest)
        self.cache: KVCache = programs.encode(batch, SMALLEST_CHUNK)

    def columns(self, row: int) -> np.ndarray:
        return np.zeros(0, np.int64)


def next_group(
    programs: Programs,
    waiting: collections.deque[Request],
    prefix: PrefixCache,
    *,
    most: int,
    chunk_tokens: int,
) -> Prefill:
    """Takes the requests from the queue that are computed together, `most` at most.

    The first one, alone if it takes more than a piece of `chunk_tokens`, else with those behind it that
    are no longer than its power of two, as many as fill the piece.
    """
    group, places, length = [], [], 0
    while waiting and len(group) < most:
        request = waiting[0]
        tokens = request.decoder[:-1]
        found = prefix.match([] if request.scored else tokens)
        left = len(tokens) - len(found)
        if not group:
            length = min(power_of_two(max(left, SMALLEST_CHUNK)), chunk_tokens)
            alone = request.scored or left > length
            most = 1 if alone else min(most, chunk_tokens // length)
        elif left > length or request.scored:
            break
        group.append(waiting.popleft())
        places.append(found)
    return Prefill(programs, group, prefix, places, length)
