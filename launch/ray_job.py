"""Trains on a Ray cluster, one worker per host or share of a host, and starts again after a loss.

    python launch/ray_job.py --num_workers 2 --gpus_per_worker 8 -- --config FILE --workdir DIR

What follows `--` goes to `python -m llm_jax.train`, once per worker, as a process of its own: Ray
sees to places and restarts, and jax joins the processes. The workdir must be a folder that all
nodes see; after a restart the run goes on from its newest checkpoint there.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError, run_entry

POLL_SECONDS = 0.5
STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK")


def main() -> None:
    arguments = parse()
    bundle = resources_per_worker(arguments)
    if arguments.dry_run:
        print("\n".join(describe(arguments, bundle)))
        return
    sys.exit(Launch(arguments, bundle).run())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python launch/ray_job.py [options] -- FLAGS OF llm_jax.train",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--address", default="auto", help="of the cluster (RAY_ADDRESS, or the one running here)")
    add("--num_workers", type=int, required=True, help="training processes")
    add("--cpus_per_worker", type=float, default=1, help="(1)")
    add("--gpus_per_worker", type=int, default=0, help="(0)")
    add("--resources", default="{}", metavar="JSON", help="""more of each, as '{"TPU": 4}'""")
    add("--strategy", choices=STRATEGIES, default=STRATEGIES[0], help="places of the workers")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="set for all processes")
    add("--max_restarts", type=int, default=0, help="attempts after the first (0)")
    add("--wait", type=float, default=600, metavar="SECONDS", help="for room on the cluster (600)")
    add("--grace", type=float, default=10, metavar="SECONDS",
        help="from SIGTERM to SIGKILL for what is left of a failed attempt (10)")  # fmt: skip
    add("--dry_run", action="store_true", help="print what would run, start nothing")
    add("flags", nargs="*", help="of llm_jax.train")
    return parser.parse_args(argv)


def resources_per_worker(arguments: argparse.Namespace) -> dict[str, float]:
    """What Ray sets aside for each worker.

    Raises:
      ConfigError: sizes out of range, a malformed --env, or nothing to train.
    """
    if not arguments.flags:
        raise ConfigError("nothing to train: give the flags of llm_jax.train after --")
    for name, least in (("num_workers", 1), ("cpus_per_worker", 0), ("gpus_per_worker", 0),
                        ("max_restarts", 0)):  # fmt: skip
        if (value := getattr(arguments, name)) < least:
            raise ConfigError(f"--{name}={value}: expected at least {least}")
    for setting in arguments.env:
        if "=" not in setting:
            raise ConfigError(f"--env={setting}: expected NAME=VALUE")
    bundle = {
        "CPU": arguments.cpus_per_worker,
        "GPU": arguments.gpus_per_worker,
        **named_resources(arguments.resources),
    }
    bundle = {name: count for name, count in bundle.items() if count}
    if not bundle:
        raise ConfigError("a worker needs something: --cpus_per_worker, --gpus_per_worker or more")
    return bundle


def named_resources(text: str) -> dict[str, float]:
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(v, int | float) for v in given.values()):
        raise ConfigError(f'--resources={text}: expected JSON of names and numbers: {{"TPU": 4}}')
    return given


def variables(arguments: argparse.Namespace, address: str, index: int) -> dict[str, str]:
    """What the process of worker `index` sees beyond the environment of its Ray node."""
    return dict(setting.split("=", 1) for setting in arguments.env) | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(arguments.num_workers),
        "JAX_PROCESS_ID": str(index),
    }


def describe(arguments: argparse.Namespace, bundle: Mapping[str, float]) -> list[str]:
    lines = [
        f"connect to the Ray cluster at {arguments.address}",
        f"reserve {arguments.num_workers} x {json.dumps(bundle)}, {arguments.strategy}",
    ]
    for index in range(arguments.num_workers):
        seen = variables(arguments, "IP_OF_WORKER_0:FREE_PORT", index)
        words = [f"{name}={value}" for name, value in seen.items()]
        words += ["python", "-m", "llm_jax.train", *arguments.flags]
        lines.append(f"worker {index}: {shlex.join(words)}")
    return [
        *lines,
        f"when a worker fails: stop all, start again at most {arguments.max_restarts} x",
    ]


class Worker:
    """A Ray actor with one training process. Ray sends this class to nodes that lack this file."""

    def __init__(self, index: int):
        self.index = index
        self.process: subprocess.Popen | None = None
        self.asked: list[int] = []  # signals that came before the process was there

    def __repr__(self) -> str:  # Ray puts it before each line of output
        return f"process {self.index}"

    def address(self) -> str:
        """A free port of this node, for process 0 to listen on."""
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def train(self, flags: list[str], seen: dict[str, str], folder: str) -> int:
        """Runs training to its end; its exit status, as a shell gives it.

        folder: where the launcher runs; on a node without it, where Ray put this worker.
        """
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llm_jax.train", *flags], env=os.environ | seen,
            cwd=folder if os.path.isdir(folder) else None, start_new_session=True,
        )  # fmt: skip
        for number in self.asked:
            self.process.send_signal(number)
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it started and left behind
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        if self.process is None:
            self.asked.append(number)
        else:
            self.process.send_signal(number)  # does nothing when it has ended


class Launch:
    """All attempts of a run."""

    def __init__(self, arguments: argparse.Namespace, bundle: Mapping[str, float]):
        self.arguments, self.bundle = arguments, dict(bundle)
        self._asked: list[int] = []  # signals that came and are not yet passed on
        self._stopping = False

    def run(self) -> int:
        """Returns 0, or the exit status of the first process that failed in the last attempt."""
        ray = import_ray()
        try:
            ray.init(address=self.arguments.address, log_to_driver=True)
        except ConnectionError:
            raise RunError(f"no Ray cluster at {self.arguments.address}: start one with "
                           "`ray start --head`, or give its --address") from None  # fmt: skip
        except (ValueError, RuntimeError) as error:  # a bad address; versions that do not match
            reason = " ".join(str(error).split())  # it tells the versions line by line
            raise RunError(f"--address={self.arguments.address}: {reason}") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._asked.append(number))
        restarts = 0
        while True:
            status = self._attempt(ray)
            if status == 0 or self._stopping or restarts == self.arguments.max_restarts:
                return status
            restarts += 1
            print(f"ended with status {status}: restart {restarts} of "
                  f"{self.arguments.max_restarts}", flush=True)  # fmt: skip

    def _attempt(self, ray) -> int:
        group = self._reserve(ray)
        workers = []
        try:
            for index, bundle in enumerate(order_of_hosts(ray, group)):
                workers.append(self._worker(ray, group, index, bundle))
            address = ray.get(workers[0].address.remote())
            runs = {
                worker.train.remote(
                    self.arguments.flags, variables(self.arguments, address, index), os.getcwd()
                ): index
                for index, worker in enumerate(workers)
            }
            return self._watch(ray, workers, runs)
        except ray.exceptions.RayError as error:
            print(f"a worker was lost before it began: {first_line(error)}", flush=True)
            return 1
        finally:
            for worker in workers:
                ray.kill(worker)
            ray.util.remove_placement_group(group)

    def _reserve(self, ray):
        """A placement group with room for all workers."""
        count, strategy = self.arguments.num_workers, self.arguments.strategy
        group = ray.util.placement_group([self.bundle] * count, strategy=strategy)
        deadline = time.monotonic() + self.arguments.wait
        while not group.wait(POLL_SECONDS):
            if self._asked:
                sys.exit(128 + self._asked[0])
            if time.monotonic() > deadline:
                nodes = sum(node["Alive"] for node in ray.nodes())
                total = {k: v for k, v in ray.cluster_resources().items() if k in self.bundle}
                raise RunError(
                    f"no room for {count} workers of {json.dumps(self.bundle)} ({strategy}) within "
                    f"{self.arguments.wait:g} s: the cluster has {nodes} nodes, in all {total}"
                )
        return group

    def _worker(self, ray, group, index: int, bundle: int):
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        extra = {k: v for k, v in self.bundle.items() if k not in ("CPU", "GPU")}
        options = {
            "num_cpus": self.bundle.get("CPU", 0),
            "num_gpus": self.bundle.get("GPU", 0),
            "resources": extra,
            "max_concurrency": 2,  # signals arrive while it trains
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            ),
        }
        return ray.remote(Worker).options(**options).remote(index)

    def _watch(self, ray, workers: list, runs: dict) -> int:
        """Waits for all processes; ends the others once one has failed. Its status, else 0."""
        failed, deadline, pending = 0, float("inf"), list(runs)
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_SECONDS)
            for run in done:
                status = self._status(ray, run, runs[run])
                if status and not failed:
                    failed = status
                    if not self._stopping:
                        deadline = time.monotonic() + self.arguments.grace
                        self._signal(workers, signal.SIGTERM)
            while self._asked:
                self._stopping = True
                self._signal(workers, self._asked.pop(0))
            if time.monotonic() > deadline:
                self._signal(workers, signal.SIGKILL)
                deadline = float("inf")
        return failed

    def _status(self, ray, run, index: int) -> int:
        try:
            status = ray.get(run)
        except ray.exceptions.RayError as error:
            print(f"the worker of process {index} was lost: {first_line(error)}", flush=True)
            return 1
        if status and not self._stopping:
            print(f"process {index} ended with status {status}", flush=True)
        return status

    def _signal(self, workers: list, number: int) -> None:
        for worker in workers:
            worker.signal.remote(number)  # nobody reads the answer: the worker may be gone


def order_of_hosts(ray, group) -> list[int]:
    """The bundles of the placement group, that of process 0 first.

    On a TPU slice libtpu numbers the hosts itself, and the processes of jax must bear its numbers;
    Ray knows them as labels of its nodes.
    """
    labels = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes()}
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    places = {bundle: labels[node].get("ray.io/tpu-worker-id") for bundle, node in nodes.items()}
    if None in places.values():
        return sorted(places)
    return sorted(places, key=lambda bundle: int(places[bundle]))


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def import_ray():
    try:
        import ray
        import ray.util
    except ImportError:
        raise RunError('ray is not installed: pip install "llm_jax[ray]"') from None
    return ray


if __name__ == "__main__":
    run_entry(main)
