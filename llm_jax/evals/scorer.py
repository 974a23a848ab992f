"""Log probabilities of continuations, by which text evaluators judge a causal model.

All requests become one tree of shared beginnings (see `prefix_tree`). A node's tokens go through the model
once, behind the keys and values of what stands above them; the head computes logits of asked tokens alone.
Nodes of one level are batched by length, in few sizes, so that few programs are compiled.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Head, Model, Tokenizer
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
_HEAD_TOKENS = 256  # whose logits stand in memory together
_SCORE_BYTES = 2**30  # of attention on a device, which a cache has computed whole


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


class Scorer:
    """Scores requests with a causal model; several evaluators may share one.

    Args:
      model: with `init_cache`; on the devices of `rules`.
      max_length: most tokens that the model sees; None is the model's max_length.
      batch_tokens: tokens that go through the model together, padding included.

    Attributes:
      computed: tokens that went through the model so far, without padding.

    Raises:
      ConfigError: a model that cannot continue a text, or a mesh that cuts sequences.
    """

    def __init__(
        self,
        model: Model,
        rules: AxisRules,
        *,
        max_length: int | None = None,
        batch_tokens: int = 4096,
    ):
        if not hasattr(model, "init_cache"):
            raise ConfigError(
                f"{type(model).__name__} cannot score continuations: it has no init_cache; choices: gpt"
            )
        if rules.shares("length") > 1:
            raise ConfigError("continuations are scored on a mesh with mesh.context = 1")
        self.max_length = model.config.max_length if max_length is None else max_length
        self.computed = 0
        self._rules, self._batch_tokens = rules, batch_tokens
        self._vocab_size, self._num_heads = model.config.vocab_size, model.config.num_heads
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
        for slots, values, firsts in self._visit(roots, [0] * len(roots), None):
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
        self, nodes: list[Node], parents: list[int], cache: KVCache | None, used: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(slots, log probabilities, whether first) of these nodes and all below them.

        parents: the row of `cache` that each node stands behind; used: its places that are taken.
        """
        # Leaves apart: nothing reads their keys.
        for keep in (False, True):
            chosen = [i for i, node in enumerate(nodes) if bool(node.children) == keep]
            for length, size, part in self._batches(chosen, nodes, used, keep):
                group = [nodes[i] for i in part]
                answers, behind = self._compute(
                    group, [parents[i] for i in part], cache, length, size, used, keep
                )
                yield answers
                children = [
                    (child, row) for row, node in enumerate(group) for child in node.children
                ]
                if children:
                    below, rows = zip(*children, strict=True)
                    yield from self._visit(list(below), list(rows), behind, used + length)

    def _batches(
        self, chosen: list[int], nodes: list[Node], used: int, keep: bool
    ) -> Iterator[tuple[int, int, list[int]]]:
        """(padded length, rows, nodes), longest first."""
        chosen = sorted(chosen, key=lambda i: -len(nodes[i].tokens))
        while chosen:
            length = min(padded_length(len(nodes[chosen[0]].tokens)), self.max_length)
            rows = self._num_rows(length, used, keep)
            few = self._in_shares(max(rows // 8, 1))  # one size for all that is left over
            size = few if len(chosen) <= few else rows
            yield length, size, chosen[:size]
            chosen = chosen[size:]

    def _num_rows(self, length: int, used: int, keep: bool) -> int:
        """A power of two, and a multiple of the batch's shares."""
        rows = self._batch_tokens // length
        if keep or used:  # each row has a copy of the keys above it, and scores of all of them
            seen = padded_length(used + length)
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
        nodes: list[Node],
        parents: list[int],
        cache: KVCache | None,
        length: int,
        size: int,
        used: int,
        keep: bool,
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], KVCache | None]:
        batch = {
            name: np.zeros((size, length), np.int32)
            for name in ("tokens", "positions", "segment_ids")
        }
        places, slots = [], []
        for row, node in enumerate(nodes):
            end = len(node.tokens)
            batch["tokens"][row, :end] = node.tokens
            batch["positions"][row, :end] = node.start + np.arange(end)
            batch["segment_ids"][row, :end] = 1
            self.computed += end
            asked = node.queries
            places.append(
                [np.full(len(asked.slots), row), asked.positions - node.start, asked.targets]
            )
            slots.append(asked.slots)
        rows, columns, targets = np.concatenate(places, axis=1).astype(np.int32)
        slots = np.concatenate(slots)
        room = self._asked_room(len(slots), size) - len(slots)
        rows, columns, targets = (np.pad(a, (0, room)) for a in (rows, columns, targets))
        if cache is not None:
            parents = np.pad(np.array(parents, np.int32), (0, size - len(parents)))
        elif keep:
            cache, parents = self._empty_cache(size, 0), np.arange(size, dtype=np.int32)
        values, firsts, behind = _forward(
            self._graphdef, self._state, cache, parents if cache is not None else None,
            to_global_batch(batch, self._rules, size), (rows, columns, targets),
            rules=self._rules, keep=keep, capacity=padded_length(used + length),
        )  # fmt: skip
        count = len(slots)
        return (slots, np.asarray(values)[:count], np.asarray(firsts)[:count]), behind

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


@functools.partial(jax.jit, static_argnames=("graphdef", "rules", "keep", "capacity"))
def _forward(
    graphdef, state, cache, parents, batch, asked, *, rules: AxisRules, keep: bool, capacity: int
):
    """asked: rows, columns, targets, all [Q]; returns their log probabilities, whether first, the cache.

    capacity: places of the cache behind these tokens; those that are free belong to nobody.
    """
    rows, columns, targets = asked
    with use_rules(rules):
        model = nnx.merge(graphdef, state)
        if cache is not None:
            cache = cache.of_rows(lambda a: a[parents])
            cache = cache.grown(capacity)
        out = model(batch, cache=cache)
        shares = rules.shares("batch")
        size = min(len(targets), shares * power_of_two(max(_HEAD_TOKENS // shares, 1)))
        values, firsts = _asked(model.precision, out.hidden[rows, columns], out.head, targets, size)
    replicated = functools.partial(jax.lax.with_sharding_constraint, shardings=rules.replicated())
    return replicated(values), replicated(firsts), out.cache if keep else None


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
