"""Keys and values of texts that were computed before, for requests that begin with them.

Texts are cut into blocks of 16 tokens. A block is known by its tokens and by the block before it, so that
a chain of blocks is a beginning of a text, compared token by token: nothing is ever taken for something else.
Blocks that were not used for longest make room for new ones (vLLM: Kwon et al. 2023; SGLang: Zheng et al. 2024,
section 3).

The keys are copied, from a cache when a prompt or a text is done, and into another when a prompt begins with
them. The device runs these copies in the order in which they were sent, so no block has to be guarded
while it is in use.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from llm_jax.generate.programs import Programs, Store
from llm_jax.generate.prompts import power_of_two
from llm_jax.nn.cache import KVCache

BLOCK = 16

_Key = tuple[int, tuple[int, ...]]  # serial number of the block before, and the tokens


@dataclasses.dataclass(frozen=True)
class _Block:
    """serial: its own for every block there ever was; place: its first token's in the store."""

    serial: int
    place: int


class PrefixCache:
    """Holds the keys of at most `max_tokens` tokens; 0 switches it off.

    Attributes:
      reused: tokens that did not have to be computed so far.
    """

    def __init__(self, programs: Programs, max_tokens: int):
        self._programs, self._size = programs, max_tokens // BLOCK * BLOCK
        self._store: Store | None = None
        self._blocks: collections.OrderedDict[_Key, _Block] = collections.OrderedDict()
        self._last_serial = 0
        self.reused = 0

    def match(self, tokens: Sequence[int]) -> np.ndarray:
        """Places in the store of the longest known beginning: [R] int32, R a multiple of BLOCK."""
        chain = self._known(tokens)
        places = [self._blocks[key].place for key in chain]
        return (np.repeat(places, BLOCK) + np.tile(np.arange(BLOCK), len(places))).astype(np.int32)

    def load(self, empty: KVCache, places: Sequence[np.ndarray]) -> KVCache:
        """A cache whose rows begin with what `match` found for each of them.

        Its next tokens go behind the longest beginning.
        """
        longest = max(map(len, places))
        self.reused += sum(map(len, places))
        if not longest:
            return empty
        rows = np.full(empty.places.positions.shape, -1, np.int32)
        for row, mine in zip(rows, places, strict=False):
            row[: len(mine)] = mine
        return self._programs.load(self._store, empty, rows, np.int32(longest))

    def save(self, cache: KVCache, row: int, tokens: Sequence[int], columns: np.ndarray) -> None:
        """Keeps the keys of a text's whole blocks.

        Args:
          columns: [len(tokens)] where they stand in that row of the cache.
        """
        count = min(len(tokens), self._size) // BLOCK
        chain = self._known(tokens[: count * BLOCK])
        new = range(len(chain), count)
        if not new:
            return
        serial = self._blocks[chain[-1]].serial if chain else 0
        targets = []
        for block in new:
            key = (serial, tuple(tokens[block * BLOCK : (block + 1) * BLOCK]))
            serial, place = self._take(key)
            chain.append(key)
            targets.append(place + np.arange(BLOCK))
        self._touch(chain)
        columns = columns[new.start * BLOCK : count * BLOCK]
        # Padding goes past the end, where it is dropped.
        more = power_of_two(len(columns)) - len(columns)
        targets = np.concatenate([*targets, self._size + np.arange(more)]).astype(np.int32)
        if self._store is None:
            self._store = self._programs.empty_store(cache, self._size)
        self._store = self._programs.save(
            self._store, cache, np.int32(row), np.pad(columns, (0, more)).astype(np.int32), targets
        )

    def _known(self, tokens: Sequence[int]) -> list[_Key]:
        chain, serial = [], 0
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = (serial, tuple(tokens[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                break
            chain.append(key)
            serial = block.serial
        self._touch(chain)
        return chain

    def _touch(self, chain: list[_Key]) -> None:
        """Marks blocks as used, the first ones as the latest: no block outlives the one before it."""
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def _take(self, key: _Key) -> tuple[int, int]:
        """A block for `key`: (serial, place), in place of the one unused for longest if there is no other."""
        place = len(self._blocks) * BLOCK
        if place == self._size:
            _, oldest = self._blocks.popitem(last=False)
            place = oldest.place
        self._last_serial += 1
        self._blocks[key] = _Block(self._last_serial, place)
        return self._last_serial, place
