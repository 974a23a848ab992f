"""metrics.jsonl, TensorBoard events and the terminal; resuming and a full disk."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.metrics import writer as writer_module
from llm_jax.metrics.writer import METRICS_FILE, MetricWriter, read_records

METRICS = {
    "loss": 3.412,
    "learning_rate": 1.2e-3,
    "grad_norm": 0.81,
    "tokens_per_second": 8012.4,
    "mfu": 0.312,
}


def make(workdir, start_step=0, **kwargs):
    kwargs = {"progress": "none", "num_steps": 600} | kwargs
    return MetricWriter(workdir, start_step=start_step, **kwargs)


def events_of(path: Path):
    """Frames of a TFRecord file, with both checksums verified."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto import event_pb2

    def checked(data: bytes, stored: bytes) -> bytes:
        crc = crc32c(data)
        masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        assert struct.unpack("<I", stored) == (masked,)
        return data

    assert crc32c(b"123456789") == 0xE3069283
    file = io.BytesIO(path.read_bytes())
    events = []
    while header := file.read(8):
        checked(header, file.read(4))
        data = file.read(struct.unpack("<Q", header)[0])
        events.append(event_pb2.Event.FromString(checked(data, file.read(4))))
    return events


def test_records_are_on_disk_before_the_next_step(tmp_path):
    with make(tmp_path) as writer:
        writer.write(10, METRICS)
        lines = (tmp_path / METRICS_FILE).read_text().splitlines()
        assert json.loads(lines[0]) == {"step": 10, **METRICS}
        assert lines[0].startswith('{"step": 10, ')
        writer.write_eval(10, {"loss": 3.3})
    assert [r for _, r in read_records(tmp_path / METRICS_FILE)][1] == {
        "step": 10,
        "eval/loss": 3.3,
    }


def test_nonfinite_numbers_keep_the_json_standard(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    with make(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": 0.5})
    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    nonfinite = ["loss", "grad_norm"]
    assert record == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "mfu": 0.5,
        "nonfinite": nonfinite,
    }


def test_resume_cuts_later_records_and_keeps_the_others_bitwise(tmp_path):
    kept = (
        b'{"step": 100, "loss":3.0}\n{ "eval/loss": 2.50, "step": 100}\n{"step":200,"loss":2.1}\n'
    )
    later = b'{"step": 201, "loss": 9.0}\n{"step": 300, "loss": 2.0}\n{"step": 31'
    path = tmp_path / METRICS_FILE
    path.write_bytes(kept + later)
    with make(tmp_path, start_step=200) as writer:
        assert path.read_bytes() == kept
        writer.write(210, {"loss": 2.0})
    assert path.read_bytes() == kept + b'{"step": 210, "loss": 2.0}\n'


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 2}', b"\0\0\0\n", b"[3]\n", b"\n"])
def test_torn_lines_are_dropped(tmp_path, torn):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n' + torn)
    make(tmp_path, start_step=5).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_file_with_nothing_to_cut_is_not_rewritten(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n')
    before = path.stat().st_ino
    make(tmp_path, start_step=1).close()
    assert path.stat().st_ino == before


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path, monkeypatch):
    content = b'{"step": 1}\n{"step": 2}\n'
    path = tmp_path / METRICS_FILE
    path.write_bytes(content)

    def crash(*_):
        raise OSError("no space")

    monkeypatch.setattr(writer_module.os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path, start_step=1)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [METRICS_FILE]


def test_tensorboard_events_and_purge(tmp_path):
    with make(tmp_path, start_step=200) as writer:
        writer.write(210, {"loss": 2.0, "grad_norm": float("nan")})
        (path,) = (tmp_path / "tensorboard").iterdir()
        head, start, event = events_of(path)
    assert head.file_version == "brain.Event:2"
    assert start.step == 201
    assert start.session_log.status == start.session_log.START
    values = {v.tag: v.simple_value for v in event.summary.value}
    assert event.step == 210
    assert values["loss"] == 2.0
    assert values["grad_norm"] != values["grad_norm"]


def test_plain_lines(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 115.5])
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: next(clock))
    with make(tmp_path, progress="auto") as writer:
        writer.write(0, {})
        writer.write(120, METRICS)
        writer.write_eval(120, {"loss": 3.3, "bits_per_byte": 1.02})
        writer.message("saved")
    assert capsys.readouterr().out.splitlines() == [
        "step 0/600",
        "step 120/600  loss 3.412  lr 1.2e-03  grad_norm 0.81  8,012 tokens/s  mfu 31.2%  left 1:02",
        "eval 120/600  loss 3.300  bits_per_byte 1.020",
        "saved",
    ]


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with make(tmp_path, progress="auto") as writer:
        writer.write(120, METRICS)
        writer.message("saved [bold]as it is[/bold]")
    out = terminal.getvalue()
    assert "step 120/600" in out
    assert "loss 3.412" in out
    assert "saved [bold]as it is[/bold]\n" in out
    assert out.rstrip().endswith("\x1b[?25h")  # the cursor is given back


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (62.4, "1:02"), (3661, "1:01:01"), (200_000, "2d 7:33:20")],
)
def test_durations(seconds, text):
    assert writer_module._duration(seconds) == text


def test_disabled_touches_nothing(tmp_path, capsys):
    workdir = tmp_path / "run"
    with make(workdir, enabled=False, progress="lines") as writer:
        writer.write(1, METRICS)
        writer.write_eval(1, METRICS)
        writer.message("hello")
    assert not workdir.exists()
    assert capsys.readouterr().out == ""


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match="progress = 'loud'; choices: auto, bar, lines, none"):
        make(tmp_path, progress="loud")
    with pytest.raises(ValueError, match="gs://bucket/run"):
        make("gs://bucket/run")
    with make(tmp_path) as writer, pytest.raises(ValueError, match="metric 'step'"):
        writer.write(1, {"step": 2})


FULL_DISK = """
import resource, sys
from llm_jax.metrics.writer import MetricWriter
writer = MetricWriter(sys.argv[1], num_steps=9, start_step=0, progress="none")
writer.write(1, {"loss": 1.0})
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
try:
    writer.write(2, {"loss": 2.0})
except OSError as error:
    print("raised", type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
writer.write(3, {"loss": 3.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
"""


def test_full_disk_raises_and_leaves_whole_records(tmp_path):
    """The limit cuts the second record in its middle: it is taken back, and nothing is printed."""
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout == "raised OSError\n"
    assert result.stderr == ""
    text = (tmp_path / METRICS_FILE).read_text()
    assert text == '{"step": 1, "loss": 1.0}\n{"step": 3, "loss": 3.0}\n'
