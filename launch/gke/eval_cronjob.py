"""Scores a run's checkpoints on GKE, beside its training: a CronJob of `llm_jax.evaluate --once`.

    python launch/gke/eval_cronjob.py --name evals1 --gpu h100 --num_gpus 1
        --image REGISTRY/llm_jax:TAG --bucket my-bucket -- --workdir /gcs/runs/run1
    python launch/gke/eval_cronjob.py --name evals1 --tpu v5e --topology 2x2 --image ... -- ...

At each turn a pod scores what has no scores yet, and ends, so that its devices are free in between. Turns
may overlap, and several CronJobs may serve one run: they share its checkpoints without doing one twice.
`--dry_run` prints the manifest, `--delete` deletes what it describes. What follows `--` goes to
`python -m llm_jax.evaluate --once`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

import jobset

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import run_entry

# Five fields of numbers, *, lists, ranges and steps.
_SCHEDULE = re.compile(r"(\S+\s+){4}\S+")


def main() -> None:
    arguments = parse()
    jobset.apply(arguments, [cronjob(arguments)])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python launch/gke/eval_cronjob.py [options] -- FLAGS OF llm_jax.evaluate",
        allow_abbrev=False,
    )
    jobset.add_flags(parser)
    parser.add_argument("--schedule", default="*/10 * * * *", help="when, as cron writes it (every 10 minutes)")  # fmt: skip
    parser.add_argument("--num_gpus", type=int, default=1, help="of the pod (1)")
    arguments = parser.parse_args(argv[:cut])
    arguments.module, arguments.flags = "llm_jax.evaluate", ["--once", *argv[cut + 1 :]]
    jobset.check(arguments)
    if not _SCHEDULE.fullmatch(arguments.schedule.strip()):
        raise ConfigError(
            f"--schedule {arguments.schedule!r}: expected five fields, '*/10 * * * *'"
        )
    if not 1 <= arguments.num_gpus <= jobset.GPUS_PER_HOST:
        raise ConfigError(
            f"--num_gpus {arguments.num_gpus} must lie in 1..{jobset.GPUS_PER_HOST}, one host's"
        )
    if arguments.tpu and jobset.hosts_of_slice(arguments.tpu, arguments.topology)[0] > 1:
        raise ConfigError(
            f"--topology {arguments.topology} has several hosts: an evaluation pod is one, such as "
            "2x2 of v5e"
        )
    return arguments


def cronjob(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": arguments.name, "namespace": arguments.namespace},
        "spec": {
            "schedule": arguments.schedule,
            "concurrencyPolicy": "Allow",
            # One that could not start in time gives way to the next.
            "startingDeadlineSeconds": 300,
            "successfulJobsHistoryLimit": 1,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                # The next turn is the second try.
                "spec": {
                    "backoffLimit": 0,
                    "template": jobset.pod(arguments, 1, arguments.num_gpus),
                }
            },
        },
    }


if __name__ == "__main__":
    run_entry(main)
