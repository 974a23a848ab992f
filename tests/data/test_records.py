"""Records: split by contents, drawn like rows, read whole from every source."""

import datetime
import itertools
import json
import sys
import types
from collections import Counter

import grain
import numpy as np
import pytest
from corpora import NextToken, RawRecords
from test_pipeline import take

from llm_jax.core.config import ConfigError, parse_component, to_dict
from llm_jax.data import prepare as prepare_module
from llm_jax.data.config import resolve_data
from llm_jax.data.fields import canonical
from llm_jax.data.held_out import held_out_records
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import prepare
from llm_jax.data.sources import open_source
from llm_jax.data.split import held_out_threshold, is_held_out

B = 8


def make_records(count, name="a"):
    return [{"question": f"{name} {i}?", "answer": i, "tags": ["x", "é"]} for i in range(count)]


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def config_of(*sections, **settings):
    defaults = {"tokenizer": {"name": "raw_bytes"}, "held_out_fraction": 0.1}
    return resolve_data(defaults | {"sources": sections} | settings)


def jsonl(path, **settings):
    return {"name": "jsonl", "path": path, **settings}


def without_names(examples):
    return [{k: v for k, v in example.items() if k != "name"} for example in examples]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A large and a small source, with weights 3 to 1."""
    workdir = tmp_path_factory.mktemp("records")
    large = write_records(workdir / "large.jsonl", make_records(120))
    small = write_records(workdir / "small.jsonl", make_records(30, "b"))
    data = config_of(jsonl(large, weight=3.0), jsonl(small))
    return data, workdir, prepare(data, workdir, examples=True)


@pytest.fixture
def loader_of(prepared):
    data, workdir, found = prepared

    def make(objective=None, settings=None, **arguments):
        used = resolve_data(to_dict(data) | (settings or {}))
        arguments = {"tokenizer": found.tokenizer, "batch_size": B} | arguments
        return make_loader(used, workdir=workdir, objective=objective or RawRecords(), **arguments)

    return make


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert a["examples"] == b["examples"]
        assert a["names"] == b["names"]
        np.testing.assert_array_equal(a["row_ids"], b["row_ids"])


def test_each_record_is_in_the_split_that_its_contents_say(prepared, loader_of):
    _, workdir, found = prepared
    assert not list(workdir.rglob("*shard-*"))
    index = found.records[0]
    batches = take(loader_of(), 60)
    seen = {canonical(e) for batch in batches for e in without_names(batch["examples"])}
    held = list(loader_of(split="held_out"))
    held_out = {canonical(e) for batch in held for e in without_names(batch["examples"]) if e}
    assert seen | held_out == {canonical(r) for r in make_records(120) + make_records(30, "b")}
    assert not seen & held_out
    assert all(
        is_held_out(canonical(r), index.plan.held_out_threshold) == (canonical(r) in held_out)
        for r in make_records(120)
    )
    assert sum(sum(index.sizes.values()) for index in found.records) == 150


def test_an_epoch_has_every_record_once(prepared, loader_of):
    _, _, found = prepared
    only_large = {"sources": to_dict(prepared[0])["sources"][:1]}
    size = found.records[0].sizes["train"]
    loader = loader_of(settings=only_large, batch_size=1)
    first, second = (
        [batch["names"][0] for batch in itertools.islice(loader, size)] for _ in range(2)
    )
    assert Counter(first) == Counter(second) == Counter(set(first))
    assert first != second
    assert list(loader.epochs().values()) == [2.0]


def test_shares_follow_the_weights(loader_of):
    batch = next(loader_of(batch_size=1024))
    assert sum(name.startswith("large") for name in batch["names"]) == 768
    assert [e["name"] for e in batch["examples"]] == batch["names"]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_resumed_run_goes_on_with_the_very_next_batch(loader_of, threads):
    whole = take(loader_of(), 12)
    assert_same(take(loader_of(settings={"mode": "stream"}), 3), whole[:3])
    loader = loader_of(settings={"num_threads": threads})
    take(loader, 7)
    state = json.loads(json.dumps(loader.get_state()))
    assert state == {"batch": 7}
    take(loader, 2)
    resumed = loader_of(settings={"num_threads": threads}, process_index=1, process_count=2)
    resumed.set_state(state)
    assert [b["names"] for b in take(resumed, 5)] == [b["names"][B // 2 :] for b in whole[7:]]
    loader.set_state(state)
    assert_same(take(loader, 5), whole[7:])
    with pytest.raises(ConfigError, match="mode = 'stream', not 'shards'"):
        loader.set_state({"batch": 1, "documents": [], "offsets": []})


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_processes_share_the_global_batch(loader_of, split, count):
    whole = list(itertools.islice(loader_of(split=split), 5))
    parts = [loader_of(split=split, process_index=p, process_count=count) for p in range(count)]
    for expected in whole:
        batches = [next(part) for part in parts]
        joined = {key: [v for b in batches for v in b[key]] for key in ("examples", "names")}
        joined["row_ids"] = np.concatenate([b["row_ids"] for b in batches])
        assert_same([joined], [expected])


def test_held_out_records_come_once_in_order_and_end_in_padding(prepared, loader_of):
    data, workdir, found = prepared
    loader = loader_of(split="held_out", batch_size=16)
    batches = list(loader)
    assert len(batches) == loader.num_batches
    examples = [e for batch in batches for e in batch["examples"]]
    total = sum(index.sizes["held_out"] for index in found.records)
    assert all(examples[:total])
    assert examples[total:] == [{}] * (-total % 16)
    assert [n for batch in batches for n in batch["names"]][total:] == [""] * (-total % 16)
    numbers = [int(e["name"].split(":")[1]) for e in examples[:total]]
    first = found.records[0].sizes["held_out"]
    assert numbers == sorted(numbers[:first]) + sorted(numbers[first:])
    alone = list(held_out_records(data, workdir))
    assert alone[0] == examples[0]
    assert alone[1] == examples[first]
    assert Counter(map(canonical, alone)) == Counter(map(canonical, examples[:total]))


def test_transforms_get_the_length_and_make_arrays(loader_of):
    class Answers:
        examples = True
        examples_per_row = 1

        def transforms(self, tokenizer, sequence_length):
            class ToArray(grain.transforms.Map):
                def map(self, element):
                    answers = [e["answer"] if e else -1 for e in element["examples"]]
                    return {"labels": np.array(answers, np.int32) * sequence_length}

            return [ToArray()]

    batch = next(loader_of(Answers(), settings={"sequence_length": 100}))
    assert batch["labels"].shape == (B,)
    assert not np.any(batch["labels"] % 100)


@pytest.mark.parametrize("threads", [0, 1])
def test_an_objective_refuses_a_record_in_one_line(loader_of, threads):
    class Refuse(grain.transforms.Map):
        def map(self, element):
            raise ConfigError(f"{element['names'][0]} has no field 'target'")

    class Picky(RawRecords):
        def transforms(self, tokenizer, sequence_length):
            return [Refuse()]

    loader = loader_of(Picky(), settings={"num_threads": threads})
    with pytest.raises(ConfigError, match=r"jsonl:\d+ has no field 'target'") as caught:
        next(loader)
    assert "\n" not in str(caught.value)


def test_a_second_run_reads_nothing(prepared, monkeypatch):
    data, workdir, found = prepared
    monkeypatch.setattr(prepare_module, "split_records", None)
    monkeypatch.setattr(prepare_module, "make_tokenizer", None)
    assert prepare(data, workdir, examples=True).records == found.records
    assert found.lines()[0].endswith(
        "{train} records to train on; {held_out} held out".format(**found.records[0].sizes)
    )


def test_the_tokenizer_learns_from_training_records_alone(tmp_path, monkeypatch):
    seen = []
    real = prepare_module.make_tokenizer

    def make_tokenizer(config, texts, progress):
        seen.extend(texts())
        return real(config, texts, progress)

    monkeypatch.setattr(prepare_module, "make_tokenizer", make_tokenizer)
    records = make_records(100)
    data = config_of(jsonl(write_records(tmp_path / "a.jsonl", records)))
    found = prepare(data, tmp_path, examples=True)
    threshold = found.records[0].plan.held_out_threshold
    train = [r for r in records if not is_held_out(canonical(r), threshold)]
    assert 80 < len(train) < 100
    assert Counter(seen) == Counter(t for r in train for t in (r["question"], *r["tags"]))


LINES = [
    {"text": "first", "name": "own name"},
    "{broken",
    "[1, 2]",
    {},
    '{"a": {"b": ["a lone \\ud800"]}, "c": null}',
    {"text": "\\ud800 is text here", "number": 1.5},
]


def test_malformed_records_are_counted_and_left_out(tmp_path):
    path = write_records(tmp_path / "a.jsonl", LINES + make_records(30))
    data = config_of(jsonl(path), malformed_fraction_max=0.1)
    found = prepare(data, tmp_path, examples=True)
    loader = make_loader(
        data, workdir=tmp_path, tokenizer=found.tokenizer, objective=RawRecords(), batch_size=64
    )
    names = set(next(loader)["names"]) | {r["name"] for r in held_out_records(data, tmp_path)}
    assert not names & {f"a.jsonl:{line}" for line in (2, 3, 4)}
    assert loader.problems() == [
        f"{path}: 1 documents had 1 bytes that are no UTF-8, replaced by U+FFFD "
        "(or the document left out: see undecodable)",
        f"{path}: 2 records could not be read and were left out",
        f"{path}: 1 documents were empty and were left out",
    ]
    assert found.lines()[1:] == loader.problems()
    with pytest.raises(ConfigError, match=r"2 of \d+ records .* 0\.01 of its 36"):
        prepare(config_of(jsonl(path)), tmp_path / "strict", examples=True)


def open_records(tmp_path, **section):
    config = parse_component("data.sources", section, "source")
    return open_source(config, tmp_path / "cache", as_records=True)


def test_jsonl_records_are_whole_objects(tmp_path):
    path = write_records(tmp_path / "a.jsonl", LINES)
    source = open_records(tmp_path, name="jsonl", path=path, text_key="absent")
    found = [source.record(i) for i in range(len(source))]
    assert found[0].fields == {"text": "first", "name": "own name"}
    assert [record.malformed for record in found] == [False, True, True, False, False, False]
    assert found[4].fields == {"a": {"b": ["a lone \ufffd"]}, "c": None}
    assert [record.undecodable for record in found] == [0, 0, 0, 0, 1, 0]
    assert found[5].fields == LINES[5]
    assert found[5].name == "a.jsonl:6"
    skipping = open_records(tmp_path, name="jsonl", path=path, undecodable="skip")
    assert skipping.record(4).fields == {}
    with pytest.raises(IndexError):
        source.record(6)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"a": "x\xff"}\n')
    source = open_records(tmp_path, name="jsonl", path=str(tmp_path / "bytes.jsonl"))
    assert (source.record(0).fields, source.record(0).undecodable) == ({"a": "x\ufffd"}, 1)


def test_a_text_file_is_a_record(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("")
    source = open_records(tmp_path, name="text", path=str(tmp_path / "*.txt"))
    assert (source.record(0).fields, source.record(0).name) == ({"text": "first"}, "a.txt")
    assert source.record(1).fields == {}


@pytest.fixture
def parquet_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"q": f"é {i}", "n": i, "tags": ["x"], "day": datetime.date(2026, 1, 2), "raw": b"b\xff"}
        for i in range(40)
    ]
    rows[3]["q"] = None
    folder = tmp_path / "parquet"
    folder.mkdir()
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows[part * 20 : part * 20 + 20])
        parquet.write_table(table, folder / f"{part}.parquet", row_group_size=7)
    return str(folder)


def test_parquet_records_have_all_columns_or_those_asked_for(tmp_path, parquet_folder):
    source = open_records(tmp_path, name="parquet", path=parquet_folder)
    record = source.record(21)
    assert record.fields == {
        "q": "é 21", "n": 21, "tags": ["x"], "day": "2026-01-02", "raw": "b\ufffd",
    }  # fmt: skip
    assert record.undecodable == 1
    assert record.name == "1.parquet:21"
    assert source.record(3).fields["q"] is None
    two = open_records(tmp_path, name="parquet", path=parquet_folder, columns=("n", "q"))
    assert two.record(39).fields == {"n": 39, "q": "é 39"}
    with pytest.raises(ConfigError, match=r"no column 'nn'; did you mean 'n'.*set columns"):
        open_records(tmp_path, name="parquet", path=parquet_folder, columns=("nn",))


def test_row_groups_are_read_one_after_the_other(tmp_path, parquet_folder, monkeypatch):
    from pyarrow import parquet

    section = {"name": "parquet", "path": parquet_folder, "columns": ("q", "n")}
    data = config_of(section, num_threads=0)
    found = prepare(data, tmp_path, examples=True)
    reads = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, group, columns: reads.append(group) or real(self, group, columns),
    )
    loader = make_loader(
        data, workdir=tmp_path, tokenizer=found.tokenizer, objective=RawRecords(), batch_size=1
    )
    size = found.records[0].sizes["train"]
    numbers = [next(loader)["examples"][0]["n"] for _ in range(size)]
    assert len(set(numbers)) == size
    assert len(reads) <= 6
    held_out = [record["n"] for record in held_out_records(data, tmp_path)]
    assert sorted(numbers + held_out) == list(range(40))


def test_huggingface_records(tmp_path, monkeypatch):
    class Dataset(list):
        column_names = ("question", "label")

    load = lambda *_, **__: Dataset([{"question": "first", "label": 1}])  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    source = open_records(tmp_path, name="hf", path="org/name")
    assert source.record(0).fields == {"question": "first", "label": 1}


def test_a_record_does_not_depend_on_the_order_of_its_keys_or_its_file():
    assert (
        canonical({"a": 1, "b": "é"}) == canonical({"b": "é", "a": 1}) == '{"a":1,"b":"é"}'.encode()
    )


def test_what_cannot_be_loaded(prepared, loader_of, tmp_path):
    path = write_records(tmp_path / "a.jsonl", make_records(50))
    data = config_of(jsonl(path))
    arguments = {"tokenizer": prepared[2].tokenizer, "batch_size": 2}
    with pytest.raises(ConfigError, match=r"has no records in .*: run llm_jax\.prepare first"):
        make_loader(data, workdir=tmp_path, objective=RawRecords(), **arguments)
    prepare(data, tmp_path, examples=True)
    with pytest.raises(ConfigError, match=r"has no finished shards"):
        make_loader(data, workdir=tmp_path, objective=NextToken(), **arguments)
    with pytest.raises(ConfigError, match=r"held_out_threshold = \d+\.*, now it is 0"):
        prepare(config_of(jsonl(path), held_out_fraction=0.0), tmp_path, examples=True)
    write_records(tmp_path / "a.jsonl", make_records(51))
    with pytest.raises(ConfigError, match=r"a\.jsonl' changed since .*records was made"):
        make_loader(data, workdir=tmp_path, objective=RawRecords(), **arguments)
    with pytest.raises(ConfigError, match=r"records was made with held_out_threshold = "):
        prepare(data, tmp_path, examples=True)


def test_nothing_held_out_and_nothing_to_train_on_are_said(tmp_path):
    data = config_of(
        jsonl(write_records(tmp_path / "a.jsonl", make_records(20))), held_out_fraction=0.0
    )
    found = prepare(data, tmp_path, examples=True)
    arguments = {"workdir": tmp_path, "tokenizer": found.tokenizer, "objective": RawRecords()}
    with pytest.raises(ConfigError, match="none of 20 records is held out"):
        make_loader(data, batch_size=2, split="held_out", **arguments)
    assert list(held_out_records(data, tmp_path)) == []
    next(make_loader(data, batch_size=2, **arguments))
    threshold = held_out_threshold(1, 0.25)
    lonely = next(r for r in make_records(99) if is_held_out(canonical(r), threshold))
    data = config_of(jsonl(write_records(tmp_path / "b.jsonl", [lonely])))
    prepare(data, tmp_path / "lonely", examples=True)
    with pytest.raises(ConfigError, match=r"no record to train on \(1 held out\)"):
        make_loader(data, batch_size=2, **arguments | {"workdir": tmp_path / "lonely"})
