"""Real processes, really killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"name": "gpt", "vocab_size": 384, "embed_dim": 32, "num_layers": 2,
                  "num_heads": 4, "mlp_dim": 64, "max_length": 32, "dropout": 0.1}},
        "data": {{"sequence_length": 32, "mode": "{mode}", "tokenizer": {{"name": "raw_bytes"}},
                 "sources": [
                     {{"name": "text", "path": "{corpus}/code", "weight": 0.7}},
                     {{"name": "text", "path": "{corpus}/prose", "weight": 0.3}}]}},
        "schedule": {{"learning_rate": 1e-2}},
        "train": {{"num_steps": 24, "batch_size": 4, "log_every": 1}},
        "checkpoint": {{"save_every": 4, "keep_last": 2}},
        "eval": {{"every": 8, "max_batches": 1, "final_bytes": 2000}},
    }})
"""
# Wall-clock figures; all else must be equal to the bit.
TIMED = {"tokens_per_second", "mfu", "mfu_causal_half", "resumed"}


def start(config, workdir, *overrides):
    command = [sys.executable, "-m", "llm_jax.train", "--config", config, "--workdir", workdir]
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].split(" ", 1)[1],
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*map(str, command), *overrides], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(config, workdir, *overrides):
    process = start(config, workdir, *overrides)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def final_arrays(workdir):
    folder = workdir / "checkpoints" / "24"
    return [ocp.load(folder, checkpointable_name=part) for part in ("model", "optimizer")]


def assert_same_run(one, other):
    assert records(one) == records(other)
    import jax

    a, b = map(jax.tree.leaves, (final_arrays(one), final_arrays(other)))
    assert len(a) == len(b) > 20
    for x, y in zip(a, b, strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def config(request, corpus):
    path = corpus / "config.py"
    mode = getattr(request, "param", "shards")
    path.write_text(CONFIG.format(corpus=corpus, mode=mode))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("config", ["shards", "stream"], indirect=True)
def test_killed_runs_end_like_uninterrupted_ones(config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = finish(config, whole)
    assert code == 0, output
    assert [r["step"] for r in records(whole) if "loss" in r] == list(range(1, 25))

    rng = random.Random(os.path.basename(tmp_path))
    for kill_at in sorted(rng.sample(range(5, 23), 2)):
        process = start(config, killed)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None:
            lines = metrics.read_text().count('"loss"') if metrics.exists() else 0
            if lines >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        process.communicate()
    code, output = finish(config, killed)
    assert code == 0, output
    assert "resuming after step" in output
    assert_same_run(whole, killed)


@pytest.mark.parametrize("config", ["stream"], indirect=True)
def test_sigterm_saves_and_the_next_run_goes_on(config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish(config, whole)[0] == 0
    process = start(config, stopped, "--config.checkpoint.save_every=1000")
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.terminate()
            break
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM, saved at step" in output
    code, output = finish(config, stopped)
    assert code == 0, output
    assert "changed since that checkpoint: config.checkpoint.save_every: 1000 -> 4" in output
    assert_same_run(whole, stopped)


@pytest.mark.slow
def test_a_busy_workdir_is_refused(config, tmp_path):
    first = start(config, tmp_path / "run", "--config.train.num_steps=100000")
    try:
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        code, output = finish(config, tmp_path / "run")
        assert code == 1
        assert f"is in use by process {first.pid}" in output
        assert "Traceback" not in output
    finally:
        first.kill()
        first.communicate()


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    # A clipped Adam cannot be driven to infinity quickly; an infinite z-loss can.
    code, output = finish(config, tmp_path / "run", "--config.objective.name=causal_lm",
                          "--config.objective.z_loss=1e38", "--config.schedule.learning_rate=1e3",
                          "--config.checkpoint.save_every=1")  # fmt: skip
    assert code == 1, output
    assert "training stopped" in output
    assert "(batch " in output
    assert "Traceback" not in output
