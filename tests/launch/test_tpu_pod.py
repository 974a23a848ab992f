"""The exact gcloud commands; the keeper against a gcloud that plays a pod; the workers' script."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WHERE = ["--name", "run1", "--zone", "us-east5-a"]
TRAIN = ["--", "--config", "configs/a b.py", "--workdir", "/gcs/runs/run1"]
QUEUED = "gcloud compute tpus queued-resources"
ARCHIVE = f"{tempfile.gettempdir()}/run1.tar.gz"


def launch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(LAUNCH / "tpu_pod.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def dry_run(*arguments):
    done = launch(*arguments, "--dry_run", *TRAIN)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_on_one_slice():
    assert dry_run("run", *WHERE, "--type", "v6e-256") == [
        f"{QUEUED} create run1 --zone=us-east5-a --accelerator-type=v6e-256 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=run1",
        f"{QUEUED} list --zone=us-east5-a '--filter=name~/run1$' '--format=value(state.state)'",
        f"git -C {LAUNCH.parent} archive --format=tar.gz --prefix=llm_jax/ --output={ARCHIVE} HEAD",
        f"{QUEUED} scp {ARCHIVE} run1:llm_jax.tar.gz --node=all --worker=all --zone=us-east5-a",
        f"{QUEUED} ssh run1 --zone=us-east5-a --node=all --worker=all "
        "'--command=tar -xzf llm_jax.tar.gz && bash llm_jax/launch/tpu_pod.sh install'",
        f"{QUEUED} ssh run1 --zone=us-east5-a --node=all --worker=all '--command=bash "
        "llm_jax/launch/tpu_pod.sh start --config '\"'\"'configs/a b.py'\"'\"' "
        "--workdir /gcs/runs/run1'",
        f"{QUEUED} ssh run1 --zone=us-east5-a --node=0 --worker=0 "
        "'--command=bash llm_jax/launch/tpu_pod.sh status'",
        f"{QUEUED} delete run1 --zone=us-east5-a --force --quiet",
    ]


def test_spot_slices_of_a_project():
    options = ["--type", "v5p-128", "--num_slices", "2", "--spot", "--project", "lab"]
    options += ["--service_account", "trainer@lab", "--runtime", "v2-other"]
    assert dry_run("create", *WHERE, *options) == [
        f"{QUEUED} create run1 --zone=us-east5-a --project=lab --accelerator-type=v5p-128 "
        "--runtime-version=v2-other --spot --service-account=trainer@lab "
        "--node-count=2 --node-prefix=run1"
    ]


@pytest.mark.parametrize("action", ["stop", "status", "logs"])
def test_what_workers_are_told(action):
    node = "all" if action == "stop" else "0"
    assert dry_run(action, *WHERE) == [
        f"{QUEUED} ssh run1 --zone=us-east5-a --node={node} --worker={node} "
        f"'--command=bash llm_jax/launch/tpu_pod.sh {action}'"
    ]


def test_the_bucket_is_mounted_on_install():
    assert dry_run("install", *WHERE, "--bucket", "data")[-1].endswith("tpu_pod.sh install data'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *WHERE], "--type None: expected GENERATION-SIZE; generations: v4, v5litepod"),
        (["create", *WHERE, "--type", "v5p"], "--type v5p: expected GENERATION-SIZE"),
        (["create", *WHERE, "--type", "v5p-8", "--num_slices", "0"], "--num_slices 0 must be"),
        (["status", "--name", "A", "--zone", "z"], "--name A: expected at most 50 of a-z"),
        (["start", *WHERE], "no --workdir after `--`"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_gcloud_it_says_so(tmp_path):
    done = launch("status", *WHERE, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: gcloud not found: install the Google Cloud CLI")


# Each line of `script` answers one request for the state or the status: the next in turn.
FAKE_GCLOUD = """#!/bin/bash
folder={folder}
next() {{ head -n 1 "$folder/$1"; sed -i 1d "$folder/$1"; }}
case "$4:$*" in
  list:*)
    answer=$(next states)
    if [ "$answer" = failing ]; then echo "no network" >&2; exit 1; fi
    echo "$answer" ;;
  create:*|delete:*|scp:*) echo "$4" >> "$folder/log" ;;
  *install*) echo install >> "$folder/log" ;;
  *"tpu_pod.sh start"*) echo start >> "$folder/log" ;;
  *"tpu_pod.sh status"*)
    answer=$(next statuses)
    if [ "$answer" = unreachable ]; then echo "ssh: no route" >&2; exit 255; fi
    echo "$answer" ;;
  *"tpu_pod.sh logs"*) echo "the last lines" ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
SETTING_UP = ["scp", "install", "start"]


def play(folder, states, statuses, *options):
    """What `run` asked of a gcloud that answers so; and how it ended."""
    fake = folder / "gcloud"
    fake.write_text(FAKE_GCLOUD.format(folder=folder))
    fake.chmod(0o755)
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    done = launch(
        "run", *WHERE, "--type", "v5p-8", "--poll_seconds", "0", *options, *TRAIN,
        PATH=f"{folder}:{os.environ['PATH']}",
    )  # fmt: skip
    return (folder / "log").read_text().split(), done


def test_a_preempted_pod_is_asked_for_again_and_the_run_goes_on(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDED", ""]
    log, done = play(tmp_path, [*states, "ACTIVE", "ACTIVE", "ACTIVE"], ["running", "running", "0"])
    assert done.returncode == 0, done.stderr
    assert log == ["create", *SETTING_UP, "delete", "create", *SETTING_UP]
    assert "the pod is SUSPENDED: deleting it, to ask for another" in done.stdout
    assert "the training has ended" in done.stdout


def test_a_run_that_lost_a_worker_is_started_again(tmp_path):
    log, done = play(tmp_path, ["ACTIVE"] * 5, ["75", "unreachable", "0"])
    assert done.returncode == 0, done.stderr
    assert log == SETTING_UP * 2
    assert "the training ended with status 75; restart 1 of 20" in done.stdout
    assert "no route; looking again, 1 of 10 failed" in done.stdout


def test_gcloud_may_fail_now_and_then_but_not_forever(tmp_path):
    states = [*["failing"] * 9, "ACTIVE", *["failing"] * 9, "ACTIVE"]
    log, done = play(tmp_path, states, ["0"], "--max_restarts", "0")
    assert done.returncode == 0, done.stderr
    assert log == SETTING_UP
    _, done = play(tmp_path, ["ACTIVE", *["failing"] * 10], [])
    assert done.returncode == 1
    assert "no network, 10 times in a row; the pod may still be there" in done.stderr


def test_a_training_that_failed_is_not_repeated(tmp_path):
    log, done = play(tmp_path, ["ACTIVE"] * 5, ["running", "1"])
    assert done.returncode == 1
    assert log == SETTING_UP
    assert "the last lines" in done.stdout
    assert "the training failed; the pod is still there" in done.stderr


def test_restarts_are_counted(tmp_path):
    log, done = play(tmp_path, ["ACTIVE"] * 9, ["139"] * 5, "--max_restarts", "1")
    assert done.returncode == 1
    assert log == SETTING_UP * 2
    assert "the training ended with status 139, after 1 restarts" in done.stderr


@pytest.fixture
def worker(tmp_path):
    """The workers' script, with a Python that plays the training."""
    fake = tmp_path / "venv/bin/python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        f"#!/bin/bash\necho \"$@\" >> {tmp_path}/arguments\ntrap 'echo saved; exit 143' TERM\n"
        'echo training\nfor flag in "$@"; do if [[ $flag == --quick ]]; then exit 7; fi; done\n'
        "while true; do sleep 0.1; done\n"
    )
    fake.chmod(0o755)
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "LLM_JAX_VENV": str(tmp_path / "venv"),
        "LLM_JAX_STATE": str(tmp_path / "state"),
    }

    def call(*arguments):
        done = subprocess.run(
            ["bash", str(LAUNCH / "tpu_pod.sh"), *arguments],
            env=env, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else done.returncode

    yield call
    call("stop")


def test_a_worker_runs_one_training_at_a_time(worker, tmp_path):
    assert worker("status") == "none"
    worker("start", "--config", "a b.py")
    first = (tmp_path / "state/pid").read_text()
    assert worker("status") == "running"
    worker("start", "--config", "c.py")
    assert worker("status") == "running"
    assert (tmp_path / "state/pid").read_text() != first
    assert not Path(f"/proc/{first.strip()}").exists()
    assert (tmp_path / "arguments").read_text().splitlines()[0] == (
        "-u -m llm_jax.train --config a b.py"
    )


def test_a_worker_stops_so_that_the_run_saves(worker):
    worker("start")
    worker("stop")
    deadline = time.monotonic() + 10
    while worker("status") != "143":
        assert time.monotonic() < deadline
    assert worker("logs").splitlines()[-1] == "saved"


def test_a_worker_tells_how_the_training_ended(worker):
    worker("start", "--quick")
    deadline = time.monotonic() + 10
    while worker("status") in ("running", "none"):
        assert time.monotonic() < deadline
    assert worker("status") == "7"


def test_a_worker_asked_for_nothing_known_says_how(worker):
    assert worker("begin") == 2
