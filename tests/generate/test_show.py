"""What a reader sees: rows one after the other, columns that line up, prompts from files."""

import io

import numpy as np
import pytest
from rich.cells import cell_len

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers.raw_bytes import RawBytesTokenizer
from llm_jax.generate.__main__ import read_prompts
from llm_jax.generate.events import Alternative, TokenEvent
from llm_jax.generate.show import Printer, colour


def event(row: int, index: int, text: str, stop=None, alternatives=()) -> TokenEvent:
    return TokenEvent(row, index, ord(text[0]), text, np.log(0.25), alternatives, stop)


def test_rows_are_shown_one_after_the_other():
    out, notes = io.StringIO(), io.StringIO()
    printer = Printer(["one [b]", "two"], None, 64, out=out, notes=notes)
    printer(event(0, 0, "a"))
    printer(event(1, 0, "x"))
    assert out.getvalue().endswith("one [b]a")  # live, and brackets are text
    printer(event(1, 1, "y", "length_limit"))
    printer(event(0, 1, "b", "max_tokens"))
    want = "== prompt 1 of 2 ==\none [b]ab\n\n== prompt 2 of 2 ==\ntwoxy\n"
    assert out.getvalue() == want
    assert "max_length of 64" in notes.getvalue()


def test_columns_line_up():
    class Wide(RawBytesTokenizer):
        def id_to_piece(self, token_id: int) -> str:
            return {97: " ", 98: "日本", 99: "x" * 40}[token_id]

    out = io.StringIO()
    printer = Printer([""], Wide(), 64, out=out)
    alternatives = tuple(Alternative(token, np.log(0.125)) for token in (97, 98, 99, 97, 98))
    for index, text in enumerate("abc"):
        stop = "max_tokens" if index == 2 else None
        printer(event(0, index, text, stop, alternatives))
    head, *lines = out.getvalue().splitlines()
    assert head.split() == ["token", "prob", "most", "probable"]
    assert len({cell_len(line) for line in lines}) == 1
    assert all(line.count("0.2500") == 1 and line.count("0.1250") == 5 for line in lines)
    assert lines[0].startswith("␣ ")
    assert len({cell_len(line[: line.index("0.2500")]) for line in lines}) == 1


def test_colour_covers_all_probabilities():
    assert [colour(p) for p in (1.0, 0.3, 0.1, 0.0)] == ["green", "cyan", "yellow", "red"]


def test_prompts_of_flags_and_files(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n", encoding="utf-8")
    assert read_prompts(["first"], [file]) == ["first", "two\nlines\n"]
    assert read_prompts([], []) == [""]
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_prompts([], [file])
