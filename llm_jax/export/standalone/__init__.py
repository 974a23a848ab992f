"""Files that an export carries and that need no llm_jax: composed from the templates beside this one.

A template is Python with all alternatives beside each other, and lines that begin with `#:`; tests lint and
format what is composed of it:

    #: begin          the file begins behind this line
    #: if EXPRESSION  ... #: elif EXPRESSION ... #: else ... #: end
    #: include NAME   another template, here

Expressions are Python over the values given to `compose`, by name. `given.NAME` and `given_NAME` in the
text become that value's str: the second where Python wants a name.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_DIRECTIVE = re.compile(r" *#: (begin|if|elif|else|end|include)\b *(.*)")
_GIVEN = re.compile(r"\bgiven[._](\w+)")


def compose(template: str, given: Mapping[str, Any]) -> str:
    """The text of a template, with what these values choose.

    Raises:
      KeyError, NameError: the template asks for a value that is not given.
    """
    text = "\n".join(_chosen(template, dict(given))) + "\n"
    return _GIVEN.sub(lambda match: str(given[match[1]]), re.sub(r"\n{4,}", "\n\n\n", text))


def _chosen(template: str, given: dict[str, Any]) -> Iterator[str]:
    lines = (Path(__file__).parent / f"{template}.py").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line == "#: begin") + 1
    # Of each `if` around a line: whether this branch is taken, and whether one was taken before.
    open_ifs: list[tuple[bool, bool]] = []
    for line in lines[start:]:
        match = _DIRECTIVE.fullmatch(line)
        kept = all(taken for taken, _ in open_ifs)
        if match is None:
            if kept:
                yield line
            continue
        word, rest = match.groups()
        if word == "include" and kept:
            yield from _chosen(rest, given)
        elif word == "if":
            holds = kept and bool(eval(rest, {}, given))
            open_ifs.append((holds, holds))
        elif word in ("elif", "else"):
            _, done = open_ifs.pop()
            around = all(taken for taken, _ in open_ifs)
            holds = around and not done and (word == "else" or bool(eval(rest, {}, given)))
            open_ifs.append((holds, done or holds))
        elif word == "end":
            open_ifs.pop()
