"""Generated text on a terminal or in a pipe, as it comes.

Several prompts run as one batch, but a reader wants one text after the other: the first unfinished
row is shown live, the others wait their turn.
"""

import sys
from typing import TextIO

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from llm_jax.core.types import Tokenizer
from llm_jax.generate.events import Alternative, TokenEvent

PIECE_WIDTH = 14
ALTERNATIVE_WIDTH = 22


class Printer:
    """Prints events row by row; give it every event, in any order of rows.

    Args:
      prompts: shown before what follows them.
      tokenizer: shows pieces; None prints text, else one line of probabilities per token.
      max_length: the engine's, for the note on a row that reached it.
    """

    def __init__(
        self,
        prompts: list[str],
        tokenizer: Tokenizer | None,
        max_length: int,
        *,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ):
        self._prompts, self._tokenizer, self._max_length = prompts, tokenizer, max_length
        self._out, self._notes = out or sys.stdout, notes or sys.stderr
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._waiting: list[list[TokenEvent]] = [[] for _ in prompts]
        self._row = -1
        self._next_row()

    def __call__(self, event: TokenEvent) -> None:
        self._waiting[event.row].append(event)
        while self._row < len(self._prompts) and self._waiting[self._row]:
            for waiting in self._waiting[self._row]:
                self._show(waiting)
            stopped = self._waiting[self._row][-1].stop_reason is not None
            self._waiting[self._row].clear()
            if not stopped:
                break
            self._next_row()

    def _next_row(self) -> None:
        self._row += 1
        if self._row == len(self._prompts):
            return
        if len(self._prompts) > 1:
            line = f"== prompt {self._row + 1} of {len(self._prompts)} =="
            self._console.print(Text(line if self._row == 0 else "\n" + line, style="bold"))
        if self._tokenizer is None:
            self._write(self._prompts[self._row])
        else:
            self._console.print(Text(header(), style="bold"))

    def _show(self, event: TokenEvent) -> None:
        if self._tokenizer is None:
            self._write(event.text)
        else:
            self._console.print(probability_line(event, self._tokenizer))
        if event.stop_reason is not None:
            if self._tokenizer is None:
                self._write("\n")
            if event.stop_reason == "length_limit":
                print(
                    f"stopped at the model's max_length of {self._max_length} tokens",
                    file=self._notes,
                )

    def _write(self, text: str) -> None:
        """Past rich, which would wrap, and read square brackets as markup."""
        self._out.write(text)
        self._out.flush()


def header() -> str:
    return f"{'token':{PIECE_WIDTH}} {'prob':>6}   most probable"


def probability_line(event: TokenEvent, tokenizer: Tokenizer) -> Text:
    """`piece  0.123   best 0.456  second 0.234 ...` in columns, coloured by probability."""
    line = Text(no_wrap=True)
    probability = float(np.exp(event.log_probability))
    line.append(_column(tokenizer.id_to_piece(event.token), PIECE_WIDTH))
    line.append(f" {probability:6.4f}  ", style=colour(probability))
    for alternative in event.alternatives:
        line.append(" ")
        line.append_text(_alternative(alternative, tokenizer, alternative.token == event.token))
    line.rstrip()
    return line


def colour(probability: float) -> str:
    """Green for what the model was sure of, red for a surprise."""
    bounds = ((0.5, "green"), (0.2, "cyan"), (0.05, "yellow"), (0.0, "red"))
    return next(name for bound, name in bounds if probability >= bound)


def _alternative(alternative: Alternative, tokenizer: Tokenizer, chosen: bool) -> Text:
    probability = float(np.exp(alternative.log_probability))
    number = f"{probability:6.4f}"
    width = ALTERNATIVE_WIDTH - len(number) - 1
    text = Text(f"{_column(tokenizer.id_to_piece(alternative.token), width)} ")
    text.append(number, style=colour(probability))
    if chosen:
        text.stylize("underline")
    return text


def _column(piece: str, width: int) -> str:
    """A piece in exactly `width` cells: spaces made visible, an ellipsis where it was cut."""
    shown = piece.replace(" ", "␣")
    if cell_len(shown) > width:
        return set_cell_size(shown, width - 1) + "…"
    return set_cell_size(shown, width)
