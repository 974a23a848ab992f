"""Compiles training steps in processes of their own, and remembers what came of them.

Compiling for TPUs loads libtpu, which then looks for a TPU, logs by the page and needs gigabytes; a
process of its own keeps all that away from the caller, who needs neither jax nor devices. Answers are
kept in a folder by two keys: of the request and all sources of this package, which costs nothing to look
up, and of the lowered program, which survives edits that do not change it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.planner.compiled import CompiledStep, is_saved
from llm_jax.planner.topology import ENVIRONMENT, libtpu_version, parse_target

# The files of a worker's folder.
REQUEST, ANSWER, STEP, LOG = "request.json", "answer.json", "step", "log.txt"
KEPT, DAY, UNFINISHED = 200, 86_400, ".compiling-"

CompileError = ConfigError | RunError

_FAILURE = re.compile(r"Check failed|^F\d{4}|^[\w.]*(Error|Exception)\b|Fatal Python error")


@dataclasses.dataclass(frozen=True)
class Request:
    """config: a resolved run as plain dicts (core.config.to_dict). target: as topology.parse_target takes it.

    options: of the compiler, beside those that training sets.
    """

    config: Mapping[str, Any]
    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm_jax" / "plans"


def compile_step(
    request: Request, cache: Path | None = None, *, stop: threading.Event | None = None
) -> CompiledStep:
    """Lowers and compiles the training step of a run for a target, or recalls it.

    That a step does not fit in memory is an answer, not an error: see CompiledStep.out_of_memory.

    Args:
      cache: the folder of earlier answers, made if absent; None to compile in any case.
      stop: when set, the compiler is killed and RunError raised.

    Raises:
      ConfigError: a target that has no compiler here, a config that cannot be built on it, libtpu missing.
      RunError: the compiler crashed; names its log.
    """
    _check(request.target)
    first = _request_key(request)
    step = _recall(cache, first)
    if step is not None:
        return dataclasses.replace(step, config=request.config)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache) as name:
        folder = Path(name)
        content = {**dataclasses.asdict(request), "cache": None if cache is None else str(cache)}
        (folder / REQUEST).write_text(json.dumps(content))
        answer = _run_worker(folder, request.target, stop or threading.Event())
        if cache is None:
            return CompiledStep.load(folder / STEP)
        step = _remember(cache, first, answer["key"], folder / STEP)
    if step is None:  # the worker saw it there, and another process has tidied it away since
        return compile_step(request, stop=stop)
    # Configs that differ in what is no part of the program share an answer, not the speed of a machine.
    measured = answer.get("measured", step.measured)
    return dataclasses.replace(step, config=request.config, measured=measured)


def compile_many(
    requests: Sequence[Request],
    jobs: int = 2,
    cache: Path | None = None,
) -> "Iterator[tuple[Request, CompiledStep | CompileError]]":
    """Compiles `jobs` at a time; yields each as it ends, failures too.

    Leaving the iterator early, by an exception such as Ctrl-C or by closing it, kills what still runs.
    """
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(max(1, jobs), "compile")
    try:
        waiting = {pool.submit(compile_step, one, cache, stop=stop): one for one in requests}
        for future in concurrent.futures.as_completed(waiting):
            request, error = waiting[future], future.exception()
            if error is not None and not isinstance(error, CompileError):
                raise error
            yield request, future.result() if error is None else error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def versions(target: str) -> dict[str, str]:
    """Of what compiles for a target."""
    names = ("jax", "jaxlib") if target == "local" else ("jax", "jaxlib", "libtpu")
    return {name: importlib.metadata.version(name) for name in names}


def _check(target: str) -> None:
    kind = parse_target(target).kind
    if kind == "gpu":
        raise ConfigError(
            f"topology {target!r}: GPUs are compiled for on a machine that has them, as topology "
            "local; elsewhere there is only an estimate"
        )
    if kind == "tpu":
        libtpu_version()


def _run_worker(folder: Path, target: str, stop: threading.Event) -> dict[str, Any]:
    """The worker's answer; no log line of the compiler passes through.

    Raises:
      ConfigError, RunError: as `compile_step`.
    """
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llm_jax.planner.worker", str(folder)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(target),
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, stop)
        finally:
            # Whoever leaves early, by Ctrl-C too, takes the compiler along.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdin.close()
    if stop.is_set():
        raise RunError(f"compiling for {target} was stopped")
    if not (folder / ANSWER).is_file():
        raise RunError(_crash(folder / LOG, target, process.returncode))
    answer = json.loads((folder / ANSWER).read_text())
    if answer["kind"] != "step":
        raise {"config": ConfigError, "run": RunError}[answer["kind"]](answer["message"])
    return answer


def _wait(process: subprocess.Popen, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return


def _crash(log: Path, target: str, status: int) -> str:
    """Keeps the log of a worker that died, and says so in a line."""
    handle, kept = tempfile.mkstemp(prefix="llm_jax_compile_", suffix=".log")
    os.close(handle)
    shutil.copyfile(log, kept)
    if status == -signal.SIGKILL:
        return f"compiling for {target} was killed: probably this machine ran out of memory; log: {kept}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # After the line that says what failed, C++ prints its stack.
    saying = [line for line in lines if _FAILURE.search(line)] or lines
    last = saying[-1].strip() if saying else f"exit status {status}"
    return f"compiling for {target} failed: {last[:300]}; log: {kept}"


def _environment(target: str) -> dict[str, str]:
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # An answer from jax's own cache comes without the compiler's dumps.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if target != "local":
        for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "LLM_JAX_XLA_FLAGS"):
            environment.pop(variable, None)
        environment |= {**ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    return environment


def _request_key(request: Request) -> str | None:
    """None for the devices at hand, of which nothing is known without starting jax."""
    if request.target == "local":
        return None
    lowers = {name: importlib.metadata.version(name) for name in ("flax", "optax")}
    about = [dataclasses.asdict(request), versions(request.target), lowers, _sources()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _recall(cache: Path | None, first: str | None) -> CompiledStep | None:
    if cache is None or first is None:
        return None
    try:
        folder = cache / (cache / f"{first}.key").read_text()
        step = CompiledStep.load(folder)
        os.utime(folder)
    except (OSError, ValueError, TypeError, KeyError):  # nothing there, or of another version
        return None
    return step


def _remember(cache: Path, first: str | None, key: str, made: Path) -> CompiledStep | None:
    """Moves a new answer into the cache. Others may write there too: a whole folder appears at once.

    Returns None where there is neither a new answer nor one in the cache.
    """
    folder = cache / key
    if made.is_dir():
        if not is_saved(folder):  # nothing, or what was left of a folder
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # someone was faster
            made.rename(folder)
    try:
        step = CompiledStep.load(folder)
        os.utime(folder)
    except FileNotFoundError:
        return None
    if first is not None:
        part = made.parent / "key"
        part.write_text(key)
        part.rename(cache / f"{first}.key")
    _forget(cache)
    return step


def _forget(cache: Path) -> None:
    """Keeps the newest answers and the keys that lead to one; drops what a killed process left."""
    ages: dict[Path, float] = {}
    for entry in cache.iterdir():
        with contextlib.suppress(OSError):  # others tidy here too
            if entry.is_dir():
                ages[entry] = time.time() - entry.stat().st_mtime
    answers = sorted((e for e in ages if not _unfinished(e)), key=ages.get)
    dead = [e for e, age in ages.items() if _unfinished(e) and age > DAY]
    for folder in (*answers[KEPT:], *dead):
        shutil.rmtree(folder, ignore_errors=True)
    for file in cache.glob("*.key"):
        with contextlib.suppress(OSError):
            if not (cache / file.read_text()).is_dir():
                file.unlink()


def _unfinished(folder: Path) -> bool:
    return folder.name.startswith(UNFINISHED)
