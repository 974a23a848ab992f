"""Trains on GKE: a JobSet of one Job per TPU slice, or of one Job of GPU hosts.

    python launch/gke/jobset.py --name run1 --tpu v5p --topology 4x4x4 --num_slices 2
        --image REGISTRY/llm_jax:TAG --bucket my-bucket -- --config FILE --workdir /gcs/runs/run1
    python launch/gke/jobset.py --name run1 --gpu h100 --num_hosts 4 --image ... -- ...

`--dry_run` prints the manifests, `--delete` deletes what they describe; otherwise they are applied
with kubectl. What follows `--` goes to `python -m llm_jax.train` in every pod.

On TPUs GKE tells the pods who they are (TPU_WORKER_*, MEGASCALE_*); on GPUs the manifest does, by the
JAX_* variables. When a pod is lost the JobSet starts all again and the run resumes from its newest
checkpoint; restarts that the cluster caused (maintenance, spot nodes) do not count against
`--max_restarts`.
"""

import argparse
import dataclasses
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError, run_entry

COORDINATOR_PORT = 8482
# What the TPU runtime listens on: chips of a slice, metrics, slices to each other.
TPU_PORTS = (8471, 8431, 8080)
BUCKET_PATH = "/gcs"
WORKER = "worker"
SHAPES = {2: "such as 4x4", 3: "such as 4x4x4"}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A kind of TPU: the node label that GKE gives it, and how its slices are laid out."""

    accelerator: str
    axes: int
    chips_per_host: int = 4


TPUS = {
    "v4": Tpu("tpu-v4-podslice", 3),
    "v5e": Tpu("tpu-v5-lite-podslice", 2),
    "v5p": Tpu("tpu-v5p-slice", 3),
    "v6e": Tpu("tpu-v6e-slice", 2),
    "v7x": Tpu("tpu7x", 3),
}
GPUS = {
    "a100": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
GPUS_PER_HOST = 8


def main() -> None:
    arguments = parse()
    apply(arguments, manifests(arguments))


def apply(arguments: argparse.Namespace, objects: Sequence[dict[str, Any]]) -> None:
    """Prints, applies or deletes them, as the flags say; ends with kubectl's status."""
    text = yaml.safe_dump_all(objects, sort_keys=False, width=1000)
    if arguments.dry_run:
        print(text, end="")
        return
    if shutil.which("kubectl") is None:
        raise RunError("kubectl not found: install it, or use --dry_run and apply the manifests")
    verb = ["delete", "--ignore-not-found"] if arguments.delete else ["apply"]
    sys.exit(subprocess.run(["kubectl", *verb, "-f", "-"], input=text, text=True).returncode)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python launch/gke/jobset.py [options] -- FLAGS OF llm_jax.train",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.add_argument("--num_slices", type=int, default=1, help="slices (1)")
    parser.add_argument("--num_hosts", type=int, default=1, help=f"of {GPUS_PER_HOST} GPUs (1)")
    parser.add_argument("--max_restarts", type=int, default=20, help="after failures (20)")
    arguments = parser.parse_args(argv[:cut])
    arguments.module, arguments.flags = "llm_jax.train", argv[cut + 1 :]
    check(arguments)
    for flag in ("num_slices", "num_hosts"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)} must be at least 1")
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max_restarts {arguments.max_restarts} must be at least 0")
    return arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every pod of ours needs to be told."""
    parser.add_argument("--name", required=True, help="of the objects on the cluster")
    parser.add_argument("--image", required=True, help="container image with llm_jax installed")
    parser.add_argument("--tpu", help=f"kind of TPU: {', '.join(TPUS)}")
    parser.add_argument("--topology", help="chips of one slice, such as 4x4x4 or 16x16")
    parser.add_argument("--gpu", help=f"kind of GPU: {', '.join(GPUS)}")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service_account", help="Kubernetes account that may read the bucket")
    parser.add_argument("--bucket", help=f"Cloud Storage bucket to mount at {BUCKET_PATH}")
    parser.add_argument("--spot", action="store_true", help="run on spot nodes")
    parser.add_argument(
        "--grace_seconds", type=int, default=300, help="to save after SIGTERM (300)"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--dry_run", action="store_true", help="print the manifests only")
    parser.add_argument("--delete", action="store_true", help="delete the objects")


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags of `add_flags` that do not go together."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", arguments.name):
        raise ConfigError(
            f"--name {arguments.name}: expected at most 40 of a-z, 0-9 and -, a letter first"
        )
    if (arguments.tpu is None) == (arguments.gpu is None):
        raise ConfigError("give --tpu KIND --topology SHAPE, or --gpu KIND --num_hosts N")
    kinds, kind = (TPUS, arguments.tpu) if arguments.tpu else (GPUS, arguments.gpu)
    if kind not in kinds:
        raise ConfigError(f"no {kind!r} here; choices: {', '.join(kinds)}")
    if arguments.grace_seconds < 1:
        raise ConfigError(f"--grace_seconds {arguments.grace_seconds} must be at least 1")
    for pair in arguments.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
            raise ConfigError(f"--env {pair}: expected NAME=VALUE")
    if arguments.tpu:
        hosts_of_slice(arguments.tpu, arguments.topology)
    if "--workdir" not in " ".join(arguments.flags) and not arguments.delete:
        raise ConfigError("no --workdir after `--`: name a folder that all pods share")


def hosts_of_slice(tpu: str, topology: str | None) -> tuple[int, int]:
    """(hosts, chips of each) of a slice.

    Raises:
      ConfigError: the topology is none of this kind of TPU.
    """
    kind = TPUS[tpu]
    shape = topology or ""
    if not re.fullmatch("x".join([r"[1-9]\d*"] * kind.axes), shape):
        raise ConfigError(
            f"--topology {topology}: a {tpu} slice has {kind.axes} axes, {SHAPES[kind.axes]}"
        )
    chips = math.prod(map(int, shape.split("x")))
    if chips > kind.chips_per_host and chips % kind.chips_per_host:
        raise ConfigError(
            f"--topology {topology}: {chips} chips are no whole hosts of {kind.chips_per_host}"
        )
    return max(1, chips // kind.chips_per_host), min(chips, kind.chips_per_host)


def manifests(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The headless service by which pods find each other, and the JobSet."""
    metadata = {"name": arguments.name, "namespace": arguments.namespace}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            # Processes look each other up while they start, before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {"jobset.sigs.k8s.io/jobset-name": arguments.name},
        },
    }
    # A Job has a node pool, which is a slice, to itself.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**metadata, **({"annotations": exclusive} if arguments.tpu else {})},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": arguments.name},
            "failurePolicy": {
                "maxRestarts": arguments.max_restarts,
                "rules": [
                    {
                        "name": "disruptedByTheCluster",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": WORKER,
                    "replicas": arguments.num_slices if arguments.tpu else 1,
                    "template": {"spec": _job(arguments)},
                }
            ],
        },
    }
    return [service, jobset]


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.tpu:
        hosts, _ = hosts_of_slice(arguments.tpu, arguments.topology)
    else:
        hosts = arguments.num_hosts
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        # One lost pod ends the Job, and the JobSet starts all of them again: none can go on alone.
        "backoffLimit": 0,
        # A reason of its own for what the cluster did: drained nodes, preempted spot nodes.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                }
            ]
        },
        "template": pod(arguments, hosts),
    }


def pod(arguments: argparse.Namespace, hosts: int, gpus: int = GPUS_PER_HOST) -> dict[str, Any]:
    """The template of a pod, one of `hosts`, with its devices."""
    selector, resource, count = _devices(arguments, gpus)
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        )
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # for the loader's workers
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if arguments.bucket:
        volumes.append({"name": "bucket", "csi": _bucket(arguments.bucket)})
        mounts.append({"name": "bucket", "mountPath": BUCKET_PATH})
    ports = (*TPU_PORTS, COORDINATOR_PORT) if arguments.tpu else (COORDINATOR_PORT,)
    container = {
        "name": arguments.module.removeprefix("llm_jax."),
        "image": arguments.image,
        "command": ["python", "-m", arguments.module],
        "args": arguments.flags,
        "env": _environment(arguments, hosts),
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"limits": {resource: count}},
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": arguments.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": volumes,
    }
    if arguments.service_account:
        spec["serviceAccountName"] = arguments.service_account
    mounting = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}}
    return {**(mounting if arguments.bucket else {}), "spec": spec}


def _devices(arguments: argparse.Namespace, gpus: int) -> tuple[dict[str, str], str, int]:
    """Node labels to select, the resource to ask for, and how many of it for each pod."""
    if arguments.gpu:
        selector = {"cloud.google.com/gke-accelerator": GPUS[arguments.gpu]}
        return selector, "nvidia.com/gpu", gpus
    _, chips = hosts_of_slice(arguments.tpu, arguments.topology)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[arguments.tpu].accelerator,
        "cloud.google.com/gke-tpu-topology": arguments.topology,
    }
    return selector, "google.com/tpu", chips


def _environment(arguments: argparse.Namespace, hosts: int) -> list[dict[str, Any]]:
    variables = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if arguments.gpu and hosts > 1:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        first = f"{arguments.name}-{WORKER}-0-0.{arguments.name}"
        variables += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{COORDINATOR_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    pairs = (pair.partition("=") for pair in arguments.env)
    return variables + [{"name": name, "value": value} for name, _, value in pairs]


def _bucket(name: str) -> dict[str, Any]:
    return {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {"bucketName": name, "mountOptions": "implicit-dirs"},
    }


if __name__ == "__main__":
    run_entry(main)
