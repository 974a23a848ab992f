"""Trains with several processes on this machine: CPU devices, or one process per GPU.

    python launch/local.py --processes 2 --devices_per_process 4 -- --config FILE --workdir DIR
    python launch/local.py --gpus all -- --config FILE --workdir DIR

What follows `--` goes to `python -m llm_jax.train`, run in this folder by this Python. Each line of
output carries the number of its process. Signals are passed on, so that the run saves. When one
process fails the others are ended: their next collective would wait for it forever.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import run_entry

POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Process:
    """One process to start: its command, and what it sees beyond this environment."""

    command: list[str]
    variables: dict[str, str]

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return shlex.join([*variables, *self.command])


def main() -> None:
    arguments = parse()
    processes = plan(arguments)
    if arguments.dry_run:
        for process in processes:
            print(process)
        return
    sys.exit(Group(processes, arguments.grace).run())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python launch/local.py [options] -- FLAGS OF llm_jax.train",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, help="how many, on CPU devices")
    parser.add_argument("--devices_per_process", type=int, help="CPU devices of each (1)")
    parser.add_argument("--gpus", metavar="all|0,1,...", help="a process for each of these GPUs")
    parser.add_argument("--port", type=int, help="of the coordinator, on this machine (a free one)")
    parser.add_argument("--grace", type=float, default=10, metavar="SECONDS",
                        help="from SIGTERM to SIGKILL for what is left of a failed run (10)")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("flags", nargs="*", help="of llm_jax.train")
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> list[Process]:
    """The processes that these arguments ask for.

    Raises:
      ConfigError: sizes below one, both GPUs and CPU devices, no such GPU, or nothing to train.
    """
    if not arguments.flags:
        raise ConfigError("nothing to train: give the flags of llm_jax.train after --")
    devices = devices_by_process(arguments)
    job = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{arguments.port or free_port()}",
        "JAX_NUM_PROCESSES": str(len(devices)),
    }
    command = [sys.executable, "-m", "llm_jax.train", *arguments.flags]
    return [
        Process(command, {**variables, **job, "JAX_PROCESS_ID": str(index)})
        for index, variables in enumerate(devices)
    ]


def devices_by_process(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The variables that give each process its devices."""
    if (arguments.gpus is None) == (arguments.processes is None):
        raise ConfigError("give one of --processes N (CPU devices) and --gpus all or 0,1,...")
    if arguments.gpus is not None:
        if arguments.devices_per_process is not None:
            raise ConfigError("--devices_per_process counts CPU devices: leave it out with --gpus")
        platforms = os.environ.get("JAX_PLATFORMS") or "cuda,cpu"
        return [
            {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": gpu}
            for gpu in chosen_gpus(arguments.gpus)
        ]
    for flag in ("processes", "devices_per_process"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise ConfigError(f"--{flag}={value}: expected at least 1")
    count = str(arguments.devices_per_process or 1)
    return [{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count}] * arguments.processes


def chosen_gpus(choice: str) -> list[str]:
    """The CUDA names, by `--gpus`, of this machine's GPUs.

    Raises:
      ConfigError: not a list, a GPU named twice, or no GPU is found.
    """
    if choice != "all":
        gpus = choice.split(",")
        if not all(gpus) or len(set(gpus)) < len(gpus):
            raise ConfigError(f"--gpus={choice}: expected all, or different GPUs as in 0,1,2")
        return gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    if shutil.which("nvidia-smi") is None:
        raise ConfigError("nvidia-smi not found: install the NVIDIA driver, or name the --gpus")
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    gpus = answer.stdout.split()
    if answer.returncode or not gpus:
        reason = (answer.stderr or answer.stdout).strip().splitlines()
        raise ConfigError(f"nvidia-smi lists no GPUs: {reason[0] if reason else 'no output'}")
    return gpus


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """Processes that start together and end together."""

    def __init__(self, processes: Sequence[Process], grace: float):
        """grace: seconds that the others have to leave by themselves after one failed."""
        self.plans, self.grace = processes, grace
        self.running: list[subprocess.Popen] = []
        self._passed_on: set[int] = set()
        self._print = threading.Lock()

    def run(self) -> int:
        """Runs all to their end. Returns the exit status of the first that failed, else 0.

        A process that ends by a signal passed on counts as failed only when no other did.
        """
        before = {s: signal.signal(s, self._pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            readers = [self._start(index, plan) for index, plan in enumerate(self.plans)]
            failed = self._wait()
            self._kill_all()  # what they left behind holds the pipes that the readers read
            for reader in readers:
                reader.join()
        finally:
            self._kill_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        statuses = [_status(process) for process in self.running]
        return failed or next((status for status in statuses if status), 0)

    def _start(self, index: int, plan: Process) -> threading.Thread:
        # A session of its own: Ctrl-C in the terminal must come once, by way of this process.
        process = subprocess.Popen(
            plan.command, env=os.environ | plan.variables, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.running.append(process)
        reader = threading.Thread(target=self._copy_output, args=(index, process), daemon=True)
        reader.start()
        return reader

    def _copy_output(self, index: int, process: subprocess.Popen) -> None:
        # Nobody reads any more: closing the pipe tells the process so.
        with contextlib.suppress(BrokenPipeError), process.stdout:
            for line in process.stdout:
                self._say(b"[%d] %s\n" % (index, line.rstrip(b"\n")))

    def _say(self, line: bytes) -> None:
        with self._print:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def _wait(self) -> int | None:
        """Waits until all have ended, and ends the others once one has failed. Its status."""
        failed, deadline = None, float("inf")
        while any(process.poll() is None for process in self.running):
            if failed is None and (failed := self._first_failure()) is not None:
                deadline = time.monotonic() + self.grace
                self._signal_all(signal.SIGTERM)
            if time.monotonic() > deadline:
                self._kill_all()
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        return failed if failed is not None else self._first_failure()

    def _first_failure(self) -> int | None:
        asked = {0} | {128 + number for number in self._passed_on}
        for index, process in enumerate(self.running):
            if process.poll() is not None and (status := _status(process)) not in asked:
                self._say(b"process %d ended with status %d: ending the others\n" % (index, status))
                return status
        return None

    def _pass_on(self, number: int, _frame) -> None:
        if len(self.running) < len(self.plans):
            sys.exit(128 + number)  # nothing to save yet
        self._passed_on.add(number)
        self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)

    def _kill_all(self) -> None:
        """Kills the processes and those that they started: each is the leader of its group."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _status(process: subprocess.Popen) -> int:
    """As a shell gives it: 128 and the signal for a process that died of one."""
    code = process.returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    run_entry(main)
