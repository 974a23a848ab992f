import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import NextToken, data_config, make_texts, write_jsonl

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.flags import run_entry
from llm_jax.data import prepare as prepare_module
from llm_jax.data.config import resolve_data
from llm_jax.data.documents import tokenize_documents
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import prepare
from llm_jax.data.sources import open_source
from llm_jax.data.split import is_held_out
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.prepare import main


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus" / "a.jsonl", make_texts(300))


def documents_of(index, split, tokenizer):
    """The texts in the shards of a split, in order."""
    texts = []
    for shard in index.shards[split]:
        tokens = np.load(index.folder / shard.file, allow_pickle=False)
        assert tokens.dtype == np.uint16
        assert len(tokens) == shard.tokens
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        assert len(starts) == shard.documents
        for document in np.split(tokens, starts[1:]):
            assert (document[0], document[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(document[1:-1].tolist()))
    return texts


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_document_is_in_one_split_once(tmp_path, corpus):
    prepared = prepare(data_config(corpus, held_out_fraction=0.1), tmp_path)
    (index,) = prepared.indices
    train, held_out = (documents_of(index, s, prepared.tokenizer) for s in ("train", "held_out"))
    assert Counter(train + held_out) == Counter(make_texts(300))
    threshold = index.plan.held_out_threshold
    assert 10 < len(held_out) < 60
    assert all(is_held_out(text.encode(), threshold) for text in held_out)
    assert not any(is_held_out(text.encode(), threshold) for text in train)
    assert index.text_bytes("train") == sum(len(text.encode()) for text in train)


def test_documents_are_shuffled(tmp_path, corpus):
    prepared = prepare(data_config(corpus), tmp_path)
    train = documents_of(prepared.indices[0], "train", prepared.tokenizer)
    numbers = [int(text.split(":")[0].split()[1]) for text in train]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.3
    assert np.abs(np.diff(numbers)).mean() > 50


@pytest.mark.parametrize("mode", ["shards", "stream"])
def test_row_groups_are_read_one_after_the_other(tmp_path, monkeypatch, mode):
    pyarrow, parquet = (pytest.importorskip(n) for n in ("pyarrow", "pyarrow.parquet"))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": make_texts(300)}), path, row_group_size=20)
    reads = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, group, columns: reads.append(group) or real(self, group, columns),
    )
    data = resolve_data(
        {
            "sources": [{"name": "parquet", "path": str(path)}],
            "tokenizer": {"name": "raw_bytes"},
            "mode": mode,
            "num_workers": 1,
            "num_threads": 0,
        }
    )
    prepared = prepare(data, tmp_path)
    if mode == "shards":
        (index,) = prepared.indices
        train = documents_of(index, "train", prepared.tokenizer)
        held_out = documents_of(index, "held_out", prepared.tokenizer)
        assert Counter(train + held_out) == Counter(make_texts(300))
        assert len(reads) < 45  # 15 to measure, 15 to tokenize, one more where shards share a group
    else:
        arguments = {"tokenizer": prepared.tokenizer, "objective": NextToken(), "batch_size": 2}
        loader = make_loader(data, workdir=tmp_path, **arguments)
        while min(loader.epochs().values()) < 1:
            next(loader)
        assert len(reads) < 45


def test_held_out_documents_can_be_looked_up(tmp_path, corpus):
    data = data_config(corpus, held_out_fraction=0.1)
    prepared = prepare(data, tmp_path)
    (index,) = prepared.indices
    source = open_source(data.sources[0], prepared.folder / "cache")
    entries = list(index.held_out_documents())
    texts = [source[entry["index"]]["text"] for entry in entries]
    assert texts == documents_of(index, "held_out", prepared.tokenizer)
    assert [entry["text_bytes"] for entry in entries] == [len(text.encode()) for text in texts]
    assert sum(entry["tokens"] for entry in entries) == index.tokens("held_out")
    assert entries[0]["name"] == f"a.jsonl:{entries[0]['index'] + 1}"


def test_a_second_run_tokenizes_nothing(tmp_path, corpus, monkeypatch):
    data = data_config(corpus)
    first = prepare(data, tmp_path)
    monkeypatch.setattr(prepare_module, "write_shard", None)
    monkeypatch.setattr(prepare_module, "make_tokenizer", None)
    assert prepare(data, tmp_path).indices == first.indices


SLOW_PREPARE = """
import sys, time
from pathlib import Path
from llm_jax.data import shards
from llm_jax.data.config import resolve_data
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import prepare

fast = shards.tokenize_documents
def slow(*arguments):
    time.sleep(0.15)
    return fast(*arguments)
shards.tokenize_documents = slow  # in the worker processes too: they import this file

if __name__ == "__main__":
    import json
    prepare(resolve_data(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_killed_and_run_again_by_other_workers_the_bytes_are_the_same(tmp_path, corpus):
    data = data_config(corpus)
    prepare(data, tmp_path / "whole")
    script = tmp_path / "slow_prepare.py"
    script.write_text(SLOW_PREPARE)
    killed = dataclasses.replace(data, num_workers=2)
    command = [sys.executable, str(script), json.dumps(to_dict(killed)), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    folder = tmp_path / "killed" / "data"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/parts/*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads(next(folder.glob("*/index.json")).read_text())["complete"]
    done = {p: p.stat().st_mtime_ns for p in folder.glob("*/parts/*.json")}
    shards = {p: p.stat().st_mtime_ns for p in folder.glob("*/train/*.npy") if _part_of(p) in done}
    while time.monotonic() < deadline and list(folder.rglob(".*.tmp")):  # the workers notice, too
        time.sleep(0.05)
        prepare_module.remove_leftovers(folder)
    prepare(data, tmp_path / "killed")
    assert digests(folder) == digests(tmp_path / "whole" / "data")
    assert all(p.stat().st_mtime_ns == changed for p, changed in shards.items())


def _part_of(shard: Path) -> Path:
    return shard.parents[1] / "parts" / f"{shard.stem.split('-')[1]}.json"


def test_texts_for_the_tokenizer_are_shuffled_and_hold_out_nothing_held_out(tmp_path, monkeypatch):
    seen = []

    def make_tokenizer(config, texts, progress):
        seen.extend(texts())
        return load_tokenizer(prepare(data_config(small), tmp_path / "other").folder / "tokenizer")

    small = write_jsonl(tmp_path / "small.jsonl", ["x"])
    first, second = make_texts(300), make_texts(40, "other")
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", t) for n, t in (("a", first), ("b", second))]
    real = prepare_module.make_tokenizer
    data = data_config(*paths, held_out_fraction=0.1, mode="stream")
    prepare(data_config(small), tmp_path / "other")
    monkeypatch.setattr(prepare_module, "make_tokenizer", make_tokenizer)
    assert prepare(data, tmp_path / "run").indices == ()
    monkeypatch.setattr(prepare_module, "make_tokenizer", real)
    sharded = prepare(dataclasses.replace(data, mode="shards"), tmp_path / "sharded")
    train = [t for i in sharded.indices for t in documents_of(i, "train", sharded.tokenizer)]
    assert Counter(seen) == Counter(train)
    # Equal weights: the small source is used up while the large one still goes on.
    assert max(i for i, text in enumerate(seen) if text.startswith("other")) < 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle_seed": 1}, "shuffle_seed = 0, now it is 1"),
        ({"held_out_fraction": 0.2}, "held_out_threshold"),
        (
            {"tokenizer": {"name": "sentencepiece"}},
            "tokenizer was made with name = raw_bytes, now it is sentencepiece",
        ),
        ({}, r"documents = 300, now it is 301"),
    ],
)
def test_what_changed_since_is_said_in_one_line(tmp_path, corpus, settings, message):
    prepare(data_config(corpus), tmp_path)
    if not settings:
        write_jsonl(Path(corpus), make_texts(301))
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(data_config(corpus, **settings), tmp_path)
    assert "\n" not in str(caught.value)
    assert "data.shards_path" in str(caught.value)


def test_a_tokenizer_made_before_a_setting_was_there_is_used(tmp_path, corpus):
    before = prepare(data_config(corpus), tmp_path)
    asked = before.folder / "tokenizer" / "request.json"
    asked.write_text('{"name": "raw_bytes", "vocab_size": 259}')
    assert prepare(data_config(corpus), tmp_path).indices == before.indices
    extra = {"name": "raw_bytes", "extra_tokens": ("[MASK]",)}
    with pytest.raises(ConfigError, match=r"extra_tokens = \[\], now it is \['\[MASK\]'\]"):
        prepare(data_config(corpus, tokenizer=extra), tmp_path)


def test_finished_shards_outlive_their_corpus(tmp_path, corpus):
    data = data_config(corpus)
    before = prepare(data, tmp_path)
    Path(corpus).unlink()
    assert prepare(data, tmp_path).indices == before.indices
    with pytest.raises(ConfigError, match="no file or folder"):
        prepare(data, tmp_path / "elsewhere")


def test_a_shard_that_was_cut_off_is_found(tmp_path, corpus):
    data = data_config(corpus)
    (index,) = prepare(data, tmp_path).indices
    path = index.folder / index.shards["train"][0].file
    os.truncate(path, 200)
    with pytest.raises(ConfigError, match=r"shard-00000\.npy is 200 bytes long"):
        prepare(data, tmp_path)


def test_trouble_is_counted_and_reported(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_bytes(b"" if number == 7 else b"text %d" % number)
    (folder / "bad.txt").write_bytes(b"a\xff\xffb")
    data = resolve_data(
        {"sources": [{"name": "text", "path": str(folder)}], "tokenizer": {"name": "raw_bytes"}}
    )
    prepared = prepare(data, tmp_path)
    assert prepared.indices[0].counts == {
        "documents": 41,
        "empty": 1,
        "malformed": 0,
        "undecodable_documents": 1,
        "undecodable_bytes": 2,
    }
    assert any("1 documents had 2 bytes that are no UTF-8" in line for line in prepared.lines())


def test_too_many_malformed_lines_are_an_error(tmp_path, corpus):
    with open(corpus, "a") as file:
        file.write("{broken\n" * 10)
    data = data_config(corpus)
    with pytest.raises(ConfigError, match=r"a\.jsonl': \d+ of \d+ records .* 0\.01 of its 310"):
        prepare(data, tmp_path)
    allowed = dataclasses.replace(data, malformed_fraction_max=0.1)
    assert prepare(allowed, tmp_path).indices[0].counts["malformed"] == 10


class FakeTokenizer:
    """Characters as ids."""

    vocab_size = 70_000

    def __init__(self, bos_id, eos_id):
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode_batch(self, texts):
        return [list(map(ord, text)) for text in texts]


def test_a_border_that_is_both_stands_once():
    a, empty = tokenize_documents(FakeTokenizer(1, 1), ["ab", ""])
    assert (a.tolist(), empty.tolist()) == ([1, 97, 98], [1])
    assert a.dtype == np.uint32
    (a,) = tokenize_documents(FakeTokenizer(1, 2), ["ab"])
    assert a.tolist() == [1, 97, 98, 2]


def test_a_tokenizer_that_yields_its_own_border_is_refused():
    with pytest.raises(ValueError, match="border token 97"):
        tokenize_documents(FakeTokenizer(97, 2), ["ab"])


def test_entry(tmp_path, corpus, capsys, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({\n"
        "        'data': {'tokenizer': {'name': 'raw_bytes'}},\n"
        "        'model': {'name': 'gpt', 'vocab_size': 259, 'embed_dim': 8, 'num_layers': 1,\n"
        "                  'num_heads': 1},\n"
        "        'train': {'num_steps': 1, 'batch_size': 1},\n"
        "    })\n"
    )

    def run(*flags):
        common = [f"--config={config}", "--workdir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["prepare", *common, *flags])
        run_entry(main)

    run("--data", corpus, "--config.data.held_out_fraction=0.2")
    assert "249 documents, 33,334 tokens to train on; 51 held out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: data\.sources is empty"):
        run()
    with pytest.raises(SystemExit, match=r"train\.batch: unknown key; did you mean 'batch_size'"):
        run("--config.train.batch=3")
    with pytest.raises(SystemExit, match=r"error: data: no file or folder at .*nowhere'"):
        run("--data", str(tmp_path / "nowhere"))
