"""What the page asks about the inside of the model, as JSON: probabilities, attention, the logit lens.

Runs in one thread of its own beside the engine, so that a look inside never stops a text on its way.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Model
from llm_jax.interpret.attention_maps import attention_map
from llm_jax.interpret.logit_lens import logit_lens
from llm_jax.interpret.token_probabilities import TokenProbabilities, token_probabilities
from llm_jax.serve.errors import ApiError
from llm_jax.serve.requests import MAX_LOGPROBS
from llm_jax.serve.vocabulary import Vocabulary

MAX_WAITING = 16
LENS_BEST = 5
_PARTS = 1000  # attention comes in thousandths: short, and as exact as a colour can show


class Insight:
    """Questions about one model. Each raises ApiError for tokens that the model cannot take."""

    def __init__(self, model: Model, vocabulary: Vocabulary):
        self._model, self._vocabulary = model, vocabulary
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="insight")
        self._waiting = 0

    def warm(self, token: int) -> None:
        """Compiles, in the background, what questions about a short text need."""
        size = self._vocabulary.size
        for question in (
            lambda: token_probabilities(
                self._model, [token] * 2, vocab_size=size, num_best=MAX_LOGPROBS
            ),
            lambda: attention_map(self._model, [token] * 2),
            lambda: logit_lens(
                self._model, [token] * 2, token, vocab_size=size, num_best=LENS_BEST
            ),
        ):
            self._executor.submit(question)

    async def probabilities(self, tokens: list[int], num_best: int) -> TokenProbabilities:
        """The best beyond `num_best` are cut off, not left uncomputed: one program for all."""
        size = self._vocabulary.size
        found = await self._ask(
            lambda: token_probabilities(self._model, tokens, vocab_size=size, num_best=MAX_LOGPROBS)
        )
        return dataclasses.replace(
            found,
            best_tokens=found.best_tokens[:, :num_best],
            best_log_probabilities=found.best_log_probabilities[:, :num_best],
        )

    async def scores(self, tokens: list[int], num_best: int) -> bytes:
        """{"tokens": [{"log", "top"}]} of all tokens but the first."""
        found = await self.probabilities(tokens, num_best)
        rows = [
            f'{{"log":{number(log)},"top":{self.alternatives(zip(ids, logs, strict=True))}}}'
            for log, ids, logs in zip(
                found.log_probabilities.tolist(),
                found.best_tokens.tolist(),
                found.best_log_probabilities.tolist(),
                strict=True,
            )
        ]
        return f'{{"tokens":[{",".join(rows)}]}}'.encode("ascii")

    async def attention(self, tokens: list[int]) -> bytes:
        """{"weights": [layer][head][token]} from the last token, in thousandths."""

        def look() -> bytes:
            weights = np.rint(attention_map(self._model, tokens) * _PARTS).astype(np.int32)
            return json.dumps({"weights": weights.tolist()}, separators=(",", ":")).encode("ascii")

        return await self._ask(look)

    async def lens(self, tokens: list[int], target: int) -> bytes:
        """{"layers": [{"top", "log", "rank"}]}: what each would say after `tokens`, and of the target."""

        def look() -> bytes:
            lens = logit_lens(
                self._model, tokens, target, vocab_size=self._vocabulary.size, num_best=LENS_BEST
            )
            rows = [
                f'{{"top":{self.alternatives(zip(ids, logs, strict=True))},'
                f'"log":{number(log)},"rank":{rank}}}'
                for ids, logs, log, rank in zip(
                    lens.tokens.tolist(),
                    lens.log_probabilities.tolist(),
                    lens.target_log_probabilities.tolist(),
                    lens.target_ranks.tolist(),
                    strict=True,
                )
            ]
            return f'{{"layers":[{",".join(rows)}]}}'.encode("ascii")

        return await self._ask(look)

    def alternatives(self, pairs) -> str:
        """[[id, piece, log probability], ...] as JSON."""
        piece = self._vocabulary.piece
        return "[" + ",".join(f"[{i},{piece(i)},{number(log)}]" for i, log in pairs) + "]"

    async def _ask(self, question: Callable):
        if self._waiting >= MAX_WAITING:
            raise ApiError(429, "too many questions at once: try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, question)
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def number(log_probability: float) -> str:
    """As JSON, which has neither infinity nor NaN."""
    return f"{log_probability:.6f}" if log_probability > -9999.0 else "-9999.0"
