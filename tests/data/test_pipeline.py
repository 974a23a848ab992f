import json
from collections import Counter

import numpy as np
import pytest
from corpora import NextToken, RawRows, data_config, make_texts, write_jsonl

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.draw import EndlessDraw
from llm_jax.data.pipeline import make_loader, resolve_data
from llm_jax.data.prepare import prepare
from llm_jax.data.shuffle import EndlessOrder
from llm_jax.data.sources import source_key

T, B = 16, 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A large and a small source, prepared with weights 3 to 1."""
    workdir = tmp_path_factory.mktemp("pipeline")
    large = write_jsonl(workdir / "large.jsonl", make_texts(120, longest=150))
    small = write_jsonl(workdir / "small.jsonl", make_texts(30, "small", longest=150))
    data = data_config((large, 3.0), (small, 1.0), held_out_fraction=0.1)
    return data, workdir, prepare(data, workdir)


@pytest.fixture
def loader_of(prepared):
    data, workdir, found = prepared

    def make(objective=None, settings=None, **arguments):
        used = resolve_data(to_dict(data) | (settings or {}))
        arguments = {"tokenizer": found.tokenizer, "batch_size": B} | arguments
        return make_loader(used, workdir=workdir, objective=objective or NextToken(), **arguments)

    return make


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def tokens_of(index, split):
    shards = index.shards[split]
    return [np.load(index.folder / shard.file, allow_pickle=False) for shard in shards]


@pytest.mark.parametrize("extra", [1, 0, 5])
def test_an_epoch_has_every_token_once(prepared, loader_of, extra):
    """As a target where rows overlap by one token; as a member of a row elsewhere."""
    _, _, found = prepared
    index = found.indices[0]
    shards = tokens_of(index, "train")
    first = 1 if extra == 1 else 0
    expected = Counter(np.concatenate([shard[first:] for shard in shards]).tolist())
    stride = T if extra == 1 else T + extra
    rows_per_epoch = sum(-(-(len(shard) - first) // stride) for shard in shards)
    only_large = {"sources": to_dict(prepared[0])["sources"][:1]}
    loader = loader_of(RawRows(extra), settings=only_large, batch_size=1)
    rows = np.concatenate([batch["rows"] for batch in take(loader, rows_per_epoch)])
    assert rows.shape == (rows_per_epoch, T + extra)
    body = rows[:, first:]
    assert Counter(body[body >= 0].tolist()) == expected
    assert loader.epochs() == {index.folder.name: pytest.approx(1.0)}


def test_a_row_is_a_window_of_its_shard(prepared, loader_of):
    _, _, found = prepared
    shards = [s for index in found.indices for s in tokens_of(index, "train")]
    windows = {
        tuple(
            np.pad(shard[start : start + T + 1].astype(int), (0, T + 1), constant_values=-1)[
                : T + 1
            ]
        )
        for shard in shards
        for start in range(0, len(shard) - 1, T)
    }
    for batch in take(loader_of(RawRows()), 40):
        assert all(tuple(row) in windows for row in batch["rows"].tolist())


def test_shares_follow_the_weights(prepared, loader_of):
    data, _, found = prepared
    loader = loader_of(RawRows(), batch_size=1024)
    rows = next(loader)["rows"]
    starts = [
        {tuple(s[i : i + T + 1]) for s in tokens_of(index, "train") for i in range(0, len(s), T)}
        for index in found.indices
    ]
    large, small = (sum(tuple(row[row >= 0]) in known for row in rows) for known in starts)
    assert large >= 768
    assert small >= 256
    keys = [source_key(source) for source in data.sources]
    done = loader.epochs()
    assert done[keys[1]] > done[keys[0]] > 0


def test_rows_depend_on_the_seed_and_nothing_else(loader_of):
    first, again = (take(loader_of(), 5) for _ in range(2))
    assert_same(first, again)
    other = take(loader_of(settings={"shuffle_seed": 1}), 5)
    assert all((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_resumed_run_goes_on_with_the_very_next_batch(loader_of, threads):
    whole = take(loader_of(), 12)
    loader = loader_of(settings={"num_threads": threads})
    take(loader, 7)
    state = json.loads(json.dumps(loader.get_state()))
    assert state == {"batch": 7}
    take(loader, 2)
    resumed = loader_of(settings={"num_threads": threads})
    resumed.set_state(state)
    assert_same(take(resumed, 5), whole[7:])
    loader.set_state(state)  # also in a loader that has read ahead
    assert_same(take(loader, 5), whole[7:])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_global_batch(loader_of, count):
    whole = take(loader_of(RawRows()), 6)
    parts = [loader_of(RawRows(), process_index=p, process_count=count) for p in range(count)]
    for expected in whole:
        batches = [next(part) for part in parts]
        joined = {key: np.concatenate([b[key] for b in batches]) for key in expected}
        assert_same([joined], [expected])
        assert all(len(b["rows"]) == B // count for b in batches)


def test_held_out_rows_come_once_in_order_and_end(prepared, loader_of):
    _, _, found = prepared
    loader = loader_of(RawRows(), split="held_out")
    batches = list(loader)
    rows = np.concatenate([batch["rows"] for batch in batches])
    np.testing.assert_array_equal(
        np.concatenate([batch["row_ids"] for batch in batches]), np.arange(len(rows))
    )
    assert len(batches) == loader.num_batches
    targets = rows[:, 1:][rows[:, 1:] >= 0]
    shards = [shard for index in found.indices for shard in tokens_of(index, "held_out")]
    np.testing.assert_array_equal(targets, np.concatenate([shard[1:] for shard in shards]))
    parts = [
        loader_of(RawRows(), split="held_out", process_index=p, process_count=2) for p in range(2)
    ]
    halves = [np.concatenate([batch["rows"] for batch in part]) for part in parts]
    np.testing.assert_array_equal(
        np.concatenate([h.reshape(-1, B // 2, T + 1) for h in halves], axis=1).reshape(rows.shape),
        rows,
    )


def test_weights_of_a_batch_count_what_can_be_predicted(prepared, loader_of):
    _, _, found = prepared
    total = sum(batch["loss_weights"].sum() for batch in loader_of(split="held_out"))
    expected = 0
    for index in found.indices:
        for shard in tokens_of(index, "held_out"):
            expected += np.count_nonzero(shard[1:] != found.tokenizer.bos_id)
    assert total == expected


def test_what_cannot_be_loaded(loader_of, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size = 8: .* multiple of the 3 processes"):
        loader_of(process_count=3)
    with pytest.raises(ConfigError, match="process_index = 2"):
        loader_of(process_index=2, process_count=2)
    with pytest.raises(ConfigError, match=r"run llm_jax\.prepare first"):
        loader_of(settings={"shards_path": str(tmp_path)})
    with pytest.raises(ConfigError, match="mode = 'stream', not 'shards'"):
        loader_of().set_state({"batch": 1, "documents": [], "offsets": []})

    class Other:
        bos_id, eos_id = 256, 257

        def fingerprint(self):
            return "another"

    with pytest.raises(ConfigError, match=r"made with tokenizer .* this one is another"):
        loader_of(tokenizer=Other())


def test_nothing_held_out_is_said(tmp_path):
    data = data_config(write_jsonl(tmp_path / "a.jsonl", make_texts(20)), held_out_fraction=0.0)
    found = prepare(data, tmp_path)
    with pytest.raises(ConfigError, match="none of 20 documents is held out"):
        make_loader(
            data,
            workdir=tmp_path,
            tokenizer=found.tokenizer,
            objective=NextToken(),
            batch_size=2,
            split="held_out",
        )


def test_a_config_survives_being_written_down(prepared):
    data = prepared[0]
    assert resolve_data(json.loads(json.dumps(to_dict(data)))) == data
    assert resolve_data(data) is data


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sources": [{"name": "jsonn", "path": "x"}]}, "did you mean 'jsonl'"),
        ({"sources": [{"path": "x"}]}, r"data\.sources\.0\.name is missing"),
        ({"sources": [{"name": "text", "path": "x"}] * 2}, "'x' twice"),
        ({"sources": [{"name": "text", "path": "x", "wait": 1}]}, r"sources\.0\.wait: unknown key"),
        ({"held_out_fraction": 2.0}, "held_out_fraction = 2.0"),
        ({"num_workers": 0}, "num_workers = 0"),
        ({"mode": "shard"}, "did you mean 'shards'"),
    ],
)
def test_settings_that_cannot_be(section, message):
    with pytest.raises(ConfigError, match=message):
        resolve_data({"tokenizer": {"name": "raw_bytes"}} | section)


def rows_of(prepared, split):
    """All rows of a split as they lie in the shards, padded."""
    _, _, found = prepared
    return {
        tuple(np.pad(shard[start : start + T + 1].astype(int), (0, T + 1), constant_values=-1))[
            : T + 1
        ]
        for index in found.indices
        for shard in tokens_of(index, split)
        for start in range(0, len(shard) - 1, T)
    }


def test_partners_are_other_rows_of_the_split(prepared, loader_of):
    batches = take(loader_of(RawRows(partner_rows=True)), 40)
    assert_same(
        [{k: v for k, v in b.items() if k != "partners"} for b in batches],
        take(loader_of(RawRows()), 40),
    )
    rows, partners = (np.concatenate([b[key] for b in batches]) for key in ("rows", "partners"))
    assert partners.shape == rows.shape
    assert partners.dtype == np.int32
    assert {tuple(row) for row in partners.tolist()} <= rows_of(prepared, "train")
    assert (rows != partners).any(1).mean() > 0.7  # this corpus repeats itself
    assert len({tuple(row) for row in partners.tolist()}) > 50


def test_partners_depend_on_the_row_alone(loader_of):
    objective = RawRows(partner_rows=True)
    whole = take(loader_of(objective), 6)
    resumed = loader_of(objective, settings={"num_threads": 3})
    resumed.set_state({"batch": 4})
    assert_same(take(resumed, 2), whole[4:])
    parts = [loader_of(objective, process_index=p, process_count=4) for p in range(4)]
    for expected in whole:
        batches = [next(part) for part in parts]
        assert_same([{k: np.concatenate([b[k] for b in batches]) for k in expected}], [expected])


def test_partners_of_held_out_rows(prepared, loader_of):
    batches = list(loader_of(RawRows(partner_rows=True), split="held_out", batch_size=64))
    rows, partners = (np.concatenate([b[key] for b in batches]) for key in ("rows", "partners"))
    count = int((rows >= 0).any(1).sum())
    np.testing.assert_array_equal(partners[:count], np.roll(rows[:count], -(count // 2), axis=0))
    assert (partners[count:] == -1).all()
    assert count < len(rows)


def test_partners_where_there_are_few_rows():
    for sizes in ((1, 1), (2, 1), (3, 2)):
        draw = EndlessDraw([1.0, 1.0], [EndlessOrder(n, 0, str(i)) for i, n in enumerate(sizes)], 0)
        numbers = np.arange(512) + 2**41
        (sources, items), (others, partners) = draw(numbers), draw.partners(numbers)
        is_same = (sources == others) & (items == partners)
        assert not is_same[np.array(sizes)[sources] > 1].any()
        assert (partners < np.array(sizes)[others]).all()


def test_partners_need_shards(loader_of):
    with pytest.raises(ConfigError, match=r"needs data\.mode = 'shards'") as caught:
        loader_of(RawRows(partner_rows=True), settings={"mode": "stream"})
    assert "\n" not in str(caught.value)
