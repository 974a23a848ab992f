"""One process with one device, one with eight, two with four, four with two: the same run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"name": "gpt", "vocab_size": 384, "embed_dim": 32, "num_layers": 2,
                  "num_heads": 4, "mlp_dim": 64, "max_length": 32}},
        "data": {{"sequence_length": 32, "mode": "{mode}", "tokenizer": {{"name": "raw_bytes"}},
                 "shards_path": "{corpus}/prepared",
                 "sources": [
                     {{"name": "text", "path": "{corpus}/code", "weight": 0.7}},
                     {{"name": "text", "path": "{corpus}/prose", "weight": 0.3}}]}},
        "schedule": {{"name": "constant", "learning_rate": 3e-3}},
        "train": {{"batch_size": 8, "log_every": 1, "compute_dtype": "float32"}},
        "eval": {{"final_bytes": 1}},
    }})
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Processes, devices of each, mesh. A process has neighbours along the last axes.
SETUPS = {
    "one": (1, 1, {}),
    "eight": (1, 8, {"fsdp": 4, "tensor": 2}),
    # fsdp crosses the processes
    "pair": (2, 4, {"fsdp": 4, "tensor": 2}),
    # fsdp and context cross them: two processes hold the same rows
    "four": (4, 2, {"fsdp": 2, "context": 2, "tensor": 2}),
    # data and tensor cross them
    "four_tensor": (4, 2, {"data": 2, "tensor": 4}),
}


def train(setup, config, workdir, num_steps):
    """Runs to `num_steps` on a setup; the output of each process."""
    processes, devices, mesh = SETUPS[setup]
    command = [sys.executable, "-m", "llm_jax.train", "--config", config, "--workdir", workdir,
               f"--config.train.num_steps={num_steps}",
               *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())]  # fmt: skip
    fast = os.environ["XLA_FLAGS"].split(" ", 1)[1]
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {fast}",
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    address = f"127.0.0.1:{free_port()}"
    running = []
    for index in range(processes):
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(index)}  # fmt: skip
        running.append(
            subprocess.Popen(list(map(str, command)), env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [p.returncode for p in running] == [0] * processes, "\n".join(outputs)
    return outputs


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in lines if "loss" in r}


def check(mode, chain, corpus):
    """Each link of the chain goes on from the checkpoint that the one before it left."""
    config = corpus / "config.py"
    config.write_text(CONFIG.format(corpus=corpus, mode=mode))
    whole, passed_on = corpus / "whole", corpus / "passed_on"
    train("one", config, whole, len(chain))
    for step, setup in enumerate(chain, 1):
        outputs = train(setup, config, passed_on, step)
        if step > 1:
            assert f"resuming after step {step - 1}" in outputs[0]
    expected, found = losses(whole), losses(passed_on)
    assert list(found) == list(range(1, len(chain) + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-5)


@pytest.mark.slow
def test_checkpoints_pass_between_all_setups(corpus):
    chain = ["one", "four", "pair", "four_tensor", "eight"]
    check("shards", chain, corpus)


@pytest.mark.slow
def test_a_stream_goes_on_with_another_number_of_processes(corpus):
    check("stream", ["pair", "one"], corpus)
