import json
from collections import Counter

import numpy as np
import pytest
from corpora import NextToken, RawRows, data_config, make_texts, write_jsonl
from test_pipeline import assert_same, take, tokens_of

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.pipeline import make_loader, merge_states, resolve_data
from llm_jax.data.prepare import prepare

T, B = 16, 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stream")
    large = write_jsonl(workdir / "large.jsonl", make_texts(120, longest=150))
    small = write_jsonl(workdir / "small.jsonl", make_texts(30, "small", longest=150))
    data = data_config((large, 3.0), (small, 1.0), held_out_fraction=0.1, mode="stream")
    return data, workdir, prepare(data, workdir)


@pytest.fixture
def loader_of(prepared):
    data, workdir, found = prepared

    def make(objective=None, settings=None, **arguments):
        used = resolve_data(to_dict(data) | (settings or {}))
        arguments = {"tokenizer": found.tokenizer, "batch_size": B} | arguments
        return make_loader(used, workdir=workdir, objective=objective or NextToken(), **arguments)

    return make


def slot_tokens(batches, slot, extra=1):
    """The token stream of one slot, rebuilt from its rows."""
    rows = np.stack([batch["rows"][slot] for batch in batches])
    return np.concatenate([rows[0], rows[1:, extra:].ravel()]) if extra else rows.ravel()


def test_streaming_writes_no_shards(prepared):
    _, workdir, found = prepared
    assert found.indices == ()
    assert not list(workdir.rglob("*shard-*"))


@pytest.mark.parametrize("extra", [1, 0])
def test_a_slot_is_whole_documents_one_after_the_other(prepared, loader_of, extra):
    _, _, found = prepared
    tokenizer = found.tokenizer
    texts = set(make_texts(120, longest=150)) | set(make_texts(30, "small", longest=150))
    batches = take(loader_of(RawRows(extra)), 80)
    for slot in range(B):
        tokens = slot_tokens(batches, slot, extra)
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        assert starts[0] == 0
        assert len(starts) > 5
        for document in np.split(tokens, starts[1:])[:-1]:
            assert document[-1] == tokenizer.eos_id
            assert tokenizer.decode(document[1:-1].tolist()) in texts


def test_an_epoch_has_every_training_document_once(prepared, loader_of, tmp_path):
    data, _, found = prepared
    tokenizer = found.tokenizer
    large = {"sources": to_dict(data)["sources"][:1]}
    sharded = prepare(resolve_data(to_dict(data) | large | {"mode": "shards"}), tmp_path)
    tokens = np.concatenate(tokens_of(sharded.indices[0], "train"))
    expected = Counter(bytes(d) for d in _split_at(tokens.astype(np.int32), tokenizer.bos_id))
    loader = loader_of(RawRows(0), settings=large, batch_size=1)
    rows = -(-(len(tokens) + 2 * T) // T)
    walked = _split_at(slot_tokens(take(loader, rows), 0, 0), tokenizer.bos_id)
    assert Counter(bytes(d) for d in walked[: sum(expected.values())]) == expected


def _split_at(tokens, bos):
    return np.split(tokens, np.flatnonzero(tokens == bos)[1:])


@pytest.mark.parametrize("threads", [0, 1])
def test_a_resumed_run_goes_on_with_the_very_next_batch(loader_of, threads):
    whole = take(loader_of(), 40)
    loader = loader_of(settings={"num_threads": threads})
    take(loader, 23)
    state = json.loads(json.dumps(loader.get_state()))
    take(loader, 5)
    resumed = loader_of(settings={"num_threads": threads})
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 17), whole[23:])
    loader.set_state(state)  # also in a loader that has read ahead
    assert_same(take(loader, 17), whole[23:])


def test_a_run_goes_on_with_any_number_of_processes(loader_of):
    whole = take(loader_of(RawRows()), 30)
    state, done = {"batch": 0, "documents": [0] * B, "offsets": [0] * B}, 0
    for count in (1, 2, 4, 1):
        parts = [loader_of(RawRows(), process_index=p, process_count=count) for p in range(count)]
        for part in parts:
            part.set_state(state)
        for _ in range(7):
            batches = [next(part) for part in parts]
            joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
            assert_same([joined], [whole[done]])
            done += 1
        state = json.loads(json.dumps(merge_states([part.local_state() for part in parts])))
    assert done == 28


def test_held_out_is_what_shards_hold_out(prepared, loader_of, tmp_path):
    data, _, found = prepared
    sharded = prepare(resolve_data(to_dict(data) | {"mode": "shards"}), tmp_path)
    bos = found.tokenizer.bos_id
    expected = Counter()
    for index in sharded.indices:
        for shard in tokens_of(index, "held_out"):
            expected.update(bytes(d) for d in _split_at(shard.astype(np.int32), bos))
    rows = np.concatenate([b["rows"] for b in loader_of(RawRows(0), split="held_out")])
    tokens = rows[rows >= 0]
    assert Counter(bytes(d) for d in _split_at(tokens, bos)) == expected


@pytest.mark.parametrize("count", [1, 2, 4])
def test_held_out_is_shared_and_resumed(loader_of, count):
    whole = list(loader_of(RawRows(), split="held_out"))
    parts = [
        loader_of(RawRows(), split="held_out", process_index=p, process_count=count)
        for p in range(count)
    ]
    for part in parts:
        part.set_state({"batch": 2})
    for expected in whole[2:]:
        rows = np.concatenate([next(part)["rows"] for part in parts])
        np.testing.assert_array_equal(rows, expected["rows"])
    for part in parts:
        with pytest.raises(StopIteration):
            next(part)


def test_epochs_and_trouble_are_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*make_texts(50), ""])
    data = data_config(path, mode="stream")
    found = prepare(data, tmp_path)
    loader = make_loader(
        data, workdir=tmp_path, tokenizer=found.tokenizer, objective=NextToken(), batch_size=2
    )
    take(loader, 200)
    (epochs,) = loader.epochs().values()
    tokens_per_epoch = sum(len(text.encode()) + 2 for text in make_texts(50))
    assert epochs == pytest.approx(200 * 2 * T / tokens_per_epoch, rel=0.4)
    assert any("documents were empty" in line for line in loader.problems())


def test_states_that_do_not_fit(loader_of):
    state = loader_of().get_state()
    with pytest.raises(ConfigError, match=r"batch_size = 4: .* saved with, 8"):
        loader_of(batch_size=4).set_state(state)
    with pytest.raises(ConfigError, match="mode = 'shards', not 'stream'"):
        loader_of().set_state({"batch": 3})


def test_a_corpus_without_text_is_an_error_not_a_hang(tmp_path):
    data = data_config(write_jsonl(tmp_path / "a.jsonl", ["", ""]), mode="stream", num_threads=0)
    found = prepare(data, tmp_path)
    loader = make_loader(
        data, workdir=tmp_path, tokenizer=found.tokenizer, objective=NextToken(), batch_size=2
    )
    with pytest.raises(ConfigError, match="no document to train on"):
        next(loader)
