"""Which documents are held out of training: those whose text hashes below a threshold.

The rule reads nothing but the text, so it does not depend on order, file names, other documents or
the number of processes, equal documents are never on both sides, and a lower threshold holds out a
subset of what a higher one does.
"""

import hashlib

from llm_jax.core.config import ConfigError

_SPACE = 1 << 64
_SHARE_MAX = 0.25


def held_out_threshold(
    documents: int, fraction: float, at_least: int = 8, at_most: int | None = None
) -> int:
    """The hash below which a document is held out, for a source of `documents` documents.

    `fraction` of the documents are expected below it. It is raised for a small source so that about
    `at_least` are, never over a quarter of it, and lowered so that about `at_most` are. Fraction 0
    holds nothing out.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.held_out_fraction = {fraction}: expected 0 <= fraction < 1")
    if fraction == 0 or not documents:
        return 0
    share = max(fraction, min(at_least / documents, _SHARE_MAX))
    if at_most is not None:
        share = min(share, at_most / documents)
    return int(share * _SPACE)


def is_held_out(text: bytes, threshold: int) -> bool:
    """`text` is the document in UTF-8."""
    if not threshold:
        return False
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < threshold
