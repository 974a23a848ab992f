"""Prompts as padded batches, on the host."""

import numpy as np


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def left_padded(rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """All tokens but the last of each row, as a batch [B, length]; padding has segment 0."""
    shape = (len(rows), length)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "positions", "segment_ids")}
    for index, row in enumerate(rows):
        size = len(row) - 1
        place = (index, slice(length - size, length))
        batch["tokens"][place] = row[:-1]
        batch["positions"][place] = np.arange(size)
        batch["segment_ids"][place] = 1
    return batch


def right_padded(rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """Rows for an encoder, [B, length]; padding has segment 0."""
    batch = {key: np.zeros((len(rows), length), np.int32) for key in ("tokens", "segment_ids")}
    for index, row in enumerate(rows):
        batch["tokens"][index, : len(row)] = row
        batch["segment_ids"][index, : len(row)] = 1
    return {f"encoder_{key}": array for key, array in batch.items()}
