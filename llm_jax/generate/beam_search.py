"""Beam search over prompts of a model: its caches, and what was found as text."""

from collections.abc import Sequence

import jax
import numpy as np

from llm_jax.core.types import Tokenizer
from llm_jax.generate.beam import NOTHING, BeamConfig, Beams, Hypothesis
from llm_jax.generate.prefill import SMALLEST_CHUNK
from llm_jax.generate.programs import Programs
from llm_jax.generate.prompts import left_padded, power_of_two, right_padded

_SMALLEST_CACHE = 256  # places


class BeamSearch:
    """max_length: most tokens that an encoder reads."""

    def __init__(self, programs: Programs, tokenizer: Tokenizer, max_length: int):
        self._programs, self._tokenizer, self._max_length = programs, tokenizer, max_length

    def search(self, rows: Sequence[list[int]], config: BeamConfig) -> list[list[Hypothesis]]:
        """The best continuations of each prompt of ids, best first; all prompts in one batch."""
        finished, running = jax.device_get(self._found(list(rows), config))
        found = []
        for row in range(len(rows)):
            # Where nothing ended, what is still running is the answer.
            beams = finished if finished.scores[row, 0] > NOTHING else running
            found.append(self._hypotheses(beams.tokens[row], beams.scores[row]))
        return found

    def _found(self, rows: list[list[int]], config: BeamConfig) -> tuple[Beams, Beams]:
        """(finished, still running), of prompts in a cache of their own, padded on the left."""
        programs = self._programs
        batch = power_of_two(len(rows))
        rows = rows + [rows[0][:1]] * (batch - len(rows))
        longest = power_of_two(max(SMALLEST_CHUNK, *map(len, rows)))
        used = 0 if programs.has_encoder else longest
        size = power_of_two(max(used + config.max_tokens, _SMALLEST_CACHE))
        if programs.has_encoder:
            encoded = right_padded(rows, min(longest, self._max_length))
            cache = programs.encode(encoded, size)
            rows = [[self._tokenizer.pad_id]] * batch
        else:
            cache = programs.empty_cache(batch, size)
            cache, _ = programs.fill(cache, left_padded(rows, used))
        tokens = np.array([row[-1:] for row in rows], np.int32)
        positions = np.array([[len(row) - 1] for row in rows], np.int32)
        ids = (self._tokenizer.eos_id, self._tokenizer.pad_id)
        return programs.search(cache, tokens, positions, config, *ids)

    def _hypotheses(self, tokens: np.ndarray, scores: np.ndarray) -> list[Hypothesis]:
        eos = self._tokenizer.eos_id
        result = []
        for ids, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            if score > NOTHING:
                ids = ids[: ids.index(eos) + 1] if eos in ids else ids
                text = self._tokenizer.decode([i for i in ids if i != eos])
                result.append(Hypothesis(tuple(ids), text, score))
        return result
