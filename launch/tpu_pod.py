"""Trains on Cloud TPU VMs: asks for a pod, or several slices, and keeps the run going on it.

    python launch/tpu_pod.py run --name run1 --zone us-east5-a --type v5p-128 --spot
        --bucket my-bucket -- --config configs/FILE.py --workdir /gcs/runs/run1

`run` does all that follows and then watches: when the pod is preempted or fails it is deleted, asked
for again, and the run goes on from its newest checkpoint. Alone: `create`, `install` (this checkout's
commit), `start`, `stop` (the run saves), `status`, `logs`, `delete`. `--dry_run` prints the gcloud
commands instead of running them. The flags of llm_jax.train follow `--`; it runs in the checkout on
every worker, with the bucket at /gcs.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError, run_entry

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHIVE = "llm_jax.tar.gz"
WORKER = "bash llm_jax/launch/tpu_pod.sh"
# The VM images that Cloud TPU has for each generation.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
ACTIONS = ("run", "create", "install", "start", "stop", "status", "logs", "delete")
COMING = {"CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES"}
GONE = {"SUSPENDING", "SUSPENDED", "FAILED", "DELETING"}
# An error that the training has told: another start would end the same way.
FAILED = "1"
MAX_FAILED_LOOKS = 10  # in a row, before a gcloud that fails is more than a moment's trouble


class GcloudError(RunError):
    """A gcloud command failed: the network, a worker that is gone, or a request that is wrong."""


def main() -> None:
    arguments = parse()
    if not arguments.dry_run and shutil.which("gcloud") is None:
        raise RunError("gcloud not found: install the Google Cloud CLI, or use --dry_run")
    pod = Pod(arguments, _print if arguments.dry_run else _run)
    if arguments.action != "run":
        print(getattr(pod, arguments.action)(), end="")
    elif arguments.dry_run:
        for action in (pod.create, pod.state, pod.install, pod.start, pod.status, pod.delete):
            action()
    else:
        Keeper(pod, arguments.max_restarts, arguments.poll_seconds).run()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python launch/tpu_pod.py ACTION [options] -- FLAGS OF llm_jax.train",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--name", required=True, help="of the queued resource and its nodes")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: that of gcloud")
    parser.add_argument("--type", help="accelerator type of one slice, such as v5p-128, v6e-256")
    parser.add_argument("--num_slices", type=int, default=1, help="slices (1)")
    parser.add_argument("--runtime", help="VM image; default: the one for the type")
    parser.add_argument("--spot", action="store_true", help="cheaper, and preempted at times")
    parser.add_argument("--service_account", help="account of the VMs")
    parser.add_argument("--bucket", help="Cloud Storage bucket to mount at /gcs")
    parser.add_argument("--max_restarts", type=int, default=20, help="after failures (20)")
    parser.add_argument("--poll_seconds", type=float, default=60.0, help="between looks (60)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    arguments = parser.parse_args(argv[:cut])
    arguments.train = argv[cut + 1 :]
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", arguments.name):
        raise ConfigError(
            f"--name {arguments.name}: expected at most 50 of a-z, 0-9 and -, a letter first"
        )
    if arguments.num_slices < 1:
        raise ConfigError(f"--num_slices {arguments.num_slices} must be at least 1")
    if arguments.action in ("run", "create"):
        generation, _, size = (arguments.type or "").partition("-")
        if generation not in RUNTIMES or not size.isdigit():
            raise ConfigError(
                f"--type {arguments.type}: expected GENERATION-SIZE; "
                f"generations: {', '.join(RUNTIMES)}"
            )
        arguments.runtime = arguments.runtime or RUNTIMES[generation]
    if arguments.action in ("run", "start") and "--workdir" not in " ".join(arguments.train):
        raise ConfigError("no --workdir after `--`: name a folder that all workers share")


def _print(command: list[str]) -> str:
    print(shlex.join(command))
    return ""


def _run(command: list[str]) -> str:
    """The standard output of a command.

    Raises:
      GcloudError: it failed and is gcloud's; its last line of errors.
      RunError: it failed and is another's.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        kind = GcloudError if command[0] == "gcloud" else RunError
        raise kind(f"`{shlex.join(command[:5])} ...` failed: {reason}")
    return done.stdout


class Pod:
    """A queued resource, its nodes (one a slice) and their workers: one gcloud command an action."""

    def __init__(self, arguments: argparse.Namespace, run: Callable[[list[str]], str]):
        self._arguments, self._run = arguments, run

    def create(self) -> str:
        given = self._arguments
        slices = (
            [f"--node-count={given.num_slices}", f"--node-prefix={given.name}"]
            if given.num_slices > 1
            else [f"--node-id={given.name}"]
        )
        options = [f"--accelerator-type={given.type}", f"--runtime-version={given.runtime}"]
        if given.spot:
            options.append("--spot")
        if given.service_account:
            options.append(f"--service-account={given.service_account}")
        return self._gcloud("create", *options, *slices)

    def state(self) -> str | None:
        """The queued resource's state; None when there is none of this name."""
        names = self._gcloud("list", f"--filter=name~/{self._arguments.name}$", resource=False,
                             format="value(state.state)")  # fmt: skip
        return names.strip() or None

    def install(self) -> str:
        archive = f"{tempfile.gettempdir()}/{self._arguments.name}.tar.gz"
        git = ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz"]
        self._run([*git, "--prefix=llm_jax/", f"--output={archive}", "HEAD"])
        scp = ["gcloud", "compute", "tpus", "queued-resources", "scp", archive]
        everywhere = ["--node=all", "--worker=all", *self._where()]
        self._run([*scp, f"{self._arguments.name}:{ARCHIVE}", *everywhere])
        bucket = f" {self._arguments.bucket}" if self._arguments.bucket else ""
        return self._ssh(f"tar -xzf {ARCHIVE} && {WORKER} install{bucket}")

    def start(self) -> str:
        return self._ssh(f"{WORKER} start {shlex.join(self._arguments.train)}")

    def stop(self) -> str:
        return self._ssh(f"{WORKER} stop")

    def status(self) -> str:
        """What worker 0 of the first slice says: running, none, or an exit status."""
        return self._ssh(f"{WORKER} status", node="0", worker="0")

    def logs(self) -> str:
        return self._ssh(f"{WORKER} logs", node="0", worker="0")

    def delete(self) -> str:
        return self._gcloud("delete", "--force", "--quiet")

    def _gcloud(
        self, verb: str, *options: str, resource: bool = True, format: str | None = None
    ) -> str:
        command = ["gcloud", "compute", "tpus", "queued-resources", verb]
        command += [self._arguments.name] if resource else []
        command += [*self._where(), *options]
        return self._run([*command, f"--format={format}"] if format else command)

    def _ssh(self, text: str, node: str = "all", worker: str = "all") -> str:
        return self._gcloud("ssh", f"--node={node}", f"--worker={worker}", f"--command={text}")

    def _where(self) -> list[str]:
        project = self._arguments.project
        return [f"--zone={self._arguments.zone}", *([f"--project={project}"] if project else [])]


@dataclasses.dataclass
class Keeper:
    """Keeps a run going until it has ended well, whatever happens to its pod."""

    pod: Pod
    max_restarts: int
    poll_seconds: float
    restarts: int = 0
    failed_looks: int = 0  # in a row
    started: bool = False

    def run(self) -> None:
        """Returns when the training has ended with status 0.

        Raises:
          RunError: it failed more than `max_restarts` times, or in a way that a restart repeats; or
            gcloud failed at MAX_FAILED_LOOKS looks in a row.
        """
        while True:
            try:
                if self._look():
                    return
                self.failed_looks = 0
            except GcloudError as error:
                # Also a preempted worker, which answers no longer before the queued resource says so.
                self._bear(error)
            time.sleep(self.poll_seconds)

    def _look(self) -> bool:
        """Does what the pod's state calls for; True when the training is done."""
        state = self.pod.state()
        if state is None:
            self._say("asking for the pod")
            self.pod.create()
        elif state == "ACTIVE":
            return self._train()
        elif state in GONE:
            self._say(f"the pod is {state}: deleting it, to ask for another")
            self.started = False
            self.pod.delete()
        elif state not in COMING:
            raise RunError(f"the queued resource is {state}, which is no state known here")
        return False

    def _train(self) -> bool:
        """Starts the training or sees how it is; True when it is done."""
        if not self.started:
            self._say("the pod is there: installing, starting")
            self.pod.install()
            self.pod.start()
            self.started = True
            return False
        status = self.pod.status().strip()
        if status == "0":
            self._say("the training has ended")
            return True
        if status == FAILED:
            print(self.pod.logs(), end="", flush=True)
            raise RunError("the training failed; the pod is still there")
        if status != "running":
            self._count(f"the training ended with status {status}")
            self.started = False
        return False

    def _bear(self, error: GcloudError) -> None:
        self.failed_looks += 1
        if self.failed_looks == MAX_FAILED_LOOKS:
            raise RunError(
                f"{error}, {MAX_FAILED_LOOKS} times in a row; the pod may still be there"
            )
        self._say(f"{error}; looking again, {self.failed_looks} of {MAX_FAILED_LOOKS} failed")

    def _count(self, what: str) -> None:
        self.restarts += 1
        if self.restarts > self.max_restarts:
            raise RunError(f"{what}, after {self.max_restarts} restarts")
        self._say(f"{what}; restart {self.restarts} of {self.max_restarts}")

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    run_entry(main)
