"""Eight fake devices for every test; must be set before jax starts."""

import os
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute: the compiler may take it easy.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAKE_DEVICES = os.environ.get("FAKE_DEVICES", "8")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={FAKE_DEVICES} {FAST_COMPILE}"

import pytest  # noqa: E402


@pytest.fixture
def run_python():
    """Runs `python -m MODULE ARGS...` or `python -c CODE` with one device, and waits."""

    def run(*arguments, timeout=300, env=None):
        environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE, **(env or {})}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def corpus(tmp_path):
    """Two folders of small texts, to mix: 60 documents of Python-like text and 40 of prose."""
    import random

    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "hills"]
    for folder, count in (("code", 60), ("prose", 40)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            lines = [
                f"def f{i}_{j}(x):\n    return x * {rng.randrange(100)}\n"
                if folder == "code"
                else " ".join(rng.choices(words, k=12)) + ".\n"
                for j in range(rng.randrange(3, 12))
            ]
            (tmp_path / folder / f"{i:03d}.txt").write_text("".join(lines))
    return tmp_path
