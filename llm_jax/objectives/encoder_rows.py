"""Records as a bidirectional encoder reads them: [CLS] text [SEP], or [CLS] first [SEP] second [SEP].

The tokenizer's bos is [CLS], its eos is [SEP] (Devlin et al. 2018, section 3). RoBERTa puts two [SEP]
between the texts of a pair and tells them apart by these alone (Liu et al. 2019).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.packing import RowLayout
from llm_jax.core.types import Tokenizer

PairStyle = Literal["bert", "roberta"]
_SEPARATORS = {"bert": 1, "roberta": 2}


@dataclasses.dataclass(frozen=True)
class EncoderRow:
    """tokens, token_types: of one row, without padding. first, second: where its texts start."""

    tokens: list[int]
    token_types: list[int]
    first: int = 1
    second: int | None = None

    @classmethod
    def of_text(cls, ids: Sequence[int], tokenizer: Tokenizer) -> "EncoderRow":
        tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        return cls(tokens, [0] * len(tokens))

    @classmethod
    def of_pair(
        cls, first: Sequence[int], second: Sequence[int], tokenizer: Tokenizer, style: PairStyle
    ) -> "EncoderRow":
        separators = [tokenizer.eos_id] * _SEPARATORS[style]
        start = [tokenizer.bos_id, *first, *separators]
        end = [*second, tokenizer.eos_id]
        second_type = 1 if style == "bert" else 0
        types = [0] * len(start) + [second_type] * len(end)
        return cls(start + end, types, second=len(start))


NO_ROW = EncoderRow([], [])  # padding


def num_special(style: PairStyle | None) -> int:
    """Tokens of a row besides its texts; None: a single text."""
    return 2 if style is None else 2 + _SEPARATORS[style]


def longest_first(first: list, second: list, room: int) -> tuple[list, list]:
    """Both texts, cut at their ends until they fit: the longer one first, then both in turn."""
    over = max(len(first) + len(second) - room, 0)
    longer = max(len(first), len(second)) - min(len(first), len(second))
    either, both = min(over, longer), max(over - longer, 0)
    from_first, from_second = both // 2, both - both // 2
    if len(first) > len(second):
        from_first += either
    else:
        from_second += either
    return first[: len(first) - from_first], second[: len(second) - from_second]


def encoder_batch(
    rows: Sequence[EncoderRow], layout: RowLayout, pad_id: int
) -> dict[str, np.ndarray]:
    """tokens, token_types, segment_ids, positions: [B, T] int32."""
    return {
        "tokens": layout.filled([row.tokens for row in rows], pad_id),
        "token_types": layout.filled([row.token_types for row in rows], 0),
        "segment_ids": layout.segment_ids,
        "positions": layout.positions,
    }


def encoder_spec(batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of `encoder_batch`."""
    shape = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    return dict.fromkeys(("tokens", "token_types", "segment_ids", "positions"), shape)
