"""Real servers, as processes, on free ports; the runs that they serve."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from saved_run import save_run
from tiny import run_config

MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, EOS, END, VOCABULARY = 256, 257, 262, 263
MAX_LENGTH = 512


def save_chat_run(workdir: Path, *, objective="sft") -> Path:
    """A model of bytes and marks for chats, with random weights."""
    model = {"vocab_size": 264, "max_length": MAX_LENGTH, "init_stddev": 0.2}
    tokenizer = {"name": "raw_bytes", "extra_tokens": MARKS}
    run = run_config(
        model=model,
        data={"tokenizer": tokenizer, "sources": [{"name": "jsonl", "path": "unread.jsonl"}]},
        objective={"name": objective},
    )
    save_run(workdir, run, extra_tokens=MARKS)
    return workdir


@dataclasses.dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str

    def get(self, path: str, **headers) -> tuple[int, dict, bytes]:
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body, **headers) -> tuple[int, dict, bytes]:
        """body: JSON as bytes, or anything to make it of."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, **{"content-type": "application/json", **headers})

    def ask(self, method: str, path: str, content, **headers) -> tuple[int, dict, bytes]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, content, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def health(self) -> dict:
        return json.loads(self.get("/health")[2])

    def is_idle(self, seconds: float = 10.0) -> bool:
        """Whether all slots get free, soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            health = self.health()
            if health["open"] == health["running"] == health["waiting"] == 0:
                return True
            time.sleep(0.02)
        return False


def command(*flags) -> list[str]:
    return [sys.executable, "-m", "llm_jax.serve", *map(str, flags)]


@contextlib.contextmanager
def serving(*flags, **environment) -> Iterator[Server]:
    """A server on a free port; stopped by SIGTERM if it still runs."""
    # One device, as a user has, not the eight of the tests.
    flags_of_tests = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(f for f in flags_of_tests if "device_count" not in f)
    variables = {**os.environ, "XLA_FLAGS": kept, **environment}
    process = subprocess.Popen(
        command("--port", 0, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=variables,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        if " at http://" not in line:
            process.kill()
            raise RuntimeError(f"no server: {line}{process.stderr.read()}")
        yield Server(process, line.split(" at ")[1].strip())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        process.stderr.close()
