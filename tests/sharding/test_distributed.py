"""Who a process is, from what launchers set; and how the processes of a job find each other."""

import concurrent.futures
import contextlib
import importlib.util
import re
import socket
import subprocess
import sys

import pytest

from llm_jax.core.flags import RunError
from llm_jax.sharding import distributed, xla_flags
from llm_jax.sharding.coordinator import Meeting, MeetingError, meet
from llm_jax.sharding.distributed import Process, find_process, start_distributed

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[003-004],other1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GPUS = {"JAX_PLATFORMS": "cuda,cpu"}
GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "j-0.svc,j-1.svc,j-2.svc,j-3.svc"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, None, id="alone"),
        pytest.param(
            {
                "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3",
                **SLURM,
            },
            Process("a:1", 4, 3), id="explicit wins, and sees all GPUs",
        ),
        pytest.param(
            {
                "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0",
                "JAX_LOCAL_DEVICE_IDS": "2,3",
            },
            Process("a:1", 2, 0, (2, 3)), id="explicit with GPUs",
        ),
        pytest.param(SLURM, Process("node003:62055", 4, 3), id="slurm on CPUs"),
        pytest.param(
            {**SLURM, **GPUS, "SLURM_GPUS_ON_NODE": "2"}, Process("node003:62055", 4, 3, (1,)),
            id="slurm, a task for each GPU",
        ),
        pytest.param(
            {**SLURM, **GPUS, "SLURM_GPUS_ON_NODE": "8"},
            Process("node003:62055", 4, 3, (4, 5, 6, 7)), id="slurm, a task for four GPUs",
        ),
        pytest.param(
            {**SLURM, **GPUS, "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"},
            Process("node003:62055", 4, 3), id="slurm shows each task its own GPU",
        ),
        pytest.param(
            {**SLURM, **GPUS, "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"},
            Process("node003:62055", 4, 3), id="slurm shows each task its own two GPUs",
        ),
        pytest.param(
            {**SLURM, "SLURM_GPUS_ON_NODE": "3"}, Process("node003:62055", 4, 3),
            id="GPUs that jax does not use need no shares",
        ),
        pytest.param(
            {**SLURM, **GPUS, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"},
            Process("node003:62055", 4, 3), id="slurm, a task for each host",
        ),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None, id="a shell of salloc"),
        pytest.param(
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.1.0.1:34911"},
            Process("10.96.0.1:62624", 2, 1), id="open mpi 4",
        ),
        pytest.param(
            {
                **OPEN_MPI, **GPUS, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:99",
                "CUDA_VISIBLE_DEVICES": "0,1",
            },
            Process("10.0.0.1:99", 2, 1, (1,)), id="open mpi 5",
        ),
        pytest.param(
            {name: SLURM[name] for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")}, None,
            id="a step of slurm that is over",
        ),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "2"}, None, id="open mpi without a rank"),
        pytest.param(GKE, Process("j-0.svc:8482", 4, 2), id="one slice on GKE"),
        pytest.param(
            {
                **GKE, "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080", "JAX_COORDINATOR_PORT": "1234",
            },
            Process("first.svc:1234", 12, 10), id="three slices on GKE",
        ),
        pytest.param(
            {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None, id="one TPU host"
        ),
    ],
)  # fmt: skip
def test_what_launchers_set_says_who_a_process_is(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process() == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID set, but not JAX_NUM_PROCESSES: set all three",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID=2 JAX_NUM_PROCESSES=2: expected numbers, id < number",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            "JAX_COORDINATOR_ADDRESS=host: expected host:port",
        ),
        ({**SLURM, "JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT=http: expected a port"),
        ({**SLURM, **GPUS, "SLURM_GPUS_ON_NODE": "5"}, "5 GPUs for 2 tasks on a host: expected"),
        (OPEN_MPI, "add `-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun"),
    ],
)
def test_contradictions_are_told_in_one_line(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        find_process()
    assert "\n" not in str(caught.value)


def test_gpus_that_no_variable_counts_are_counted_by_their_devices(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    address = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}
    for name, value in {**OPEN_MPI, **GPUS, **address}.items():
        monkeypatch.setenv(name, value)
    assert find_process() == Process("10.0.0.1:99", 2, 1, (2, 3))


@pytest.mark.parametrize(
    ("device", "plugins", "given", "expected"),
    [
        (None, ("libtpu",), None, "cpu"),
        ("nvidia0", ("libtpu", "jax_cuda13_plugin"), None, "cuda,cpu"),
        ("kfd", ("libtpu", "jax_rocm7_plugin"), None, "rocm,cpu"),
        ("accel0", ("libtpu",), None, None),
        (None, (), None, None),
        (None, ("libtpu",), "", ""),
    ],
)
def test_a_machine_without_a_tpu_is_not_searched_for_one(
    device, plugins, given, expected, tmp_path, monkeypatch
):
    if device:
        (tmp_path / device).touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in plugins else None
    )
    environment = {} if given is None else {"JAX_PLATFORMS": given}
    xla_flags.apply(environment=environment, devices=tmp_path)
    assert environment.get("JAX_PLATFORMS") == expected


def gather(guests, count, timeout=10.0):
    """What (index, count) guests of a meeting of `count` are told; None for "go"."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            meeting = pool.submit(Meeting(listener, count).run, timeout)
            told = [
                pool.submit(meet, address, index, number, f"host{place}", timeout)
                for place, (index, number) in enumerate(guests)
            ]
            answers = [future.exception() for future in [meeting, *told]]
    assert all(answer is None or isinstance(answer, MeetingError) for answer in answers)
    return [None if answer is None else str(answer) for answer in answers]


def test_all_may_go_once_all_have_come():
    assert gather([(2, 3), (0, 3), (1, 3)], 3) == [None] * 4


def test_who_is_missing_is_told_to_all():
    reason = "process 1, 3 of 4 did not come within 1 s"
    assert gather([(0, 4), (2, 4)], 4, timeout=1.0) == [reason] * 3


def test_two_of_the_same_number_are_told_apart_by_host():
    for answer in gather([(0, 3), (1, 3), (1, 3)], 3)[:1]:
        assert "two processes say they are process 1, on host" in answer


def test_processes_that_count_differently_do_not_start():
    assert "counts 8 processes, process 0 counts 2" in gather([(0, 2), (1, 8)], 2)[0]


def test_strangers_do_not_disturb_the_meeting():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            meeting = pool.submit(Meeting(listener, 1).run, 10.0)
            for line in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"hello 0\n", b""):
                with socket.create_connection(address) as stranger:
                    stranger.sendall(line)
            meet(f"127.0.0.1:{address[1]}", 0, 1, "here", 10.0)
            assert meeting.result() is None


def test_a_service_that_lingers_from_an_earlier_run_is_waited_out():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        arrival = pool.submit(
            meet, f"127.0.0.1:{listener.getsockname()[1]}", 0, 1, "here", timeout=10.0
        )
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall(b"\x00\x00\x12\x04\xfe\xff\n")
        connection.close()
        Meeting(listener, 1).run(10.0)
        assert arrival.result() is None


def test_one_who_left_while_waiting_is_missing_again():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        meeting = pool.submit(Meeting(listener, 2).run, 1.5)
        with socket.create_connection(listener.getsockname()) as leaves:
            leaves.sendall(b"hello 1 2 there\n")
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(MeetingError, match="process 1 of 2 did not come"):
            meet(address, 0, 2, "here", 10.0)
        assert isinstance(meeting.exception(), MeetingError)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_coordinator_that_nobody_started_is_told_by_address(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(RunError) as caught:
        start_distributed(timeout=1.0)
    assert f"process 1 of 2 found no coordinator at {address} within 1 s" in str(caught.value)


def test_a_port_that_cannot_be_had_is_told_with_the_reason(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "192.0.2.1:1234")  # of no machine
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(RunError) as caught:
        start_distributed(timeout=1.0)
    assert str(caught.value) == (
        "the coordinator at 127.0.0.1:1234 cannot listen on 192.0.2.1:1234: "
        "cannot assign requested address"
    )


def explicit(monkeypatch, address, index):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", str(index))


def test_a_coordinator_of_this_host_alone_cannot_be_reached_from_others(monkeypatch):
    port = free_port()
    explicit(monkeypatch, f"127.0.0.1:{port}", 0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        start = pool.submit(start_distributed, timeout=3.0)
        listening = None
        while listening is None and not start.done():
            with contextlib.suppress(OSError):
                listening = socket.create_connection(("127.0.0.1", port))
        with listening, pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port)).close()
        assert "process 1 of 2 did not come" in str(start.exception())
    assert distributed._bind_address("localhost:1") == "localhost:1"
    assert distributed._bind_address("[::1]:1") == "[::1]:1"
    assert distributed._bind_address("127.example.com:1") == "[::]:1"


def test_missing_peers_name_who_counts_on_them(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "127.0.0.1")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    with pytest.raises(RunError) as caught:
        start_distributed(timeout=1.0)
    assert str(caught.value).endswith(
        "; Slurm says this is task 3 of 4 (SLURM_STEP_NUM_TASKS); unset it to run alone"
    )


def test_a_coordinator_that_waits_for_its_port_ends_with_process_0():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "llm_jax.sharding.coordinator", "--count=2"]
        command += ["--bind", f"127.0.0.1:{taken.getsockname()[1]}", "--timeout=60"]
        coordinator = subprocess.Popen(
            [*command, "--heartbeat=60", "--linger=60"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert coordinator.stdout.readline() == b"busy\n"
        coordinator.stdin.close()
        assert coordinator.wait(timeout=10) == 1
        coordinator.stdout.close()


def test_the_coordinator_leaves_when_process_0_dies_before_the_others_came():
    command = [sys.executable, "-m", "llm_jax.sharding.coordinator", "--bind"]
    command += [f"127.0.0.1:{free_port()}", "--count=2", "--timeout=60", "--heartbeat=60"]
    coordinator = subprocess.Popen(
        [*command, "--linger=60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert coordinator.stdout.readline() == b"listening\n"
    coordinator.stdin.close()
    assert coordinator.wait(timeout=10) == 1
    coordinator.stdout.close()
