"""Joins the processes of a job, from what the environment says.

`find_process` reads the environment; `start_distributed` lets the processes meet and starts jax's
distributed client. jax's coordination service runs in a process of its own (coordinator.py), so that
it outlives process 0 and the others can say who is missing.
"""

import atexit
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from llm_jax.core.flags import RunError
from llm_jax.sharding.coordinator import (
    BUSY,
    DONE,
    LISTENING,
    MeetingError,
    meet,
    patience,
)
from llm_jax.sharding.xla_flags import guess_platform

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
DEVICES = Path("/dev")


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a job.

    address: host:port of the coordinator, which process 0 starts on its host.
    gpus: which of the GPUs it sees are its own; None for all.
    claim: who says so, and how to contradict; "" where the user does.
    """

    address: str
    count: int
    index: int
    gpus: tuple[int, ...] | None = None
    claim: str = dataclasses.field(default="", compare=False)


def start_distributed(*, timeout: float = 300.0, peer_timeout: float = 60.0) -> None:
    """Joins the job if this is one process of several; else does nothing. Call it before jax starts.

    Args:
      timeout: seconds to wait for the other processes.
      peer_timeout: seconds of silence after which training/peers.py takes a process for lost. jax's
        own watch, which ends processes with a C++ stack trace, gets a limit well above it.

    Raises:
      ValueError: the environment contradicts itself.
      RunError: processes that did not come, named by number; no coordinator at its address.
    """
    process = find_process()
    if process is None or process.count == 1:
        return
    heartbeat = int(3 * peer_timeout) + 60
    if process.index == 0:
        _start_coordinator(process, timeout, heartbeat, linger=peer_timeout + 15)
    try:
        meet(process.address, process.index, process.count, socket.gethostname(), timeout)
    except MeetingError as error:
        raise RunError("; ".join(filter(None, [str(error), process.claim]))) from None
    jax.distributed.initialize(
        process.address,
        process.count,
        process.index,
        # jax would take the task's number on its host for its only GPU wherever it sees Slurm.
        local_device_ids=process.gpus,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=heartbeat,
        # jax starts a service in process 0 in any case; this one nobody ever asks.
        coordinator_bind_address="127.0.0.1:0",
    )
    # jax has just taken SIGTERM for its own preemption service, which would swallow it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def find_process() -> Process | None:
    """Which process of which job the environment says this is; None when there is but one.

    In this order: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID; tasks of
    Slurm's `srun`; tasks of Open MPI; TPU workers on GKE; TPU VMs of one pod.

    What a scheduler left behind in part (a shell that outlived its step) counts as nothing.

    Raises:
      ValueError: variables that contradict each other, or of which some are missing; GPUs that
        cannot be shared out equally.
    """
    finders: tuple[Callable[[Mapping[str, str]], Process | None], ...] = (
        _explicit,
        _slurm,
        _open_mpi,
        _gke_tpu,
        _tpu_vm,
    )
    for finder in finders:
        process = finder(os.environ)
        if process is not None:
            return process
    return None


def _explicit(environment: Mapping[str, str]) -> Process | None:
    given = {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if not given or (_mpi_size(environment) > 1 and list(given) == ["JAX_COORDINATOR_ADDRESS"]):
        return None
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three")
    address, count, index = (given[name] for name in _EXPLICIT)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise ValueError(
            f"JAX_PROCESS_ID={index} JAX_NUM_PROCESSES={count}: expected numbers, id < number"
        )
    return _checked(Process(address, int(count), int(index), _given_gpus(environment)))


def _slurm(environment: Mapping[str, str]) -> Process | None:
    # SLURM_NTASKS is the allocation's in a shell of `salloc`, which is itself a step of one task.
    count = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if count == 1 or not all(environment.get(name) for name in _SLURM):
        return None
    from jax._src.clusters.slurm_cluster import SlurmCluster

    address = SlurmCluster.get_coordinator_address(None, _port(environment))
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    gpus = _share_of_gpus(environment, max(map(int, tasks)), int(environment["SLURM_LOCALID"]))
    index = int(environment["SLURM_PROCID"])
    claim = (
        f"Slurm says this is task {index} of {count} (SLURM_STEP_NUM_TASKS); unset it to run alone"
    )
    return Process(address, count, index, gpus, claim)


def _open_mpi(environment: Mapping[str, str]) -> Process | None:
    count = _mpi_size(environment)
    if count == 1:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and "OMPI_MCA_orte_hnp_uri" in environment:
        from jax._src.clusters.ompi_cluster import OmpiCluster

        address = OmpiCluster.get_coordinator_address(None, _port(environment))
    if address is None:
        raise ValueError(
            "Open MPI 5 does not say where task 0 runs: add "
            "`-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun, HOST being that of task 0"
        )
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    tasks = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    gpus = _share_of_gpus(environment, tasks, local)
    index = int(environment["OMPI_COMM_WORLD_RANK"])
    claim = (
        f"Open MPI says this is rank {index} of {count} (OMPI_COMM_WORLD_SIZE); "
        "unset it to run alone"
    )
    return _checked(Process(address, count, index, gpus, claim))


def _mpi_size(environment: Mapping[str, str]) -> int:
    if not environment.get("OMPI_COMM_WORLD_RANK"):
        return 1
    return int(environment.get("OMPI_COMM_WORLD_SIZE") or 1)


def _gke_tpu(environment: Mapping[str, str]) -> Process | None:
    """What GKE's webhook sets in the pods of a TPU slice, and of several slices (MEGASCALE_*)."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    workers = [host for host in hosts.split(",") if host]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if "TPU_WORKER_ID" not in environment or len(workers) * slices <= 1:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    count = len(workers) * slices
    index = int(environment["TPU_WORKER_ID"])
    index += len(workers) * int(environment.get("MEGASCALE_SLICE_ID") or 0)
    return Process(
        f"{first.partition(':')[0]}:{_port(environment) or '8482'}",
        count,
        index,
        claim=f"GKE says this is TPU worker {index} of {count} (TPU_WORKER_ID); "
        "unset it to run alone",
    )


def _tpu_vm(environment: Mapping[str, str]) -> Process | None:
    """A TPU VM asks the metadata server of its host, which knows the other VMs of the pod."""
    if guess_platform(environment) != "tpu" or environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    try:
        if not GceTpuCluster.is_env_present() or GceTpuCluster.get_process_count() == 1:
            return None
        count, index = GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()
        claim = (
            f"the pod's metadata say this is worker {index} of {count}; "
            "TPU_SKIP_MDS_QUERY=1 does not ask them"
        )
        address = GceTpuCluster.get_coordinator_address(60, _port(environment))
        return Process(address, count, index, claim=claim)
    except OSError:
        return None  # TPU chips, but no metadata server: one host outside Google Cloud's pods


def _given_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    given = environment.get("JAX_LOCAL_DEVICE_IDS")
    return tuple(int(i) for i in given.split(",")) if given else None


def _share_of_gpus(
    environment: Mapping[str, str], tasks: int, local: int
) -> tuple[int, ...] | None:
    """An equal share of the host's GPUs for each of its tasks.

    None, for all that are visible, when this is the host's only task or when the task is shown its
    own GPUs only, as Slurm's `--gpus-per-task` does.
    """
    if _given_gpus(environment) is not None:
        return _given_gpus(environment)
    if tasks == 1 or guess_platform(environment) != "gpu":
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    on_host = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if visible is None:
        seen = on_host or len(list(DEVICES.glob("nvidia[0-9]*")))
    else:
        seen = len([name for name in visible.split(",") if name])
        if seen < max(on_host, tasks):
            return None
    if seen % tasks:
        raise ValueError(
            f"{seen} GPUs for {tasks} tasks on a host: expected an equal share for each; choose "
            "another number of tasks, or set JAX_LOCAL_DEVICE_IDS for each task"
        )
    share = seen // tasks
    # Without a GPU that can be counted (ROCm's have no such names) there is nothing to share out.
    return tuple(range(local * share, (local + 1) * share)) or None


def _port(environment: Mapping[str, str]) -> str | None:
    port = environment.get("JAX_COORDINATOR_PORT")
    if port and not (port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"JAX_COORDINATOR_PORT={port}: expected a port, 1 to 65535")
    return port or None


def _checked(process: Process) -> Process:
    host, _, port = process.address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={process.address}: expected host:port")
    return process


def _bind_address(address: str) -> str:
    """Where to listen: a job of one host need not be reachable from others."""
    name, _, port = address.rpartition(":")
    name = name.strip("[]")
    local = name in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", name)
    return address if local else f"[::]:{port}"


def _start_coordinator(process: Process, timeout: float, heartbeat: int, linger: float) -> None:
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or _bind_address(process.address)
    command = [sys.executable, "-m", "llm_jax.sharding.coordinator", f"--bind={bind}"]
    command += [f"--count={process.count}", f"--timeout={timeout}", f"--heartbeat={heartbeat}"]
    coordinator = subprocess.Popen(
        [*command, f"--linger={linger}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What it could say beyond its first line is C++ logging about processes that went away; an
        # inherited pipe would also keep our reader waiting after our own end.
        stderr=subprocess.DEVNULL,
        # It stays in our process group: a launcher that ends the group leaves no orphan behind.
    )
    said = coordinator.stdout.readline().decode().strip()
    if said == BUSY:
        print(
            f"port {bind.rpartition(':')[2]} is in use, waiting up to {patience(linger):.0f} s for "
            "an earlier run to end",
            file=sys.stderr,
            flush=True,
        )
        said = coordinator.stdout.readline().decode().strip()
    if said != LISTENING:
        raise RunError(f"the coordinator at {process.address} cannot listen on {bind}: {said}")
    atexit.register(_release, coordinator)


def _release(coordinator: subprocess.Popen) -> None:
    try:
        coordinator.stdin.write(DONE)
        coordinator.stdin.flush()
    except OSError:
        pass  # it is gone already
