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

import jax

from llm_jax.core.flags import RunError
from llm_jax.sharding.coordinator import DONE, LISTENING, MeetingError, meet
from llm_jax.sharding.xla_flags import guess_platform

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a job.

    address: host:port of the coordinator, which process 0 starts on its host.
    gpus: which of the GPUs it sees are its own; None for all.
    """

    address: str
    count: int
    index: int
    gpus: tuple[int, ...] | None = None


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
        raise RunError(str(error)) from None
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

    Raises:
      ValueError: variables that contradict each other, or of which some are missing.
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
    if count == 1 or "SLURM_STEP_NODELIST" not in environment:
        return None
    from jax._src.clusters.slurm_cluster import SlurmCluster

    address = SlurmCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT"))
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    gpus = _share_of_gpus(
        environment, max(map(int, tasks)), int(environment.get("SLURM_LOCALID", 0))
    )
    return Process(address, count, int(environment["SLURM_PROCID"]), gpus)


def _open_mpi(environment: Mapping[str, str]) -> Process | None:
    count = _mpi_size(environment)
    if count == 1:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and "OMPI_MCA_orte_hnp_uri" in environment:
        from jax._src.clusters.ompi_cluster import OmpiCluster

        address = OmpiCluster.get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT"))
    if address is None:
        raise ValueError(
            "Open MPI 5 does not say where task 0 runs: add "
            "`-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun, HOST being that of task 0"
        )
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
    tasks = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    gpus = _share_of_gpus(environment, tasks, local)
    return _checked(Process(address, count, int(environment["OMPI_COMM_WORLD_RANK"]), gpus))


def _mpi_size(environment: Mapping[str, str]) -> int:
    return int(environment.get("OMPI_COMM_WORLD_SIZE") or 1)


def _gke_tpu(environment: Mapping[str, str]) -> Process | None:
    """What GKE's webhook sets in the pods of a TPU slice, and of several slices (MEGASCALE_*)."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    workers = [host for host in hosts.split(",") if host]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if "TPU_WORKER_ID" not in environment or len(workers) * slices <= 1:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    return Process(
        f"{first.partition(':')[0]}:{environment.get('JAX_COORDINATOR_PORT', '8482')}",
        len(workers) * slices,
        int(environment["TPU_WORKER_ID"])
        + len(workers) * int(environment.get("MEGASCALE_SLICE_ID") or 0),
    )


def _tpu_vm(environment: Mapping[str, str]) -> Process | None:
    """A TPU VM asks the metadata server of its host, which knows the other VMs of the pod."""
    if guess_platform(environment) != "tpu" or environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    try:
        if not GceTpuCluster.is_env_present() or GceTpuCluster.get_process_count() == 1:
            return None
        address = GceTpuCluster.get_coordinator_address(60, environment.get("JAX_COORDINATOR_PORT"))
        return Process(address, GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id())
    except OSError:
        return None  # TPU chips, but no metadata server: one host outside Google Cloud's pods


def _given_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    given = environment.get("JAX_LOCAL_DEVICE_IDS")
    return tuple(int(i) for i in given.split(",")) if given else None


def _share_of_gpus(
    environment: Mapping[str, str], tasks: int, local: int
) -> tuple[int, ...] | None:
    """An equal share of the host's GPUs for each of its tasks.

    None, for all that are visible, when this is the host's only task or when the scheduler shows the
    task its own GPUs only, as `--gpus-per-task` does.
    """
    if _given_gpus(environment) is not None:
        return _given_gpus(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    seen = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if tasks == 1 or seen < tasks:
        return None
    share = seen // tasks
    return tuple(range(local * share, (local + 1) * share))


def _checked(process: Process) -> Process:
    host, _, port = process.address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={process.address}: expected host:port")
    return process


def _start_coordinator(process: Process, timeout: float, heartbeat: int, linger: float) -> None:
    port = process.address.rpartition(":")[2]
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
    command = [sys.executable, "-m", "llm_jax.sharding.coordinator", f"--bind={bind}"]
    command += [f"--count={process.count}", f"--timeout={timeout}", f"--heartbeat={heartbeat}"]
    coordinator = subprocess.Popen(
        [*command, f"--linger={linger}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What it could say beyond its first line is C++ logging about processes that went away; an
        # inherited pipe would also keep our reader waiting after our own end.
        stderr=subprocess.DEVNULL,
        # Ctrl-C and a scheduler's signals are for the processes that can save.
        start_new_session=True,
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
