import gzip
import json
import sys
import types

import numpy as np
import pytest

from llm_jax.core.config import ConfigError, parse_component
from llm_jax.data.sources import open_source, source_for, source_key


def open_section(tmp_path, **section):
    return open_source(parse_component("data.sources", section, "source"), tmp_path / "cache")


def texts(source):
    return [source[i]["text"] for i in range(len(source))]


def names(source):
    return [source[i]["name"] for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    for name, text in {
        "b.txt": "second",
        "a.txt": "first",
        "deep/er/c.md": "third",
        "deep/skipped.bin": "no text",
        ".hidden/d.txt": "hidden",
        "deep/.e.txt": "hidden",
        "tests/e.txt": "a test",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_text_reads_files_in_sorted_order(tmp_path, folder):
    source = open_section(tmp_path, name="text", path=str(folder), exclude=("tests",))
    assert names(source) == ["a.txt", "b.txt", "deep/er/c.md"]
    assert texts(source) == ["first", "second", "third"]
    with pytest.raises(IndexError):
        source[3]


def test_text_takes_a_file_or_a_glob_whatever_its_suffix(tmp_path, folder):
    one = open_section(tmp_path, name="text", path=str(folder / "deep/skipped.bin"))
    many = open_section(tmp_path, name="text", path=str(folder / "**/*.bin"))
    assert texts(one) == texts(many) == ["no text"]
    assert names(many) == ["deep/skipped.bin"]


def test_text_of_a_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/a.txt": b"first", "/corpus/in/b.txt": b"second", "/corpus/c.bin": b"x"})
    assert texts(open_section(tmp_path, name="text", path="memory://corpus")) == ["first", "second"]
    assert source_for("memory://corpus/*.txt") == {"name": "text", "path": "memory://corpus/*.txt"}


def test_a_file_changed_is_another_source(tmp_path, folder):
    before = open_section(tmp_path, name="text", path=str(folder)).fingerprint
    (folder / "a.txt").write_text("first, longer")
    assert open_section(tmp_path, name="text", path=str(folder)).fingerprint != before


@pytest.mark.parametrize("line", ["word " * 9 + "\n", "x" * 5000 + "\n", "ä€😀" * 700])
def test_a_big_file_is_cut_and_nothing_is_lost(tmp_path, line):
    text = line * 60
    (tmp_path / "big.txt").write_text(text)
    source = open_section(
        tmp_path, name="text", path=str(tmp_path / "big.txt"), document_bytes=1000
    )
    pieces = texts(source)
    assert "".join(pieces) == text
    assert len(pieces) >= min(len(text.encode()) // 2100, 59)
    if line.endswith("\n"):
        assert all(piece.endswith("\n") for piece in pieces) or len(line) > 2000
    assert len(set(names(source))) == len(source)


def test_one_file_alone_gives_enough_documents(tmp_path):
    (tmp_path / "input.txt").write_text("a line of a play\n" * 70_000)
    source = open_section(tmp_path, name="text", path=str(tmp_path / "input.txt"))
    assert 100 < len(source) < 300


def test_the_standard_library_is_a_corpus(tmp_path):
    source = open_section(tmp_path, name="text", path="python:stdlib")
    assert "argparse.py" in source._files.names
    assert not any(
        "/test/" in f"/{name}" or "site-packages" in name for name in source._files.names
    )
    assert len(source) > 300


@pytest.mark.parametrize(
    ("policy", "text", "undecodable"), [("replace", "a\ufffd\ufffdb", 2), ("skip", "", 2)]
)
def test_bytes_that_are_no_text_are_counted(tmp_path, policy, text, undecodable):
    (tmp_path / "a.txt").write_bytes(b"a\xff\xfeb")
    source = open_section(tmp_path, name="text", path=str(tmp_path / "a.txt"), undecodable=policy)
    assert source[0] == {"text": text, "name": "a.txt", "undecodable": undecodable}


def test_bytes_that_are_no_text_can_be_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff\xfeb")
    source = open_section(tmp_path, name="text", path=str(tmp_path / "a.txt"), undecodable="error")
    with pytest.raises(ConfigError, match=r"a\.txt has 2 bytes"):
        source[0]


def test_python_files_may_declare_their_coding(tmp_path):
    raw = "# -*- coding: latin-1 -*-\nname = 'é'\n" * 200
    (tmp_path / "a.py").write_bytes(raw.encode("latin-1"))
    path = str(tmp_path / "a.py")
    pieces = open_section(tmp_path, name="text", path=path, document_bytes=1000)
    assert len(pieces) > 5
    assert "".join(texts(pieces)) == raw
    assert all("undecodable" not in pieces[i] for i in range(len(pieces)))


LINES = [
    json.dumps({"text": "first", "id": 1}),
    "",
    json.dumps({"text": "zweité 😀\nline"}),
    "{broken",
    json.dumps({"other": 1}),
    json.dumps({"text": "a lone \ud800"}),
    json.dumps({"text": "last"}),
]
LINE_TEXTS = ["first", "zweité 😀\nline", "", "", "a lone \ufffd", "last"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("last_newline", ["\n", "", "\r\n"])
def test_jsonl(tmp_path, kind, last_newline):
    raw = ("\n".join(LINES) + last_newline).encode()
    if kind.endswith("gz"):
        raw = gzip.compress(raw[:40]) + gzip.compress(raw[40:])
    if kind.endswith("zst"):
        zstandard = pytest.importorskip("zstandard")
        pack = zstandard.ZstdCompressor().compress
        raw = pack(raw[:40]) + pack(raw[40:])
    path = tmp_path / "corpus" / f"a.{kind}"
    path.parent.mkdir()
    path.write_bytes(raw)
    assert source_for(str(path)) == {"name": "jsonl", "path": str(path)}
    for _ in range(2):  # the second time from the cache
        source = open_section(tmp_path, name="jsonl", path=str(path.parent))
        assert texts(source) == LINE_TEXTS
        assert [source[i].get("malformed", False) for i in range(6)] == [0, 0, 1, 1, 0, 0]
        assert source[4]["undecodable"] == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_jsonl_lines_are_found_across_blocks(tmp_path, monkeypatch):
    from llm_jax.data.sources import jsonl

    expected = [f"text {'x' * (i * 7 % 50)}" for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in expected))
    for block in (1, 3, 64, 1000):
        monkeypatch.setattr(jsonl, "_CHUNK", block)
        cache = tmp_path / f"cache{block}"
        source = open_source(parse_component("data.sources", source_for(str(path)), ""), cache)
        assert texts(source) == expected


def test_jsonl_with_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(ConfigError, match=r"no key 'text'.*its keys: content"):
        open_section(tmp_path, name="jsonl", path=str(tmp_path / "a.jsonl"))
    source = open_section(
        tmp_path, name="jsonl", path=str(tmp_path / "a.jsonl"), text_key="content"
    )
    assert texts(source) == ["x"]


def test_jsonl_that_is_cut_off(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz cannot be read"):
        open_section(tmp_path, name="jsonl", path=str(tmp_path / "a.jsonl.gz"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    expected = [f"document {i} é" for i in range(25)]
    for number, part in enumerate(np.array_split(expected, 2)):
        table = pyarrow.table({"text": part.tolist(), "id": list(range(len(part)))})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    source = open_section(tmp_path, name="parquet", path=str(tmp_path))
    assert texts(source) == expected
    assert source.group_starts.tolist() == [0, 4, 8, 12, 13, 17, 21, 25]
    with pytest.raises(ConfigError, match=r"no column 'txt'; did you mean 'text'.*text, id"):
        open_section(tmp_path, name="parquet", path=str(tmp_path), text_key="txt")
    with pytest.raises(ConfigError, match="column 'id' is int64"):
        open_section(tmp_path, name="parquet", path=str(tmp_path), text_key="id")


def test_huggingface(tmp_path, monkeypatch):
    class Dataset(list):
        column_names = ("text", "label")

    def load_dataset(path, config_name, split, revision):
        assert (path, config_name, split, revision) == ("org/name", None, "train", None)
        return Dataset([{"text": "first"}, {"text": None}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = open_section(tmp_path, **source_for("hf:org/name"))
    assert texts(source) == ["first", ""]
    assert source[1]["malformed"]
    with pytest.raises(ConfigError, match=r"no column 'body'.*text, label"):
        open_section(tmp_path, name="hf", path="org/name", text_key="body")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"llm_jax\[hf\]"):
        open_section(tmp_path, name="hf", path="org/name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"llm_jax\[parquet\]"):
        open_section(tmp_path, name="parquet", path=str(tmp_path))


def test_source_for(folder):
    assert source_for("tfds:ag_news:1.0.0") == {"name": "tfds", "path": "ag_news:1.0.0"}
    assert source_for("hf:org/name") == {"name": "hf", "path": "org/name"}
    assert source_for("python:stdlib") == {"name": "text", "path": "python:stdlib"}
    assert source_for(str(folder)) == {"name": "text", "path": str(folder)}
    (folder / "x.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"several kinds of files \(1 jsonl, .* text\)"):
        source_for(str(folder))
    assert source_for(str(folder / "*.jsonl"))["name"] == "jsonl"


def test_a_readme_beside_records_is_no_document(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}')
    assert source_for(str(tmp_path))["name"] == "jsonl"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no file or folder at '.*nowhere'"),
        ("none-*.txt", "no file at"),
        ("empty", "no file at"),
        ("binary", "none of its 1 files ends in"),
        ("blank.txt", "are empty"),
    ],
)
def test_paths_that_hold_nothing(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/a.bin").write_text("x")
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        open_section(tmp_path, name="text", path=str(tmp_path / path))
    assert "\n" not in str(caught.value)


def test_a_key_names_the_source_and_its_settings():
    def key(**section):
        return source_key(parse_component("data.sources", {"name": "text", **section}, ""))

    assert key(path="a/My corpus").startswith("My-corpus-")
    assert key(path="a", weight=2.0) == key(path="a")
    assert len({key(path="a"), key(path="b"), key(path="a", exclude=("x",))}) == 3
