"""Runs Python code that nobody has read: in a process of its own, with limits.

The process has no environment, an empty folder, and at most so much time, memory and output; on Linux no
network either, where the kernel lets an ordinary user cut it off. That stops accidents and loops. It is no
jail: code that means harm can read what this user can read, and start processes that outlive it, so run
untrusted models' code in a container.
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile

_MOST_OUTPUT = 1 << 20
# In the process itself, before the code: to fork this one, with its threads, and limit the child could hang.
_LIMITED = """
import ctypes, os, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for limit, value in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 1 << 20),
    (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(limit, (value, value))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # a signal first, then the end
os.environ.clear()  # Python itself has set a locale
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user and a network of its own
except (OSError, AttributeError):
    pass
mark = sys.stdin.readline()
code = sys.stdin.read()
sys.argv = ["program"]
told = os.dup(1)  # whatever the code does with its output
exec(compile(code, "program", "exec"), {"__name__": "__main__"})
os.write(told, ("\\n" + mark).encode())
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """passed: the code ran to its end. reason: "", or why not, in a line."""

    passed: bool
    reason: str = ""


def run_code(code: str, *, seconds: int = 5, memory_bytes: int = 1 << 30) -> Outcome:
    """Whether `code` runs to its end without an error. Code that exits early, with whatever status, fails."""
    mark = secrets.token_hex(
        16
    )  # what only code that came to its end prints; the code cannot know it
    with (
        tempfile.TemporaryDirectory(prefix="llm_jax_code_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED, str(seconds), str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(f"{mark}\n{code}".encode(errors="replace"), timeout=seconds + 2)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end after {seconds} s")
        finally:
            _kill_group(process)
        output.seek(0)
        lines = output.read(_MOST_OUTPUT + 100).decode(errors="replace").strip().splitlines()
    if process.returncode == 0 and mark in lines:
        return Outcome(True)
    if process.returncode == -signal.SIGXCPU:
        return Outcome(False, f"no end after {seconds} s")
    ended = f"ended with status {process.returncode} before its end"
    return Outcome(False, lines[-1][:200] if process.returncode and lines else ended)


def _kill_group(process: subprocess.Popen) -> None:
    """The process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
