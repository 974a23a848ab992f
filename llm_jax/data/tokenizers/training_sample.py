"""An even, bounded sample of a stream of documents, for training a tokenizer.

One pass, no length known before: documents are cut into chunks of a few kilobytes, every stride-th
chunk is kept, and whenever the kept ones outgrow the limit every second of them is dropped and the
stride doubles. So the sample always spans all that was read, and depends on nothing but the texts.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from llm_jax.data.tokenizers.pieces import META_SPACE

CHUNK_CHARACTERS = 4000


def sample_chunks(
    texts: Iterable[str],
    *,
    max_bytes: int,
    scan_bytes: int,
    seed: int = 0,
    reserved: Sequence[str] = (),
) -> list[bytes]:
    """UTF-8 chunks of 1/2 to 1 times `max_bytes` together, or all there is if that is less.

    Args:
      scan_bytes: stop reading the texts here.
      seed: which of the evenly spaced chunks.
      reserved: texts that are cut out, so that no piece is learnt from them.

    Raises:
      ValueError: a text holds a lone surrogate.
    """
    phase = random.Random(seed).getrandbits(62)
    kept: list[tuple[int, bytes]] = []
    size = scanned = 0
    stride = 1
    # U+2581 would be learnt as a space, and is encoded as bytes.
    border = re.compile("|".join(map(re.escape, (META_SPACE, *reserved))))
    for index, chunk in enumerate(_chunks(texts, border)):
        scanned += len(chunk)
        if scanned > scan_bytes:
            break
        if (index - phase) % stride:
            continue
        data = chunk.encode("utf-8")
        kept.append((index, data))
        size += len(data)
        while size > max_bytes and len(kept) > 1:
            stride *= 2
            kept = [(i, data) for i, data in kept if (i - phase) % stride == 0]
            size = sum(len(data) for _, data in kept)
    return [data for _, data in kept]


def _chunks(texts: Iterable[str], border: re.Pattern) -> Iterator[str]:
    """Cuts before a newline, because the trainer strips newlines from the end of a sentence."""
    for text in texts:
        for part in border.split(text):
            start = 0
            while start < len(part):
                end = start + CHUNK_CHARACTERS
                if end < len(part):
                    newline = part.rfind("\n", start + 1, end)
                    end = newline if newline > 0 else end
                yield part[start:end]
                start = end
