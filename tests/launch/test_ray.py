"""A Ray cluster of two nodes on this machine, trained on through launch/ray_job.py."""

import pytest
from tiny_run import NUM_STEPS, TinyRun, wait_until

pytest.importorskip("ray", reason='ray is not installed: pip install "llm_jax[ray]"')


@pytest.fixture(scope="module")
def address():
    """Of a cluster with two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def run(tmp_path):
    with TinyRun(tmp_path) as run:
        yield run


def start(run: TinyRun, address: str, *options):
    variables = [f"--env={name}={run.env[name]}" for name in (
        "JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")]  # fmt: skip
    return run.python("ray_job.py", "--address", address, "--num_workers", 2, "--grace", 3,
                      *variables, *options, "--", *run.flags)  # fmt: skip


@pytest.mark.slow
def test_a_lost_process_restarts_the_run(address, run):
    launched = start(run, address, "--max_restarts", 1)
    run.kill_one(after_step=0)
    wait_until(run.resumed, 120, run)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, output
    assert "ended with status 137" in output
    assert "restart 1 of 1" in output
    assert len(run.resumed()) == 1
    assert run.steps() == list(range(1, NUM_STEPS + 1))
    assert run.saved()[-1] == NUM_STEPS
    assert not run.processes()


@pytest.mark.slow
def test_without_restarts_a_loss_ends_the_run_and_sigterm_saves(address, run):
    launched = start(run, address)
    run.kill_one(after_step=0)
    output, _ = launched.communicate(timeout=60)
    assert launched.returncode not in (0, None), output
    assert not run.processes()

    reached = run.saved()[-1]
    launched = start(run, address, "--max_restarts", 3)
    wait_until(lambda: run.resumed() == [reached + 1], 120, run)
    launched.terminate()
    output, _ = launched.communicate(timeout=60)
    assert launched.returncode == 143, output
    assert "restart 1" not in output
    assert run.saved()[-1] == run.steps()[-1] < NUM_STEPS
    assert not run.processes()


def test_no_room_is_said_in_one_line(address, run):
    output, _ = start(run, address, "--cpus_per_worker", 5, "--wait", 1).communicate(timeout=60)
    assert 'error: no room for 2 workers of {"CPU": 5.0} (STRICT_SPREAD) within 1 s' in output
    assert "Traceback" not in output
