"""README.zh-CN.md says in Chinese what README.md says: the same headings, commands, tables, links and figures."""

import re
from pathlib import Path

import pytest

ENGLISH, CHINESE = (
    Path(name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
)


def headings(text):
    return [len(marks) for marks in re.findall(r"^(#+) ", without_code(text), re.MULTILINE)]


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Lines of code blocks, each without its comment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [[re.sub(r"\s+# .*", "", line).rstrip() for line in b.splitlines()] for b in blocks]


def tables(text):
    """Rows and columns of each table."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[line.count(" |") for line in table.splitlines()] for table in found]


def links(text):
    """Targets, but for those of the two files to each other."""
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return [target for target in targets if not target.startswith("README")]


def figures(text):
    """Numbers with a point or of several digits, in the order they stand in each table row."""
    return [
        re.findall(r"\d[\d,]*\.\d+|\d{2,}", row)
        for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)
        if "](" not in row and "`" not in row
    ]


def in_line_code(text):
    return sorted(re.findall(r"`([^`\n]+)`", without_code(text)))


@pytest.mark.parametrize("part", [headings, commands, tables, links, figures, in_line_code])
def test_both_languages_say_the_same(part):
    assert part(CHINESE) == part(ENGLISH)
    assert len(part(ENGLISH)) > 3


def test_every_file_that_is_linked_is_there():
    for target in links(ENGLISH):
        assert Path(target.partition("#")[0]).exists(), target


def test_each_points_to_the_other():
    assert "](README.zh-CN.md)" in ENGLISH
    assert "](README.md)" in CHINESE


def test_the_chinese_one_is_in_chinese():
    prose = re.findall(r"[\u4e00-\u9fff]", without_code(CHINESE))
    assert len(prose) > 1500
