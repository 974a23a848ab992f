"""Two texts in a row, as BERT and ALBERT read them: [CLS] A [SEP] B [SEP], and whether B follows A.

"next_sentence" (Devlin et al. 2018, section 3.1): B follows A in its document, or comes from another
row. "sentence_order" (Lan et al. 2019, section 3.1): B follows A, or the two are swapped.

Which of the two it is must not show in anything but the texts. So A and B meet where a sentence starts,
a random B starts where one starts, both kinds of B are as long, and the swapped texts begin and end
with whole sentences. Where a document has too few sentences, words serve, then single tokens.
"""

import dataclasses

import numpy as np

from llm_jax.core.pieces import Pieces
from llm_jax.core.randomness import RowRandom

NUM_SPECIAL = 3  # [CLS] and two [SEP]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Columns start .. end - 1 of each row's text; both [B] int64."""

    start: np.ndarray
    size: np.ndarray

    @property
    def end(self) -> np.ndarray:
        return self.start + self.size

    def at_most(self, size: np.ndarray) -> "Spans":
        return Spans(self.start, np.minimum(self.size, size))

    def where(self, rows: np.ndarray, others: "Spans") -> "Spans":
        """These in the rows [B] bool, the others elsewhere."""
        return Spans(
            np.where(rows, self.start, others.start), np.where(rows, self.size, others.size)
        )

    def edges(self, length: int) -> np.ndarray:
        """[B, length + 1] bool, True at start and end."""
        columns = np.arange(length + 1)
        return (columns == self.start[:, None]) | (columns == self.end[:, None])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """text: [B, W] int32, in which `first` and `second` lie.

    labels: [B] int32, 0 where the second follows the first. usable: [B] bool, False where a row has
    too little text for a pair.
    """

    text: np.ndarray
    first: Spans
    second: Spans
    labels: np.ndarray
    usable: np.ndarray


@dataclasses.dataclass(frozen=True)
class PairMaker:
    """Pairs from windows of packed documents, [bos] text [eos] each.

    borders: bos and eos. short_fraction: share of rows that are cut to a random length from 2 on.
    """

    pieces: Pieces
    borders: tuple[int, int]
    short_fraction: float

    def next_sentence(self, rows: np.ndarray, partners: np.ndarray, random: RowRandom) -> Pairs:
        """Rows and partners: [B, L] int32, -1 is padding."""
        document = self._document(rows, random, "document").at_most(self._target(rows, random))
        first, follows = self._split(rows, document, document.edges(rows.shape[1]), random)
        other = self._document(partners, random, "other document")
        start = self._random_start(partners, other, follows.size, random)
        available = other.end - start
        usable = (available > 0) & (follows.size > 0)
        # As long either way: else the length would tell what the text should.
        size = np.where(usable, np.minimum(follows.size, available), follows.size)
        is_random = random.happens("label", 0.5) & usable
        start = np.where(is_random, start + rows.shape[1], follows.start)
        text = np.concatenate([rows, partners], axis=1)
        return Pairs(text, first, Spans(start, size), is_random.astype(np.int32), usable)

    def sentence_order(self, rows: np.ndarray, random: RowRandom) -> Pairs:
        """Rows: [B, L] int32, -1 is padding."""
        document = self._document(rows, random, "document").at_most(self._target(rows, random))
        edges = document.edges(rows.shape[1])
        edges[:, 0] = False  # the window begins and ends anywhere, as does what was cut short
        edges[:, :-1] &= ~self._is_text(rows) | (
            document.start[:, None] == np.arange(rows.shape[1])
        )
        edges[:, -1] = False
        before, after = self._split(rows, document, edges, random)
        usable = after.size > 0
        swapped = random.happens("label", 0.5) & usable
        first, second = after.where(swapped, before), before.where(swapped, after)
        return Pairs(rows, first, second, swapped.astype(np.int32), usable)

    def _is_text(self, rows: np.ndarray) -> np.ndarray:
        bos, eos = self.borders
        return (rows >= 0) & (rows != bos) & (rows != eos)

    def _target(self, rows: np.ndarray, random: RowRandom) -> np.ndarray:
        """[B]: the most tokens that A and B may have together."""
        short = 2 + random.below("length", max(rows.shape[1] - 1, 0))
        return np.where(random.happens("short", self.short_fraction), short, rows.shape[1])

    def _document(self, rows: np.ndarray, random: RowRandom, draw: str) -> Spans:
        """The document of a random token of each row, or as much as the row has of it."""
        is_text = self._is_text(rows)
        count = np.cumsum(is_text, axis=1, dtype=np.int32)
        token = random.below(draw, count[:, -1])
        place = _first(count > token[:, None])[:, None]
        columns = np.arange(rows.shape[1])
        start = np.max((~is_text & (columns < place)) * (columns + 1), axis=1)
        end = _first(~is_text & (columns > place))
        return Spans(start, np.where(count[:, -1] > 0, end - start, 0))

    def _split(
        self, rows: np.ndarray, document: Spans, edges: np.ndarray, random: RowRandom
    ) -> tuple[Spans, Spans]:
        """The document from its first cut to a random one, and from there to its last.

        edges: [B, L + 1] bool, cuts beside those between sentences. The second part is empty where a
        document cannot be cut in two.
        """
        cuts = self._cuts(rows, document, edges, enough=3)
        numbers = np.cumsum(cuts, axis=1, dtype=np.int32)
        count = numbers[:, -1]
        middle = 2 + random.below("split", np.maximum(count - 2, 0))
        start, split, end = (_first(numbers >= n[:, None]) for n in (count * 0 + 1, middle, count))
        whole = count < 3
        start = np.where(whole, document.start, start)
        split, end = (np.where(whole, document.end, column) for column in (split, end))
        return Spans(start, split - start), Spans(split, end - split)

    def _random_start(
        self, rows: np.ndarray, document: Spans, wanted: np.ndarray, random: RowRandom
    ) -> np.ndarray:
        """[B]: where a sentence starts that has `wanted` tokens to the document's end, or the first."""
        edges = document.edges(rows.shape[1])
        edges[:, 0] = False
        edges &= np.arange(edges.shape[1]) < document.end[:, None]
        cuts = self._cuts(rows, document, edges, enough=1)
        latest = np.maximum(_first(cuts), document.end - wanted)
        cuts &= np.arange(cuts.shape[1]) <= latest[:, None]
        numbers = np.cumsum(cuts, axis=1, dtype=np.int32)
        chosen = random.below("start", numbers[:, -1])
        return np.minimum(_first(numbers > chosen[:, None]), document.end)

    def _cuts(
        self, rows: np.ndarray, document: Spans, edges: np.ndarray, enough: int
    ) -> np.ndarray:
        """[B, L + 1] bool: edges, and where sentences meet; if these are not enough, words; or tokens."""
        columns = np.arange(rows.shape[1])
        inside = (columns >= document.start[:, None]) & (columns < document.end[:, None])
        cuts = edges.copy()
        cuts[:, :-1] |= inside & self.pieces.start_sentences(rows)
        poor = np.flatnonzero(cuts.sum(axis=1) < enough)
        if len(poor):
            cuts[poor, :-1] |= inside[poor] & ~self.pieces.continue_words(rows[poor])
            poor = poor[cuts[poor].sum(axis=1) < enough]
            cuts[poor, :-1] |= inside[poor]
        return cuts


def lay_out(
    pairs: Pairs, cls_id: int, sep_id: int, pad_id: int, length: int
) -> dict[str, np.ndarray]:
    """[CLS] A [SEP] B [SEP] and padding; a row without text is all padding.

    Returns:
      tokens, token_types, segment_ids, positions: [B, length] int32.
    """
    columns = np.arange(length, dtype=np.int32)
    first, second = pairs.first, pairs.second
    middle = (first.size + 1)[:, None].astype(np.int32)
    last = (first.size + second.size + 2)[:, None].astype(np.int32)
    to_second = (second.start - first.size - 2)[:, None].astype(np.int32)
    to_first = (first.start - 1)[:, None].astype(np.int32)
    is_second = columns > middle
    source = np.where(is_second, to_second, to_first) + columns
    width = pairs.text.shape[1]
    np.clip(source, 0, width - 1, out=source)
    source += np.arange(len(source), dtype=np.int32)[:, None] * width
    tokens = pairs.text.ravel().take(source)
    rows = np.arange(len(tokens))
    tokens[:, 0] = cls_id
    tokens[rows, middle[:, 0]] = sep_id
    tokens[rows, last[:, 0]] = sep_id
    real = (columns <= last) & (first.size > 0)[:, None]
    tokens[~real] = pad_id
    segment_ids = real.astype(np.int32)
    return {
        "tokens": tokens,
        "token_types": (is_second & real).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": columns * segment_ids,
    }


def _first(condition: np.ndarray) -> np.ndarray:
    """[B, N] bool to [B] int64: the first True column, N where there is none."""
    found = condition.argmax(axis=1)
    return np.where(condition[np.arange(len(condition)), found], found, condition.shape[1])
