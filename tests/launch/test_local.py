"""launch/local.py with real processes; what the other launchers print and refuse without an engine."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from tiny_run import LAUNCH, NUM_STEPS, TinyRun

TRAIN = ["--config", "configs/gpt_tiny.py", "--workdir", "runs/my run"]
WITHOUT_TOOLS = {"PATH": "/nowhere", "HOME": "/"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local = load("local")


def call(script, *arguments, **variables):
    command = [str(LAUNCH / script)]
    if script.endswith(".py"):
        command.insert(0, sys.executable)
    else:
        command.insert(0, "/bin/bash")
    env = {**os.environ, **variables}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60,
                          env=env, check=False)  # fmt: skip


def error_of(*arguments, **variables):
    """The one line that a launcher leaves, with status 1."""
    done = call(*arguments, **variables)
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_dry_run_of_cpu_processes():
    done = call("local.py", "--processes", "2", "--devices_per_process", "4", "--port", "7777",
                "--dry_run", "--", *TRAIN)  # fmt: skip
    assert done.stdout.splitlines() == [
        "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=127.0.0.1:7777 "
        f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index} {sys.executable} -m llm_jax.train "
        "--config configs/gpt_tiny.py --workdir 'runs/my run'"
        for index in range(2)
    ]


@pytest.mark.parametrize(
    ("choice", "visible", "expected"),
    [("all", "", ["0", "1", "2"]), ("all", "2,5", ["2", "5"]), ("1,0", "", ["1", "0"])],
)
def test_dry_run_of_a_process_per_gpu(tmp_path, choice, visible, expected):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = call("local.py", "--gpus", choice, "--dry_run", "--", *TRAIN, JAX_PLATFORMS="",
                PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES=visible)  # fmt: skip
    lines = done.stdout.splitlines()
    assert [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", line)[1] for line in lines] == expected
    assert all("JAX_PLATFORMS=cuda,cpu" in line for line in lines)
    assert [re.search(r"JAX_PROCESS_ID=(\d)", line)[1] for line in lines] == [
        str(index) for index in range(len(expected))
    ]


def test_dry_run_of_slurm_needs_no_slurm():
    done = call("slurm.sh", "--dry_run", "--nodes=2", "--", *TRAIN, TASKS="gpu", MAX_RESTARTS="3")
    assert done.returncode == 0, done.stderr
    first, *sbatch, step = done.stdout.splitlines()
    assert first == (
        f"TASKS=gpu MAX_RESTARTS=3 PYTHON=python sbatch --nodes=2 {LAUNCH}/slurm.sh "
        r"--config configs/gpt_tiny.py --workdir runs/my\ run"
    )
    assert "#SBATCH --requeue" in sbatch
    assert all(line.startswith("#SBATCH --") for line in sbatch)
    assert step == (
        "srun --kill-on-bad-exit=1 --nodes=$SLURM_JOB_NUM_NODES "
        "--ntasks-per-node=$SLURM_GPUS_ON_NODE "
        "--cpus-per-task=$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE)) "
        "--ntasks=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE)) python -m llm_jax.train "
        r"--config configs/gpt_tiny.py --workdir runs/my\ run"
    )


def test_dry_run_of_ray_needs_no_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    hidden = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    given = ("--num_workers", "2", "--resources", '{"TPU": 4}', "--env", "A=b", "--", *TRAIN)
    done = call("ray_job.py", "--dry_run", *given, PYTHONPATH=hidden)
    assert done.stdout.splitlines() == [
        "connect to the Ray cluster at auto",
        'reserve 2 x {"CPU": 1, "TPU": 4}, STRICT_SPREAD',
        *(
            f"worker {index}: A=b JAX_COORDINATOR_ADDRESS=IP_OF_WORKER_0:FREE_PORT "
            f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index} python -m llm_jax.train "
            "--config configs/gpt_tiny.py --workdir 'runs/my run'"
            for index in range(2)
        ),
        "when a worker fails: stop all, start again at most 0 x",
    ]
    assert error_of("ray_job.py", *given, PYTHONPATH=hidden) == (
        'error: ray is not installed: pip install "llm_jax[ray]"'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "nothing to train: give the flags of llm_jax.train after --"),
        (["--processes", "0", "--", "x"], "--processes=0: expected at least 1"),
        (["--processes", "1", "--devices_per_process", "0", "--", "x"],
         "--devices_per_process=0: expected at least 1"),
        (["--", "x"], "give one of --processes N (CPU devices) and --gpus all or 0,1,..."),
        (["--gpus", "0", "--processes", "2", "--", "x"],
         "give one of --processes N (CPU devices) and --gpus all or 0,1,..."),
        (["--gpus", "0,0", "--", "x"],
         "--gpus=0,0: expected all, or different GPUs as in 0,1,2"),
        (["--gpus", "all", "--", "x"],
         "nvidia-smi not found: install the NVIDIA driver, or name the --gpus"),
    ],
)  # fmt: skip
def test_errors_of_local_in_one_line(monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        local.plan(local.parse(arguments))


def test_errors_reach_the_user_without_a_traceback():
    assert error_of("local.py", "--processes", "0", "--", "x") == (
        "error: --processes=0: expected at least 1"
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--config", "x"], {}, "nothing to train: give the flags of llm_jax.train after --"),
        (["--nodes=2", "--"], {}, "nothing to train: give the flags of llm_jax.train after --"),
        (["--", "x"], {"TASKS": "core"}, "TASKS=core: expected host or gpu"),
        (["--", "x"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: expected a number, 0 or more"),
        (["--", "x"], WITHOUT_TOOLS, "sbatch not found: run this on a login node, or install the "
         "Slurm client (slurm-client)"),
        (["x"], {"TASKS": "gpu", "SLURM_JOB_ID": "1"},
         "TASKS=gpu, but the job has no GPUs: add --gpus-per-node=N"),
    ],
)  # fmt: skip
def test_errors_of_slurm_in_one_line(arguments, variables, message):
    assert error_of("slurm.sh", *arguments, **variables) == f"error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_workers", "1"], "nothing to train: give the flags of llm_jax.train after --"),
        (["--num_workers", "0", "--", "x"], "--num_workers=0: expected at least 1"),
        (["--num_workers", "1", "--env", "A", "--", "x"], "--env=A: expected NAME=VALUE"),
        (["--num_workers", "1", "--resources", "{TPU", "--", "x"],
         '--resources={TPU: expected JSON of names and numbers: {"TPU": 4}'),
        (["--num_workers", "1", "--cpus_per_worker", "0", "--", "x"],
         "a worker needs something: --cpus_per_worker, --gpus_per_worker or more"),
    ],
)  # fmt: skip
def test_errors_of_ray_in_one_line(arguments, message):
    ray_job = load("ray_job")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ray_job.resources_per_worker(ray_job.parse(arguments))


@pytest.fixture
def run(tmp_path):
    with TinyRun(tmp_path) as run:
        yield run


def scripts(*codes):
    return [local.Process([sys.executable, "-uc", code], {"NAME": "x"}) for code in codes]


STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"


def test_the_first_failure_gives_the_status_and_ends_the_rest(capfdbinary):
    started = time.monotonic()
    fails = "import time; time.sleep(1); raise SystemExit(7)"
    assert local.Group(scripts(STUBBORN, fails, "pass"), grace=0.5).run() == 7
    assert time.monotonic() - started < 20
    output = capfdbinary.readouterr().out
    assert b"[0] up" in output
    assert b"process 1 ended with status 7: ending the others" in output


def test_what_a_killed_process_started_is_killed_too():
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"
    dies = "import os, time; time.sleep(1); os.kill(os.getpid(), 9)"
    started = time.monotonic()
    assert local.Group(scripts(child, dies), grace=0.5).run() == 137
    assert time.monotonic() - started < 20


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_coordinator_outlives_the_launcher():
    address = f"127.0.0.1:{local.free_port()}"
    code = (
        "import os, time\n"
        "from llm_jax.sharding.distributed import start_distributed\n"
        "start_distributed()\n"
        "if os.environ['JAX_PROCESS_ID'] == '0': os.kill(os.getpid(), 9)\n"
        "time.sleep(60)"
    )
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        local.Process([sys.executable, "-c", code], {**job, "JAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]
    assert local.Group(processes, grace=0.5).run() == 137
    port = int(address.rpartition(":")[2])
    deadline = time.monotonic() + 5  # the kernel takes its time to close what it killed
    while is_open(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_signals_are_passed_on_and_are_no_failure(capfdbinary):
    saves = (
        "import signal, sys, time\n"
        "def leave(*_): time.sleep({}); print('saved'); sys.exit(143)\n"
        "signal.signal(15, leave); print('up'); time.sleep(60)"
    )
    group = local.Group(scripts(saves.format(0), saves.format(1)), grace=0.1)
    timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert group.run() == 143
    output = capfdbinary.readouterr().out
    assert output.count(b"saved") == 2, output


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed(run):
    arguments = ("--processes", 2, "--devices_per_process", 2, "--grace", 3, "--", *run.flags)
    launched = run.python("local.py", *arguments)
    run.kill_one(after_step=0)
    started = time.monotonic()
    output, _ = launched.communicate(timeout=60)
    assert launched.returncode == 137, output
    assert time.monotonic() - started < 30
    assert not run.processes()

    launched = run.python("local.py", *arguments)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, output
    assert "[0] 34,912 parameters on 4 cpu" in output
    assert "[0] resuming after step" in output
    assert run.steps() == list(range(1, NUM_STEPS + 1))
