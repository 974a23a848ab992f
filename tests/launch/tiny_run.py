"""A training run small enough to be started, killed and started again within seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
FAST_COMPILE = os.environ["XLA_FLAGS"].split(" ", 1)[1]
NUM_STEPS = 60

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"name": "gpt", "vocab_size": 384, "embed_dim": 32, "num_layers": 1,
                  "num_heads": 4, "mlp_dim": 64, "max_length": 64}},
        "data": {{"sequence_length": 64, "tokenizer": {{"name": "raw_bytes"}},
                 "sources": [{{"name": "text", "path": "{texts}"}}]}},
        "schedule": {{"name": "constant", "learning_rate": 1e-2}},
        "train": {{"num_steps": {num_steps}, "batch_size": 8, "log_every": 1,
                  "compute_dtype": "float32"}},
        "checkpoint": {{"save_every": 5}},
        "eval": {{"final_bytes": 1}},
    }})
"""


class TinyRun:
    """Files of one run: a config over llm_jax's own source, a workdir, a cache of compilations."""

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"
        self._launched: list[subprocess.Popen] = []
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(texts=REPO / "llm_jax/sharding", num_steps=NUM_STEPS))
        self.flags = ["--config", str(self.config), "--workdir", str(self.workdir)]
        self.env = {
            **os.environ,
            "XLA_FLAGS": FAST_COMPILE,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def __enter__(self) -> "TinyRun":
        return self

    def __exit__(self, *_):
        for process in self._launched:
            process.kill()
            process.communicate()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def python(self, script: str, *arguments) -> subprocess.Popen:
        """Starts `python launch/SCRIPT ARGUMENTS`; its output, errors included, is in `.stdout`."""
        process = subprocess.Popen(
            [sys.executable, str(LAUNCH / script), *map(str, arguments)], env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._launched.append(process)
        return process

    def kill_one(self, after_step: int) -> None:
        """Kill -9 of one of the two processes, once a checkpoint after this step is there."""
        wait_until(lambda: max(self.saved(), default=0) > after_step, 120, self)
        processes = self.processes()
        assert len(processes) == 2
        os.kill(processes[-1], signal.SIGKILL)

    def __str__(self) -> str:
        return f"steps {self.steps()}, saved {self.saved()}, processes {self.processes()}"

    def steps(self) -> list[int]:
        """The steps that metrics.jsonl holds."""
        return [record["step"] for record in self._records() if "loss" in record]

    def resumed(self) -> list[int]:
        """The first steps after each resume."""
        return [record["step"] for record in self._records() if record.get("resumed")]

    def saved(self) -> list[int]:
        """The steps of finished checkpoints."""
        folder = self.workdir / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def processes(self) -> list[int]:
        """The ids of the live training processes of this workdir."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # no process, or it is gone by now
            is_python = os.path.basename(command[0]).startswith(b"python")  # not srun, nor a shell
            if is_python and {b"llm_jax.train", bytes(self.workdir)} <= set(command):
                found.append(int(entry.name))
        return sorted(found)

    def _records(self) -> list[dict]:
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(condition, seconds: float, what):
    """Waits for a true value, and returns it; `what`, as it is then, explains a failure."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return value
