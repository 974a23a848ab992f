"""The rows that get their next tokens together.

Their keys lie in a ring: all rows write at one common place, which goes round, and a row that comes in is
laid out so that it ends just before it (nn/cache.py). The number of rows and the size of the ring are
powers of two that follow what runs, so a few short texts do not pay for many long ones.

The host is one step behind: it learns a row's last token while the next step runs, whose result for
that row it ignores. A row that must end after a known number of tokens gets no step beyond them.
"""

import collections
import dataclasses

import numpy as np

from llm_jax.generate.prefill import Encoded, Prefill
from llm_jax.generate.programs import Drawn, Programs, Rows, next_rows
from llm_jax.generate.prompts import power_of_two
from llm_jax.generate.requests import Request
from llm_jax.generate.sampler import Sampling, SamplingConfig, SamplingMethod
from llm_jax.nn.cache import KVCache

# The least places of a ring, with many rows and with few: so many keys cost little to read next to the
# weights, and each size is another program.
SMALLEST_RINGS = (64, 256)
_FEW_KEYS = 1024
_SHRINK_AFTER = 8  # steps with half of the rows free
_NOBODY = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Read:
    """What one step gave a request: its token and what belongs to it."""

    request: Request
    token: int
    log_probability: float
    best: list[tuple[int, float]]


class Batch:
    """Requests by row, and all that is on the device for them."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self.requests: list[Request | None] = []
        self._cache: KVCache | None = None
        self._size = self._clock = 0  # of the ring: its places, and the next one to be written
        self._rows: Rows | None = None
        self._sources: list[int] = []  # of each row, the row of `_rows` that it comes from, or -1
        self._changed = False
        self._method, self._num_best = SamplingMethod(), 0
        self._sent: collections.deque[tuple[Drawn, list[tuple[int, Request]]]] = collections.deque()
        self._half_empty = 0

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request is not None]

    @property
    def wants_step(self) -> bool:
        return any(request.wants_step for request in self.running)

    def insert(self, group: Prefill | Encoded, *, expected: int) -> None:
        """Gives each request of the group a row, and makes room for those `expected` next."""
        new = [(row, r) for row, r in enumerate(group.requests) if not r.over]
        if not new:
            return
        columns = {row: group.columns(row) for row, _ in new}
        self._make_room(len(new), expected, max(map(len, columns.values())), group.cache)
        for source, request in new:
            row = self.requests.index(None)
            length = len(columns[source])
            ring = (self._clock - length + np.arange(length)) % self._size
            taken, positions = np.zeros(self._size, np.int32), np.full(self._size, -1, np.int32)
            taken[ring], positions[ring] = columns[source], np.arange(length)
            self._cache = self._programs.with_row(
                self._cache, np.int32(row), group.cache, np.int32(source), taken, positions
            )
            request.written = length
            self.requests[row], self._sources[row] = request, -1
            self._changed = True

    def remove(self, request: Request) -> tuple[KVCache, int, np.ndarray]:
        """Frees the row of a request: (cache, row, places there of all tokens in `request.known`)."""
        row = self.requests.index(request)
        self.requests[row] = None
        if self.running and self._needs() != (self._method, self._num_best):
            self._changed = True
        first = self._clock - request.written
        return self._cache, row, (first + np.arange(len(request.known))) % self._size

    def step(self, *, may_shrink: bool) -> bool:
        """Sends a step to the device if a request wants one."""
        if not self.wants_step:
            return False
        if may_shrink:
            self._shrink()
        self._fit_ring(0)
        if self._changed:
            self._renew_rows()
        programs = self._programs
        self._cache, logits = programs.step(self._cache, self._rows)
        self._rows, drawn = programs.draw(
            logits, self._rows, method=self._method, num_best=self._num_best
        )
        self._clock = (self._clock + 1) % self._size
        wanted = []
        for row, request in enumerate(self.requests):
            if request is not None:
                if request.wants_step:
                    wanted.append((row, request))
                    request.issued += 1
                request.written += 1
        self._sent.append((drawn, wanted))
        return True

    def read(self, *, leave: int) -> list[Read]:
        """Waits for the oldest step and reads it, if more than `leave` are on their way."""
        if len(self._sent) <= leave:
            return []
        drawn, wanted = self._sent.popleft()
        values = {
            field.name: np.asarray(array).tolist()
            for field in dataclasses.fields(drawn)
            if (array := getattr(drawn, field.name)) is not None
        }
        found = []
        for row, request in wanted:
            if request.over:
                continue
            best: list[tuple[int, float]] = []
            if request.top_alternatives:
                names = ("best_tokens", "best_log_probabilities")
                pairs = zip(*(values[name][row] for name in names), strict=True)
                best = list(pairs)[: request.top_alternatives]
            token, log_probability = values["tokens"][row], values["log_probabilities"][row]
            found.append(Read(request, token, log_probability, best))
        return found

    def _make_room(self, more: int, expected: int, length: int, like: KVCache) -> None:
        """Rows for `more` requests and soon others, and places for `length` tokens and one more."""
        live = self.running
        memory = _memory_length(like)
        if not live:
            rows = power_of_two(more + expected)
            size = _ring_size(length + 1, rows)
            if self._cache is None or (size, rows) != (self._size, len(self.requests)):
                self._cache = self._programs.emptied(like, rows, size, memory)
                self._size, self._clock = size, 0
            self.requests, self._sources, self._rows = [None] * rows, [-1] * rows, None
        elif len(live) + more > len(self.requests):
            self._take_rows(power_of_two(len(live) + more + expected))
        if memory > _memory_length(self._cache):
            self._cache = self._programs.memory_grown(self._cache, memory)
        self._fit_ring(length + 1)

    def _fit_ring(self, needed: int) -> None:
        """A ring for `needed` places, smaller than it is only where it shrinks to a quarter."""
        needed = max([needed, *(request.written + 1 for request in self.running)])
        size = _ring_size(needed, len(self.requests))
        if self._size < needed or self._size >= 4 * size:
            self._cache = self._programs.ring_resized(self._cache, size)
            self._clock = min(self._size, size) % size
            self._size = size

    def _shrink(self) -> None:
        count = len(self.running)
        self._half_empty = self._half_empty + 1 if 2 * count <= len(self.requests) else 0
        if self._half_empty > _SHRINK_AFTER:
            self._take_rows(power_of_two(count))
            self._half_empty = 0

    def _take_rows(self, count: int) -> None:
        """Moves the rows in use to the front of `count` rows."""
        old = [row for row, request in enumerate(self.requests) if request is not None]
        more = count - len(old)
        index = np.array(old + [0] * more, np.int32)
        self._cache = self._programs.of_rows(self._cache, index)
        self.requests = [self.requests[row] for row in old] + [None] * more
        self._sources = [self._sources[row] for row in old] + [-1] * more
        self._changed = True

    def _needs(self) -> tuple[SamplingMethod, int]:
        """What a step must do for the requests that run: how to draw, how many alternatives."""
        running = self.running
        most = max((r.top_alternatives for r in running), default=0)
        num_best = min(power_of_two(most), self._programs.vocab_size) if most else 0
        return SamplingMethod.of([r.sampling for r in running]), num_best

    def _renew_rows(self) -> None:
        """Tells the device which requests its rows are of."""
        live = [(row, r) for row, r in enumerate(self.requests) if r is not None]
        configs = [_NOBODY] * len(self.requests)
        integers = np.zeros((5, len(self.requests)), np.uint32)
        for row, request in live:
            configs[row] = request.sampling
            integers[:, row] = (
                request.decoder[-1], request.written, request.issued,
                request.sampling.seed, request.number,
            )  # fmt: skip
        tokens, positions, index, seeds, numbers = integers
        segment_ids = np.array([r is not None for r in self.requests], np.int32)
        self._method, self._num_best = self._needs()
        rows = Rows(
            tokens.astype(np.int32), positions.astype(np.int32), segment_ids, index, seeds, numbers,
            Sampling.of(configs, self._method), self._seen(live) if self._method.edited else None,
        )  # fmt: skip
        self._rows = next_rows(rows, self._rows, np.array(self._sources, np.int32))
        self._sources, self._changed = list(range(len(self.requests))), False

    def _seen(self, live: list[tuple[int, Request]]) -> np.ndarray:
        """The tokens that a penalty is for; of rows that stay, the device knows them."""
        seen = np.zeros((len(self.requests), self._programs.vocab_size), bool)
        for row, request in live:
            seen[row, request.decoder] = True
        return seen


def _ring_size(needed: int, rows: int) -> int:
    """Of a ring with `needed` places at least."""
    least, most = SMALLEST_RINGS
    return power_of_two(max(needed, min(max(_FEW_KEYS // rows, least), most)))


def _memory_length(cache: KVCache) -> int:
    return 0 if cache.memory_places is None else cache.memory_places.positions.shape[1]
