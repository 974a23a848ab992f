"""scores.jsonl is what the evaluations say, whoever wrote them, in whatever order."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from llm_jax.core.config import ConfigError
from llm_jax.metrics import scores
from llm_jax.metrics.writer import METRICS_FILE, write_events


def write(workdir, step, **summary):
    path = scores.scores_path(workdir, step)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"step": step, "summary": summary}))


def test_records_are_in_order_and_numbers_that_are_none_are_null(tmp_path):
    write(tmp_path, 20, loss=1.0)
    write(tmp_path, 3, loss=float("nan"), right=0.5)
    (tmp_path / "evals" / "scores_4.json.1.partial").write_text("{")
    lines = scores.collect_scores(tmp_path).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 20]
    assert scores.read_scores(tmp_path) == {3: {"loss": None, "right": 0.5}, 20: {"loss": 1.0}}


def test_another_job_may_write_while_one_collects(tmp_path, monkeypatch):
    write(tmp_path, 1, loss=1.0)
    replace = scores.replace_file

    def late(path, chunks):
        write(tmp_path, 2, loss=0.5)
        replace(path, chunks)

    monkeypatch.setattr(scores, "replace_file", late)
    scores.collect_scores(tmp_path)
    assert list(scores.read_scores(tmp_path)) == [1, 2]


def test_scores_of_the_run_itself_and_of_jobs(tmp_path):
    records = [{"step": 1, "loss": 9.0}, {"step": 2, "eval/loss": 3.0, "eval/x": 1.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    write(tmp_path, 3, loss=2.5, y=0.0)
    scores.collect_scores(tmp_path)
    assert scores.read_scores(tmp_path) == {2: {"loss": 3.0, "x": 1.0}, 3: {"y": 0.0}}
    write(tmp_path, 4, loss=2.0)
    scores.collect_scores(tmp_path)
    of_jobs = {3: {"loss": 2.5, "y": 0.0}, 4: {"loss": 2.0}}
    assert scores.read_scores(tmp_path) == {2: {"x": 1.0}, **of_jobs}
    assert scores.read_jobs_scores(tmp_path) == of_jobs


def test_a_file_that_is_no_evaluation(tmp_path):
    write(tmp_path, 1, loss=1.0)
    scores.scores_path(tmp_path, 1).write_text("[]")
    with pytest.raises(ConfigError, match=r"scores_1\.json is no evaluation: remove it"):
        scores.collect_scores(tmp_path)


def test_what_will_be_trained_anew_is_forgotten(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, loss=1.0)
    scores.forget_scores(tmp_path, after=2)
    assert scores.scored_steps(tmp_path) == [1, 2]
    assert list(scores.read_scores(tmp_path)) == [1, 2]
    scores.forget_scores(tmp_path / "new", after=0)


def test_events_of_a_step(tmp_path):
    data = write_events(tmp_path / "tb", 7, {"loss": 1.5}).read_bytes()
    events = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    (value,) = events[1].summary.value
    assert (events[1].step, value.tag, value.simple_value) == (7, "loss", 1.5)
