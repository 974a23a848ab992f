"""What generation tells its caller: one event per token, and the whole of a row at its end.

Text comes as it becomes decodable: a token may end inside a UTF-8 character, so a row holds back
those bytes until the rest of the character arrives. It also holds back what may be the beginning of a
stop string. The texts of a row's events, joined, are the completion's text to the letter.
"""

import codecs
import dataclasses
from typing import Literal

from llm_jax.core.types import Tokenizer

StopReason = Literal["eos", "stop", "max_tokens", "length_limit"]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A token that could have come, and its log probability under the model."""

    token: int
    log_probability: float


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One new token.

    row: which prompt or request; index: 0 for the first new token of the row.
    text: what this token adds to the row's text, "" while a character is incomplete.
    log_probability: under the model itself, before temperature, top-k and top-p.
    alternatives: the most probable tokens at this place, best first, if asked for.
    stop_reason: set on the row's last token.
    prompt_log_probabilities: on the first token, if asked for: of the prompt's tokens, all but the first.
    """

    row: int
    index: int
    token: int
    text: str
    log_probability: float
    alternatives: tuple[Alternative, ...] = ()
    stop_reason: StopReason | None = None
    prompt_log_probabilities: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    prompt_tokens: as the model saw them, with bos.
    tokens, log_probabilities: the new ones; an eos that ended the row is the last.
    text: of the new tokens alone, without the stop string that ended it; bytes that are no UTF-8
      become U+FFFD.
    stop_reason: "length_limit" says that prompt and text filled the model's max_length.
    alternatives: one tuple per token, empty unless asked for.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    text: str
    stop_reason: StopReason
    alternatives: tuple[tuple[Alternative, ...], ...] = ()


class RowStream:
    """Turns the tokens of one row into events, and knows when the row stops.

    Args:
      max_tokens: asked for.
      room: tokens that still fit in the model after the prompt.
      stops: the row ends before the first of these.
    """

    def __init__(
        self,
        row: int,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        room: int,
        stops: tuple[str, ...] = (),
    ):
        self.row, self.limit, self._tokenizer = row, min(max_tokens, room), tokenizer
        self._limit_reason: StopReason = "max_tokens" if max_tokens <= room else "length_limit"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._count, self._stops, self._held = 0, stops, ""
        self.stopped = False

    def event(
        self, token: int, log_probability: float, alternatives: tuple[Alternative, ...]
    ) -> TokenEvent:
        index, self._count = self._count, self._count + 1
        ends = token == self._tokenizer.eos_id
        reason = "eos" if ends else self._limit_reason if self._count == self.limit else None
        new_bytes = b"" if ends else self._tokenizer.decode_bytes([token])
        text = self._held + self._decoder.decode(new_bytes, final=reason is not None)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            text, self._held, reason = text[: min(places)], "", "stop"
        else:
            held = 0 if reason else self._may_be_a_stop(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.stopped = reason is not None
        return TokenEvent(self.row, index, token, text, log_probability, alternatives, reason)

    def _may_be_a_stop(self, text: str) -> int:
        """How many characters at the end of `text` begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self._stops)), 0)


def completion(prompt_tokens: list[int], events: list[TokenEvent]) -> Completion:
    """All events of one row as one value."""
    return Completion(
        tuple(prompt_tokens),
        tuple(event.token for event in events),
        tuple(event.log_probability for event in events),
        "".join(event.text for event in events),
        events[-1].stop_reason,
        tuple(event.alternatives for event in events) if events[0].alternatives else (),
    )
