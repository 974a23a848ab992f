"""A real Slurm on this machine: a controller and two nodes, trained on through launch/slurm.sh."""

import contextlib
import datetime
import getpass
import os
import shutil
import socket
import subprocess
import sys

import pytest
from tiny_run import LAUNCH, NUM_STEPS, TinyRun, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
TEN_SECONDS = datetime.timedelta(seconds=10)
SBIN = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"

# Names that resolve on every Linux: jax finds its coordinator by the name of the first node.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=10
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname=localhost Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname=localhost Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs a Slurm command on the cluster of this module, and gives its output."""
    missing = [name for name in DAEMONS if shutil.which(name, path=SBIN) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, user=getpass.getuser(), ports=free_ports(3)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    env = {**os.environ, "SLURM_CONF": str(conf), "PATH": SBIN}

    def run(*command, **variables):
        return subprocess.run(
            list(map(str, command)), env=env | variables, cwd=folder, text=True, check=True,
            stdout=subprocess.PIPE, timeout=60,
        ).stdout  # fmt: skip

    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    with contextlib.ExitStack() as stack:
        for daemon in (
            ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
             f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
             f"--seed-file={folder}/munge.seed"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "127.0.0.1"],
            ["slurmd", "-D", "-N", "127.0.0.2"],
        ):  # fmt: skip
            stack.enter_context(running(daemon, env, folder / "daemons.log"))
            if daemon[0] == "munged":
                wait_until((folder / "munge.socket").exists, 10, "munged listens")
        idle = lambda: run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"]  # noqa: E731
        wait_until(ready(idle), 30, "two idle nodes")
        yield run
        run("scancel", "--user", getpass.getuser())


@pytest.fixture
def run(tmp_path):
    with TinyRun(tmp_path) as run:
        yield run


@contextlib.contextmanager
def running(command, env, log):
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(condition):
    """`condition`, false while the controller does not answer yet."""

    def check():
        try:
            return condition()
        except subprocess.CalledProcessError:
            return False

    return check


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Job:
    """A submission of launch/slurm.sh to both nodes."""

    def __init__(self, slurm, run, *options, **variables):
        self.slurm, self.run = slurm, run
        self.output = run.folder / "slurm.out"
        said = slurm(
            LAUNCH / "slurm.sh", "--nodes=2", f"--output={self.output}", *options, "--", *run.flags,
            **run.env | {"PYTHON": sys.executable, "PATH": SBIN} | variables,
        )  # fmt: skip
        self.id = said.split()[-1]

    def show(self) -> dict[str, str]:
        words = self.slurm("scontrol", "show", "job", self.id, "--oneliner").split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for_state(self, state, seconds=120):
        wait_until(lambda: self.show()["JobState"] == state, seconds, self)

    def wait_for_restart(self, seconds=120):
        """Until the tasks of a requeued job run.

        Slurm would wait two minutes. At once is too soon: the nodes still refuse the job as killed,
        which puts it back into the queue for two minutes more.
        """

        def runs():
            shown = self.show()
            if shown["JobState"] == "PENDING" and _is_far(shown["StartTime"]):
                self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now+5")
            return self.run.processes()

        wait_until(runs, seconds, self)

    def __str__(self):
        return f"{self.show()}\n{self.output.read_text() if self.output.exists() else ''}"


def _is_far(start: str) -> bool:
    """Whether a time as Slurm prints it is more than ten seconds ahead."""
    if start == "Unknown":
        return False
    return datetime.datetime.fromisoformat(start) > datetime.datetime.now() + TEN_SECONDS


@pytest.mark.slow  # two minutes, most of them Slurm's before a job may start again
def test_lost_tasks_restarts_and_the_time_limit(slurm, run):
    job = Job(slurm, run, MAX_RESTARTS="1")
    job.wait_for_state("RUNNING")
    assert slurm("squeue", "-h", "-o", "%i %D %t").split() == [job.id, "2", "R"]

    # A lost task ends the job, which goes back into the queue by itself, once.
    run.kill_one(after_step=0)
    wait_until(lambda: job.show()["Restarts"] == "1", 60, job)
    job.wait_for_state("PENDING")
    assert not run.processes()
    reached = run.saved()[-1]
    job.wait_for_restart()
    run.kill_one(after_step=reached)
    assert run.resumed() == [reached + 1]
    job.wait_for_state("FAILED", seconds=60)
    assert not run.processes()
    assert "restart 1 of 1" in job.output.read_text()

    # Near the time limit Slurm sends USR1 to the batch script: the tasks save.
    reached = run.saved()[-1]
    job = Job(slurm, run, "--time=10")
    wait_until(lambda: run.resumed()[-1] == reached + 1, 120, job)
    slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_state("FAILED", seconds=60)
    assert job.show()["ExitCode"] == "143:0"
    assert "stopped by" in job.output.read_text()
    assert run.saved()[-1] == run.steps()[-1] < NUM_STEPS

    # And the same command again goes on to the end.
    job = Job(slurm, run)
    job.wait_for_state("COMPLETED")
    assert run.steps() == list(range(1, NUM_STEPS + 1))
    assert run.saved()[-1] == NUM_STEPS


@pytest.mark.slow
def test_a_cancelled_job_is_not_put_back(slurm, run):
    job = Job(slurm, run, MAX_RESTARTS="5")
    wait_until(run.steps, 120, job)
    slurm("scancel", job.id)
    wait_until(lambda: not slurm("squeue", "-h"), 60, job)
    assert job.show()["JobState"] == "CANCELLED"
    assert not run.processes()


def test_a_task_per_gpu(slurm, run, tmp_path):
    """Slurm counts two GPUs per node that are not there; a script stands in for Python."""
    python = tmp_path / "python"
    said = "$SLURM_PROCID of $SLURM_NTASKS, $SLURM_LOCALID of $CUDA_VISIBLE_DEVICES: $*"
    python.write_text(f"#!/bin/bash\necho {said}\n")
    python.chmod(0o755)
    job = Job(slurm, run, "--gpus-per-node=2", TASKS="gpu", PYTHON=str(python))
    job.wait_for_state("COMPLETED")
    flags = " ".join(run.flags)
    assert sorted(job.output.read_text().splitlines()) == [
        f"{index} of 4, {index % 2} of 0,1: -m llm_jax.train {flags}" for index in range(4)
    ]


def test_jobs_that_score(slurm, tmp_path):
    """Two of an array, with a script in Python's place that waits for its signal where told so."""
    python, output = tmp_path / "python", tmp_path / "eval.out"
    python.write_text(
        '#!/bin/bash\necho "$SLURM_ARRAY_TASK_ID: $*"\n'
        "if [[ $* != *long* ]]; then exit; fi\n"
        "trap 'echo gave it free; exit 143' TERM\nwhile true; do sleep 0.1; done\n"
    )
    python.chmod(0o755)

    def submit(*options):
        options = (f"--output={output}", *options)
        variables = {"PYTHON": str(python), "PATH": SBIN}
        return slurm(LAUNCH / "slurm_eval.sh", *options, **variables).split()[-1]

    def says(text):
        return lambda: output.exists() and text in output.read_text()

    submit("--array=1-2", "--", "--workdir", "runs/a")
    wait_until(lambda: not slurm("squeue", "-h"), 60, output)
    assert sorted(output.read_text().splitlines()) == [
        f"{task}: -m llm_jax.evaluate --watch --workdir runs/a" for task in (1, 2)
    ]
    job = submit("--", "--workdir", "long")
    wait_until(says("--workdir long"), 60, output)
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_until(says("back into the queue"), 60, output)
    assert "gave it free" in output.read_text()
    wait_until(lambda: "PENDING" in slurm("squeue", "-h", "-j", job, "-o", "%T"), 60, output)
    slurm("scancel", job)
