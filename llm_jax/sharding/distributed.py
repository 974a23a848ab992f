"""Joins the processes of a job, from what the environment says."""

import os

import jax


def start_distributed() -> None:
    """Calls `jax.distributed.initialize` when this is one process of several; else does nothing.

    Explicit: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise
    Slurm, Open MPI and TPU pods are recognized by the variables they set, and jax finds the rest.

    Raises:
      ValueError: some of the explicit variables are set and others are not, or are no numbers.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given:
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three")
        address, count, index = (given[name] for name in names)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise ValueError(
                f"JAX_PROCESS_ID={index} JAX_NUM_PROCESSES={count}: expected numbers, id < number"
            )
        if int(count) > 1:
            jax.distributed.initialize(address, int(count), int(index))
    elif _has_peers():
        jax.distributed.initialize()


def _has_peers() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    in_step = "SLURM_STEP_NODELIST" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ
    several = any(int(os.environ.get(name, "1")) > 1 for name in tasks)
    return (in_step and several) or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
