"""Real processes, really killed: the others end in time, name it, and the run goes on afterwards."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"name": "gpt", "vocab_size": 384, "embed_dim": 12, "num_layers": 1,
                  "num_heads": 2, "mlp_dim": 24, "max_length": 16}},
        "data": {{"sequence_length": 16, "tokenizer": {{"name": "raw_bytes"}},
                 "shards_path": "{corpus}/prepared",
                 "sources": [{{"name": "text", "path": "{corpus}/code"}}]}},
        "train": {{"num_steps": 100000, "batch_size": 6, "log_every": 1, "peer_timeout": 8.0}},
        "checkpoint": {{"save_every": 3, "keep_last": 2}},
        "eval": {{"final_bytes": 1}},
    }})
"""
TIMEOUT, PEER_LOST = 8.0, 75


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """`count` processes of one command that find each other; their outputs are kept in files."""

    def __init__(self, folder, count, command, *, devices):
        self.workdir = folder / "run"
        fast = os.environ["XLA_FLAGS"].split(" ", 1)[1]
        env = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {fast}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.outputs = [folder / f"output{index}" for index in range(count)]
        self.processes = []
        for index in range(count):
            with open(self.outputs[index], "w") as output:
                self.processes.append(
                    subprocess.Popen(
                        list(map(str, command)), env={**env, "JAX_PROCESS_ID": str(index)},
                        stdout=output, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def wait_for_step(self, step, limit=150):
        """Until the metrics tell of this step."""
        metrics, deadline = self.workdir / "metrics.jsonl", time.monotonic() + limit
        while time.monotonic() < deadline:
            if metrics.exists() and any(found >= step for found in steps_of(metrics)):
                return
            assert all(p.poll() is None for p in self.processes), self.text()
            time.sleep(0.05)
        raise AssertionError(f"step {step} did not come: {self.text()}")

    def finish(self, limit):
        """Exit statuses, in order; every process must end within `limit` seconds."""
        deadline = time.monotonic() + limit
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]

    def text(self):
        return "\n".join(f"[{i}] {path.read_text()}" for i, path in enumerate(self.outputs))

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


def steps_of(metrics):
    lines = (line for line in metrics.read_text().splitlines() if line.endswith("}"))
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture
def run(corpus):
    """Starts a training of many steps in `count` processes of one device each."""
    jobs = []
    config = corpus / "config.py"
    config.write_text(CONFIG.format(corpus=corpus))

    def start(count, *overrides):
        command = [sys.executable, "-m", "llm_jax.train", "--config", config]
        command += ["--workdir", corpus / "run", f"--config.mesh.fsdp={count}", *overrides]
        jobs.append(Job(corpus, count, command, devices=1))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), [(2, 1), (3, 0)])
def test_a_killed_process_ends_the_run_and_is_named(run, count, victim):
    job = run(count)
    job.wait_for_step(5)
    while not (job.workdir / "checkpoints" / "3").is_dir():
        time.sleep(0.05)
    job.processes[victim].kill()
    statuses = job.finish(4 * TIMEOUT)
    text = job.text()
    expected = [-signal.SIGKILL if i == victim else PEER_LOST for i in range(count)]
    assert statuses == expected, text
    assert "Traceback" not in text
    assert "Check failure" not in text
    told = re.findall(
        rf"process {victim} \(host {socket.gethostname()}\) has not been heard of for \d+ s: "
        r"this process ends; the last checkpoint is step (\d+); start again to go on",
        text,
    )
    assert len(told) == count - 1, text
    kept = int(told[0])
    assert kept >= 3
    if victim == 0:
        return
    again = run(count, f"--config.train.num_steps={kept + 2}")
    assert again.finish(150) == [0] * count, again.text()
    assert f"resuming after step {kept}" in again.text()


@pytest.mark.slow
def test_a_signal_to_one_stops_the_run_at_one_step(run):
    job = run(2, "--config.checkpoint.save_every=100000")
    job.wait_for_step(3)
    job.processes[1].terminate()
    statuses = job.finish(60)
    text = job.text()
    assert statuses == [128 + signal.SIGTERM] * 2, text
    saved = re.search(r"stopped by SIGTERM, saved at step (\d+); run again to go on", text)
    assert saved, text
    assert [p.name for p in (job.workdir / "checkpoints").iterdir()] == [saved[1]]


WATCHED = """
import os, random, signal, subprocess, sys, time
from pathlib import Path
import jax
from jax.experimental import multihost_utils
from llm_jax.core.flags import RunError, run_entry
from llm_jax.sharding.distributed import start_distributed
from llm_jax.training import peers
from llm_jax.training.guard import StopRequest
from llm_jax.training.peers import explaining, watching

def main():
    start_distributed(peer_timeout=4.0)
    index = jax.process_index()
    with watching(4.0, Path("nowhere")):
        {body}

run_entry(main)
"""


@pytest.fixture
def script(tmp_path):
    """Starts the body in `count` processes that watch each other, without training."""
    jobs = []

    def start(count, body):
        code = WATCHED.format(body=textwrap.indent(textwrap.dedent(body), " " * 8).strip())
        jobs.append(Job(tmp_path, count, [sys.executable, "-c", code], devices=1))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()


def test_a_process_that_fails_says_so_and_the_others_name_it(script):
    job = script(3, """
        if index == 1:
            time.sleep(1)
            raise RunError("the disk is full")
        multihost_utils.sync_global_devices("never together")
    """)  # fmt: skip
    assert job.finish(40) == [PEER_LOST, 1, PEER_LOST], job.text()
    line = (
        f"process 1 (host {socket.gethostname()}) ended: the disk is full: this process ends; "
        "there is no checkpoint yet; start again to go on"
    )
    assert [line in output.read_text() for output in job.outputs] == [True, False, True], job.text()
    assert "error: the disk is full" in job.outputs[1].read_text()
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_the_others_wait_for_one_that_takes_longer_to_end(script):
    """As process 0 does, which reports and evaluates after the last step."""
    job = script(2, """
        if index == 0:
            import atexit
            atexit.register(time.sleep, 8)  # before jax's own end
    """)  # fmt: skip
    assert job.finish(40) == [0, 0], job.text()
    assert "Terminating process" not in job.text()


@pytest.mark.slow
def test_one_that_is_done_still_misses_another_that_is_lost(script):
    job = script(2, """
        if index == 1:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
    """)  # fmt: skip
    assert job.finish(30) == [PEER_LOST, -signal.SIGKILL], job.text()
    assert "process 1 (host" in job.outputs[0].read_text()


def test_an_error_that_a_lost_process_caused_names_that_process(script):
    """As when a checkpoint cannot be written because its collective has lost a member."""
    job = script(2, """
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            raise ValueError("UNKNOWN: Gloo AllGather failed: connection reset by peer")
        except ValueError as error:
            raise RunError("the checkpoint could not be written") from error
    """)  # fmt: skip
    assert job.finish(40) == [PEER_LOST, -signal.SIGKILL], job.text()
    text = job.outputs[0].read_text()
    assert "process 1 (host" in text
    assert "has not been heard of for" in text
    assert "could not be written" not in text


def test_an_error_of_another_library_is_not_blamed_on_a_peer(script):
    job = script(2, """
        if index == 1:
            try:
                raise RuntimeError("INTERNAL: src/trainer_interface.cc(638) Vocabulary size is smaller")
            except RuntimeError as error:
                raise RunError("sentencepiece cannot train 300 pieces") from error
        time.sleep(30)
    """)  # fmt: skip
    assert job.finish(40) == [PEER_LOST, 1], job.text()
    assert "error: sentencepiece cannot train 300 pieces" in job.outputs[1].read_text()


def test_an_error_of_ones_own_device_is_not_blamed_on_a_peer(script):
    job = script(2, """
        if index == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        time.sleep(30)
    """)  # fmt: skip
    assert job.finish(40) == [PEER_LOST, 1], job.text()
    assert "ended: RESOURCE_EXHAUSTED: out of memory" in job.outputs[0].read_text()


@pytest.mark.slow
def test_the_others_wait_for_process_0_to_explain(script):
    """As when all run out of memory in one step, and a compiler is to say why."""
    job = script(3, """
        with explaining():
            if index == 0:
                time.sleep(6)  # longer than silence is allowed to last
                print("because", flush=True)
        raise RunError("out of device memory")
    """)  # fmt: skip
    assert job.finish(40) == [1, 1, 1], job.text()
    outputs = [output.read_text() for output in job.outputs]
    assert "because" in outputs[0]
    assert all("error: out of device memory" in text for text in outputs), job.text()


def test_nobody_waits_for_an_explanation_that_does_not_come(script):
    job = script(2, """
        peers._UNTIL_EXPLAINING_MS = 2_000
        if index == 1:
            with explaining():
                pass
            raise RunError("out of device memory")
        time.sleep(40)
    """)  # fmt: skip
    assert job.finish(40) == [PEER_LOST, 1], job.text()
    assert "ended: out of device memory" in job.outputs[0].read_text()


def test_a_coordinator_that_stops_answering_is_named(script):
    """As when the host of process 0 is cut off: no connection breaks, nothing answers."""
    job = script(2, """
        if index == 0:
            found = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True)
            os.kill(int(found.stdout.split()[0]), signal.SIGSTOP)
            print("frozen", found.stdout.split()[0], flush=True)
        time.sleep(30)
    """)  # fmt: skip
    try:
        statuses = job.finish(40)
    finally:
        frozen = re.search(r"frozen (\d+)", job.outputs[0].read_text())
        os.kill(int(frozen[1]), signal.SIGKILL)
    assert statuses == [PEER_LOST] * 2, job.text()
    line = "which coordinates, has not answered for"
    assert all(line in output.read_text() for output in job.outputs), job.text()
    assert "Check failure" not in job.text()


def test_all_stop_at_the_same_step_however_their_paces_and_signals_fall(script):
    job = script(3, """
        pace = random.Random(index)
        signalled = {0: None, 1: 0.9, 2: 1.1}[index]
        began = time.monotonic()
        with StopRequest() as request:
            for step in range(1, 10_000):
                time.sleep(pace.uniform(0, 0.02))
                if signalled and time.monotonic() - began > signalled:
                    signalled = None
                    os.kill(os.getpid(), signal.SIGTERM if index == 1 else signal.SIGINT)
                if request.agreed(step):
                    break
        print("stopped at", step, request.name, flush=True)
    """)  # fmt: skip
    assert job.finish(60) == [0, 0, 0], job.text()
    stops = re.findall(r"stopped at (\d+) (SIG\w+)", job.text())
    assert len(stops) == 3
    assert len(set(stops)) == 1, job.text()
    assert 1 < int(stops[0][0]) < 9_999
