"""The compilers that are installed know every flag; the user's own win."""

import importlib.util
import os
import subprocess
import sys

import pytest

from llm_jax.sharding import xla_flags

COMPILES_FOR_V5P = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
mesh = topologies.make_mesh(topology, (4,), ("x",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
matrix = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=rows)
options = dict(pair.split("=") for pair in sys.argv[1:])
compiled = jax.jit(lambda a, b: a @ b).lower(matrix, matrix).compile(compiler_options=options)
print("compiled" if "all-gather" in compiled.as_text() else "no collective")
"""
# libtpu compiles for machines that are not there if it is told what to pretend.
PRETEND = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_libtpu
def test_libtpu_knows_every_tpu_flag():
    flags = " ".join(xla_flags.xla_flags("tpu"))
    found = python(COMPILES_FOR_V5P, LIBTPU_INIT_ARGS=flags, **PRETEND)
    assert found.stdout == "compiled\n", found.stderr
    unknown = python(COMPILES_FOR_V5P, LIBTPU_INIT_ARGS=flags + " --xla_tpu_nonsense=1", **PRETEND)
    assert "Unknown command line flag" in unknown.stdout + unknown.stderr


@needs_libtpu
def test_a_compilation_takes_every_tpu_flag_as_an_option():
    options = [f"{name}={value}" for name, value in xla_flags.compiler_options("tpu").items()]
    found = python(COMPILES_FOR_V5P, *options, **PRETEND)
    assert found.stdout == "compiled\n", found.stderr


def test_jaxlib_knows_every_gpu_flag():
    """XLA reads all of XLA_FLAGS on every backend, and aborts on what it does not know."""
    flags = " ".join(xla_flags.xla_flags("gpu"))
    assert flags
    assert python("import jax; jax.devices()", XLA_FLAGS=flags).returncode == 0
    unknown = python("import jax; jax.devices()", XLA_FLAGS=flags + " --xla_gpu_nonsense=1")
    assert unknown.returncode != 0
    assert "Unknown flag" in unknown.stderr


def test_the_users_flags_win():
    mine = xla_flags.FLAGS["gpu"][0]
    environment = {"XLA_FLAGS": f"--xla_dump_to=/tmp/x --{mine.name}=false"}
    added = xla_flags.apply("gpu", environment)
    assert added == xla_flags.xla_flags("gpu")[1:]
    given = environment["XLA_FLAGS"].split()
    assert given == ["--xla_dump_to=/tmp/x", f"--{mine.name}=false", *added]
    assert xla_flags.apply("gpu", environment) == ()
    assert environment["XLA_FLAGS"].split() == given


def test_flags_go_where_the_compiler_reads_them():
    for platform, variable in (("tpu", "LIBTPU_INIT_ARGS"), ("gpu", "XLA_FLAGS")):
        environment = {}
        xla_flags.apply(platform, environment)
        assert list(environment) == [variable]
    environment = {}
    assert xla_flags.apply("cpu", environment) == ()
    assert environment == {}


def test_they_can_be_switched_off(tmp_path, monkeypatch):
    environment = {"LLM_JAX_XLA_FLAGS": "off"}
    assert xla_flags.apply("gpu", environment) == ()
    assert "XLA_FLAGS" not in environment
    apart = {"LLM_JAX_XLA_FLAGS": "off"}
    monkeypatch.setattr(xla_flags, "_installed", lambda *_: True)
    assert xla_flags.apply(None, apart, tmp_path) == ()
    assert apart["JAX_PLATFORMS"] == "cpu", "libtpu is still told not to look for chips"
    with pytest.raises(ValueError, match="LLM_JAX_XLA_FLAGS=no: expected on or off"):
        xla_flags.apply("gpu", {"LLM_JAX_XLA_FLAGS": "no"})


def test_unknown_platforms_are_told():
    with pytest.raises(ValueError, match="platform 'npu' is unknown; choices: tpu, gpu, cpu"):
        xla_flags.apply("npu", {})


@pytest.mark.parametrize(
    ("jax_platforms", "device", "installed", "expected"),
    [
        ("cuda,cpu", None, (), "gpu"),
        ("tpu", None, (), "tpu"),
        ("cpu", "nvidia0", ("jax_cuda13_plugin",), "cpu"),
        ("", "nvidia0", ("jax_cuda13_plugin",), "gpu"),
        ("", "nvidia0", (), "cpu"),
        ("", "nvidiactl", ("jax_cuda13_plugin",), "cpu"),
        ("", "accel0", ("libtpu",), "tpu"),
        ("", "vfio/0", ("libtpu",), "tpu"),
        ("", "vfio/0", (), "cpu"),
        ("", None, ("libtpu", "jax_cuda13_plugin"), "cpu"),
    ],
)
def test_the_platform_is_guessed_from_devices_and_plugins(
    jax_platforms, device, installed, expected, tmp_path, monkeypatch
):
    if device is not None:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    assert xla_flags.guess_platform({"JAX_PLATFORMS": jax_platforms}, tmp_path) == expected
