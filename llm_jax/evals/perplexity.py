"""How well a causal model predicts documents: perplexity per token, bits per byte, file by file.

Long documents are read in windows. Each window but the first begins with `context` tokens whose
targets the window before it has already scored, so that no token is predicted from nothing (the
sliding window of Baevski & Auli 2019, section 4.3). Every token is scored exactly once, the end of
the document included: the sum of nats is the length of a code that a decoder could read back.

Documents belong to domains, each of which has its own figures besides those of the whole.
"""

import collections
import dataclasses
import functools
import gzip
import lzma
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch, Tokenizer
from llm_jax.data.config import resolve_data
from llm_jax.data.documents import DocumentReader
from llm_jax.data.sources import open_source, source_for
from llm_jax.evals.findings import Findings, Items, names_of
from llm_jax.evals.subject import Subject
from llm_jax.nn.losses import output_nats
from llm_jax.sharding.place import to_global_batch
from llm_jax.sharding.rules import AxisRules, use_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """domains: texts by name, each as `--data` takes them: a file, a folder, a glob.

    most_bytes: about how much text of each is read, from its beginning; None for all. context: as of
    Perplexity.
    """

    domains: Mapping[str, str]
    most_bytes: int | None = 1_000_000
    context: int | None = None
    name: str = "perplexity"
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str
    domain: str = ""

    @functools.cached_property
    def content(self) -> bytes:
        return self.text.encode()


@dataclasses.dataclass(frozen=True)
class DocumentScore:
    """nats: minus log probability of all `tokens` targets of the document."""

    name: str
    bytes: int
    tokens: int
    nats: float
    domain: str = ""

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(self.bytes, 1)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """An evaluator of causal models: windows of the subject's length, as many at a time as its rows.

    context: tokens shared by neighbouring windows, by default half a window.
    """

    documents: Sequence[Document]
    context: int | None = None

    def run(self, subject: Subject) -> Findings:
        """loss (nats per token), perplexity (per token), bits_per_byte, tokens, bytes.

        With several domains bits_per_byte/NAME and perplexity/NAME of each.
        """
        return found_in(self.documents, self.score(subject))

    def score(self, subject: Subject) -> list[DocumentScore]:
        """One score per document, in order.

        Raises:
          ConfigError: a context as long as a window, or a model that does not read from left to right.
        """
        length = subject.window
        if not hasattr(subject.model, "init_cache"):
            raise ConfigError(
                f"{type(subject.model).__name__} has no perplexity: it does not read from left to "
                "right; choices: gpt"
            )
        if self.context is not None and not 0 <= self.context < length:
            raise ConfigError(f"context {self.context} must lie in [0, {length}), the window")
        graphdef, state = nnx.split(subject.model)
        nats = np.zeros(len(self.documents))
        tokens = np.zeros(len(self.documents), np.int64)
        rows = subject.batch_size
        windows = self._windows(subject.tokenizer, length)
        for owners, batch in _batches(windows, rows, length):
            placed = to_global_batch(batch, subject.rules, rows)
            sums = jax.device_get(_row_nats(graphdef, state, placed, subject.rules))
            # Rows that fill up the last batch have no owner and no weight.
            np.add.at(nats, owners, sums[: len(owners)])
            np.add.at(tokens, owners, batch["loss_weights"].sum(1).astype(int)[: len(owners)])
        return [
            DocumentScore(d.name, len(d.content), int(n), float(x), d.domain)
            for d, n, x in zip(self.documents, tokens, nats, strict=True)
        ]

    def _windows(self, tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """(document, ids of up to length + 1, first target not scored before)."""
        context = length // 2 if self.context is None else self.context
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        for owner, document in enumerate(self.documents):
            ids = np.array([bos, *tokenizer.encode(document.text), eos], np.int32)
            scored = 0
            while scored < len(ids) - 1:
                first = max(scored - context, 0)
                window = ids[first : first + length + 1]
                yield owner, window, scored - first
                scored = first + len(window) - 1


def make(config: Config) -> Perplexity:
    documents = []
    for domain, path in config.domains.items():
        try:
            documents += _documents(domain, path, config.most_bytes)
        except ConfigError as error:
            raise ConfigError(f"perplexity.domains.{domain}: {error}") from None
    if not documents:
        raise ConfigError("perplexity.domains is empty: give texts by name, {'code': 'src/*.py'}")
    return Perplexity(documents, config.context)


def _documents(domain: str, path: str, most_bytes: int | None) -> Iterator[Document]:
    (config,) = resolve_data({"sources": (source_for(path),)}).sources
    with tempfile.TemporaryDirectory() as cache:
        source = open_source(config, Path(cache))
        given = 0
        for document in DocumentReader(source, 0).many(iter(range(len(source)))):
            if most_bytes is not None and given and given + document.text_bytes > most_bytes:
                return
            given += document.text_bytes
            yield Document(document.name, document.text, domain)


def _batches(
    windows: Iterator[tuple[int, np.ndarray, int]], rows: int, sequence_length: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Batches of windows and the document that each of their rows belongs to."""
    shape = (rows, sequence_length)
    positions = np.tile(np.arange(sequence_length, dtype=np.int32), (rows, 1))
    empty = lambda: {  # noqa: E731
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": positions,
    }
    owners, batch = [], empty()
    for owner, ids, start in windows:
        row, length = len(owners), len(ids) - 1
        batch["tokens"][row, :length] = ids[:-1]
        batch["targets"][row, :length] = ids[1:]
        batch["loss_weights"][row, start:length] = 1
        batch["segment_ids"][row, :length] = 1
        owners.append(owner)
        if len(owners) == rows:
            yield owners, batch
            owners, batch = [], empty()
    if owners:
        yield owners, batch


@functools.partial(jax.jit, static_argnames=("graphdef", "rules"))
def _row_nats(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, rules: AxisRules):
    """Weighted cross entropy summed over each row: [B] float32."""
    with use_rules(rules):
        model = nnx.merge(graphdef, state)
        output, targets = model(batch), batch["targets"]
        nats = output_nats(model, output, targets)
        row_sums = jnp.sum(nats * batch["loss_weights"], axis=1)
    return jax.lax.with_sharding_constraint(row_sums, rules.replicated())


def found_in(documents: Sequence[Document], scores: Sequence[DocumentScore]) -> Findings:
    """The summary of all scores and of each domain's, and each document's bits and bytes."""
    by_domain = collections.defaultdict(list)
    for number, score in enumerate(scores):
        by_domain[score.domain].append(number)
    summary, items = summarize(scores), {"bits_per_byte": _items(documents, scores)}
    for domain, numbers in by_domain.items() if len(by_domain) > 1 else ():
        part = [scores[i] for i in numbers]
        own = summarize(part)
        summary |= {f"{name}/{domain}": own[name] for name in ("bits_per_byte", "perplexity")}
        items[f"bits_per_byte/{domain}"] = _items([documents[i] for i in numbers], part)
    return Findings(summary, items)


def _items(documents: Sequence[Document], scores: Sequence[DocumentScore]) -> Items:
    bits = tuple(score.bits for score in scores)
    return Items(
        names_of([d.text for d in documents]), bits, tuple(float(score.bytes) for score in scores)
    )


def summarize(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """loss, perplexity, bits_per_byte, tokens and bytes over all documents."""
    nats, tokens = sum(s.nats for s in scores), sum(s.tokens for s in scores)
    size = sum(s.bytes for s in scores)
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "tokens": tokens,
        "bytes": size,
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bits per byte of one file: by the model, by `gzip -9` and by `xz -9`."""

    name: str
    bytes: int
    model: float
    gzip: float
    xz: float


def compare_with_compressors(
    documents: Sequence[Document], scores: Sequence[DocumentScore]
) -> list[Comparison]:
    """Sets each document's code length beside those of two compressors, headers included."""
    return [
        Comparison(
            document.name,
            score.bytes,
            score.bits_per_byte,
            8 * len(gzip.compress(document.content, 9)) / max(score.bytes, 1),
            8 * len(lzma.compress(document.content, preset=9)) / max(score.bytes, 1),
        )
        for document, score in zip(documents, scores, strict=True)
    ]
