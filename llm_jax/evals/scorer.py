"""Log probabilities of continuations, by which text evaluators judge a causal model.

All requests become one tree of shared beginnings (see `prefix_tree`), and each of its tokens goes through the
model once: branches packed into rows (see `branches`), behind the keys and values of what stands above them.
The head computes logits of asked tokens alone. Rows are batched by length, in few sizes, so that few
programs are compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Head, Model, Tokenizer
from llm_jax.evals.branches import Row, pack, trunk
from llm_jax.evals.prefix_tree import Node, Queries, prefix_tree
from llm_jax.generate.prompts import power_of_two
from llm_jax.generate.sampler import first_argmax
from llm_jax.nn.cache import KVCache
from llm_jax.nn.head import head_logits
from llm_jax.nn.precision import Precision
from llm_jax.nn.transformer import unstack
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import AxisRules, use_rules

SMALLEST_RUN = 16
_ROW_TOKENS = 384  # of a row that several branches share
_HEAD_TOKENS = 256  # whose logits stand in memory together
_SCORE_BYTES = 2**30  # of attention on a device, computed whole for branches and behind a cache


@dataclasses.dataclass(frozen=True)
class Request:
    """How probable is `continuation` after `context`, which has a token at least: a bos."""

    context: Sequence[int]
    continuation: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, context: str, continuation: str) -> "Request":
        """Of texts, see `several`."""
        return cls.several(tokenizer, context, (continuation,))[0]

    @classmethod
    def several(
        cls, tokenizer: Tokenizer, context: str, continuations: Sequence[str]
    ) -> list["Request"]:
        """Continuations of one text, all asked for from the same token on.

        The model sees the tokens of each whole text, as in training. Some may reach from the context into
        the continuation: the first of these begins what is asked, in all of them, so that none is asked for
        less than another. Blanks at the context's end belong to the continuation.
        """
        alone = [tokenizer.bos_id, *tokenizer.encode(context.rstrip())]
        wholes = [[tokenizer.bos_id, *tokenizer.encode(context + c)] for c in continuations]
        begin = min((_shared(alone, whole) for whole in wholes), default=0)
        return [cls(whole[:begin], whole[begin:]) for whole in wholes]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """log_probabilities: [C] float32, nats, of the continuation's tokens; best: [C] bool, the model's first.

    cut: tokens left out at the left of a request that is longer than the model.
    """

    log_probabilities: np.ndarray
    best: np.ndarray
    cut: int

    @property
    def total(self) -> float:
        return float(np.sum(self.log_probabilities, dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding gives this continuation."""
        return bool(self.best.all())


@dataclasses.dataclass(frozen=True)
class _Above:
    """What rows stand behind: rows of a cache, and where the tokens of each are in it."""

    cache: KVCache
    columns: list[np.ndarray]


class Scorer:
    """Scores requests with a causal model; several evaluators may share one.

    Args:
      model: with `init_cache`; on the devices of `rules`.
      batch_tokens: tokens that go through the model together, padding included.

    Attributes:
      max_length: most tokens that the model sees.
      computed: tokens that went through the model so far, without padding.

    Raises:
      ConfigError: a model that cannot continue a text, or a mesh that cuts sequences.
    """

    def __init__(
        self,
        model: Model,
        rules: AxisRules,
        *,
        batch_tokens: int = 4096,
    ):
        if not hasattr(model, "init_cache"):
            raise ConfigError(
                f"{type(model).__name__} cannot score continuations: it has no init_cache; choices: gpt"
            )
        if rules.shares("length") > 1:
            raise ConfigError("continuations are scored on a mesh with mesh.context = 1")
        self.max_length = model.config.max_length
        self.computed = 0
        self._rules, self._batch_tokens = rules, batch_tokens
        self._vocab_size, self._num_heads = model.config.vocab_size, model.config.num_heads
        self._row_tokens = min(_ROW_TOKENS, batch_tokens, self.max_length)
        model = unstack(model)
        self._graphdef, self._state = nnx.split(model)
        self._empty_cache = jax.jit(model.init_cache, static_argnums=(0, 1))

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """One answer per request, in order; what two requests begin with alike is computed once.

        Raises:
          ConfigError: a request without context, or with ids that the model has not.
        """
        rows, queries, cuts, ends = [], [], [], [0]
        for number, request in enumerate(requests):
            row, cut, asked = self._row(number, request)
            slots = np.arange(ends[-1], ends[-1] + asked)
            positions = np.arange(len(row) - 1 - asked, len(row) - 1)
            rows.append(row[:-1])
            queries.append(Queries(positions, row[len(row) - asked :].astype(np.int64), slots))
            cuts.append(cut)
            ends.append(ends[-1] + asked)
        log_probabilities, best = np.zeros(ends[-1], np.float32), np.zeros(ends[-1], bool)
        wanted = [i for i, q in enumerate(queries) if len(q.slots)]
        roots = prefix_tree([rows[i] for i in wanted], [queries[i] for i in wanted])
        longest = max((len(rows[i]) for i in wanted), default=0)
        # A text and what may go on from it stay together, where that is not much more than the text
        # and attention can hold all its scores.
        square = power_of_two(math.isqrt(_SCORE_BYTES // (4 * self._num_heads)) + 1) // 2
        room = min(padded_length(longest + longest // 8), square, self.max_length)
        room = max(room, self._row_tokens)
        nodes = [(root, 0) for root in roots]
        for slots, values, firsts in self._visit(nodes, None, room):
            log_probabilities[slots], best[slots] = values, firsts
        return [
            Likelihood(log_probabilities[a:b], best[a:b], cut)
            for a, b, cut in zip(ends, ends[1:], cuts, strict=False)
        ]

    def _row(self, number: int, request: Request) -> tuple[np.ndarray, int, int]:
        """(ids of at most max_length + 1, how many were cut off, how many of them are asked for)."""
        ids = np.array([*request.context, *request.continuation], np.int64)
        if not len(request.context):
            raise ConfigError(f"request {number} has no context: it needs a token, such as bos")
        wrong = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(wrong):
            raise ConfigError(
                f"request {number} holds token id {wrong[0]}: ids of this model lie in "
                f"0..{self._vocab_size - 1}"
            )
        cut = max(len(ids) - self.max_length - 1, 0)
        ids = ids[cut:]
        return ids, cut, min(len(request.continuation), len(ids) - 1)

    def _visit(
        self,
        nodes: list[tuple[Node, int]],
        above: _Above | None,
        room: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(slots, log probabilities, whether first) of these nodes and all below them.

        Args:
          nodes: each with the row of `above` that it stands behind.
          room: most tokens of a branch that is computed in one row.
        """
        branches: list[tuple[Node, int]] = []
        leaving: dict[Row, list[Node]] = {}
        for node, parent in nodes:
            if node.size <= room or not node.children:
                branches.append((node, parent))
            else:
                way, left = trunk(node, room)
                row = Row(parent, node.start)
                row.add_trunk(way)
                leaving[row] = left
        packed = pack(branches, self._row_tokens, behind=above is not None)
        for size, rows in self._batches(packed, False):
            answers, _ = self._compute(rows, above, size, keep=False)
            yield answers
        for size, rows in self._batches(list(leaving), True):
            answers, behind = self._compute(rows, above, size, keep=True)
            yield answers
            children = [(child, place) for place, row in enumerate(rows) for child in leaving[row]]
            yield from self._visit(children, behind, room)

    def _batches(self, rows: list[Row], keep: bool) -> Iterator[tuple[tuple[int, int], list[Row]]]:
        """((rows, padded length), rows), the longest first; those without branches apart."""
        for branching in (False, True):
            chosen = [row for row in rows if row.branches == branching]
            chosen.sort(key=lambda row: -row.length)
            used = _places(max((row.above for row in chosen), default=0))
            first = 0
            while first < len(chosen):
                length = min(padded_length(chosen[first].length), self.max_length)
                most = self._num_rows(length, used, dense=branching or keep)
                # Few sizes for what is left over.
                sizes = [self._in_shares(max(most // part, 1)) for part in (8, 4, 2, 1)]
                size = next((size for size in sizes if size >= len(chosen) - first), most)
                yield (size, length), chosen[first : first + size]
                first += size

    def _num_rows(self, length: int, used: int, *, dense: bool) -> int:
        """A power of two, and a multiple of the batch's shares."""
        rows = self._batch_tokens // length
        if dense:  # each row has scores of all that it sees, and a copy of the keys above it
            seen = used + length
            most = (
                _SCORE_BYTES * self._rules.shares("batch") // (4 * self._num_heads * length * seen)
            )
            rows = min(rows, 2 * self._batch_tokens // seen, most)
        return self._in_shares(power_of_two(max(rows, 1) + 1) // 2)

    def _in_shares(self, rows: int) -> int:
        shares = self._rules.shares("batch")
        return -(-rows // shares) * shares

    def _compute(
        self,
        rows: list[Row],
        above: _Above | None,
        size: tuple[int, int],
        *,
        keep: bool,
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], _Above | None]:
        """Also these rows for others to stand behind, if they are kept."""
        names = ("tokens", "positions", "segment_ids", "until")
        batch = {name: np.zeros(size, np.int32) for name in names}
        asked, slots = [], []
        for place, row in enumerate(rows):
            for run in row.runs:
                node, inside = run.node, slice(run.start, run.start + len(run.node.tokens))
                batch["tokens"][place, inside] = node.tokens
                batch["positions"][place, inside] = node.start + np.arange(len(node.tokens))
                batch["segment_ids"][place, inside] = run.segment
                batch["until"][place, inside] = run.until
                queries = node.queries
                where = run.start + queries.positions - node.start
                asked.append([np.full(len(where), place), where, queries.targets])
                slots.append(queries.slots)
            self.computed += row.length
        if not any(row.branches for row in rows):
            del batch["until"]
        cache, source, used = None, None, 0
        if above is not None:
            cache = above.cache
            used = _places(max(row.above for row in rows))
            source = (np.zeros(size[0], np.int32), np.full((size[0], used), -1, np.int32))
            for place, row in enumerate(rows):
                source[0][place] = row.parent
                source[1][place, : row.above] = above.columns[row.parent][: row.above]
        elif keep:
            cache = self._empty_cache(size[0], 0)
        asked = np.concatenate(asked, axis=1).astype(np.int32)
        slots = np.concatenate(slots)
        asked = np.pad(asked, ((0, 0), (0, self._asked_room(len(slots), size[0]) - len(slots))))
        values, firsts, behind = _forward(
            self._graphdef, self._state, cache, source,
            to_global_batch(batch, self._rules, size[0]), tuple(asked),
            rules=self._rules, keep=keep,
        )  # fmt: skip
        answers = (slots, np.asarray(values)[: len(slots)], np.asarray(firsts)[: len(slots)])
        if not keep:
            return answers, None
        columns = [np.r_[: row.above, used : used + row.length] for row in rows]
        return answers, _Above(behind, columns)

    def _asked_room(self, count: int, size: int) -> int:
        """Places for `count` questions of `size` rows: few different numbers, so few programs."""
        shares = self._rules.shares("batch")
        room = shares * power_of_two(-(-max(size, SMALLEST_RUN) // shares))
        while room < count:
            room *= 4
        return room


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def padded_length(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
    size = power_of_two(max(length, SMALLEST_RUN))
    return size * 3 // 4 if size > SMALLEST_RUN and length <= size * 3 // 4 else size


def _places(above: int) -> int:
    """For as many tokens that stand above rows."""
    return padded_length(above) if above else 0


@functools.partial(jax.jit, static_argnames=("graphdef", "rules", "keep"))
def _forward(graphdef, state, cache, source, batch, asked, *, rules: AxisRules, keep: bool):
    """Log probabilities of what is asked, whether first, and the cache if it is kept.

    Args:
      source: rows [B] and columns [B, S] of the cache that the rows begin with; None: nothing.
      batch: also `until`, [B, T], where there are branches: see Run.
      asked: rows, columns, targets, all [Q].
    """
    rows, columns, targets = asked
    with use_rules(rules):
        model = nnx.merge(graphdef, state)
        used, length = 0, batch["tokens"].shape[1]
        if source is not None:
            used = source[1].shape[1]
            cache = cache.gathered(*source)
        if cache is not None:
            cache = cache.grown(used + length)
        if "until" in batch:
            batch = {**batch, "visible": _visible(batch["until"], used)}
        out = model(batch, cache=cache)
        shares = rules.shares("batch")
        size = min(len(targets), shares * power_of_two(max(_HEAD_TOKENS // shares, 1)))
        values, firsts = _asked(model.precision, out.hidden[rows, columns], out.head, targets, size)
    replicated = functools.partial(jax.lax.with_sharding_constraint, shardings=rules.replicated())
    return replicated(values), replicated(firsts), out.cache if keep else None


def _visible(until: jax.Array, used: int) -> jax.Array:
    """[B, T] to [B, T, used + T]: all of the cache, and what a token's own branch has before it."""
    places = jnp.arange(until.shape[1])
    inside = (places[None] <= places[:, None]) & (places[:, None] < until[:, None])
    return jnp.pad(inside, ((0, 0), (0, 0), (used, 0)), constant_values=True)


def _asked(
    precision: Precision, hidden: jax.Array, head: Head, targets: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Log probabilities of the targets [Q] float32, and whether they are first [Q] bool.

    hidden: [Q, D], of which the logits of `size` stand in memory together.
    """

    def of_some(hidden_and_targets):
        hidden, targets = hidden_and_targets
        logits = head_logits(precision, hidden[:, None], head)[:, 0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), first_argmax(logits) == targets

    parts = (hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size))
    return tuple(a.reshape(-1) for a in jax.lax.map(of_some, parts))
