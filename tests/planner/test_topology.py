"""Slices by name; their devices where libtpu is installed."""

import importlib.util
import json
import math

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.planner import topology
from llm_jax.planner.topology import CHIPS, parse_name, parse_target, shapes, wrap_of

libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(
    ("name", "shape", "slices", "wraps"),
    [
        ("v5p-16", (2, 2, 4), 1, 0),
        ("v5p-128", (4, 4, 8), 1, 3),
        ("v5p-1024", (8, 8, 16), 1, 3),
        ("v5p:16x16x16", (16, 16, 16), 1, 3),
        ("v6e-16", (4, 4, 1), 1, 0),
        ("v6e-128", (8, 16, 1), 1, 1),
        ("v6e-256", (16, 16, 1), 1, 2),
        ("v6e-4096", (16, 16, 1), 16, 2),
        ("2xv5e:4x8", (4, 8, 1), 2, 0),
        ("tpu7x-64", (4, 4, 4), 1, 3),
    ],
)
def test_names(name, shape, slices, wraps):
    chip, *found = parse_name(name)
    assert found == [shape, slices]
    assert sum(wrap_of(chip, shape)) == wraps


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-100", "nearest is v5p-128"),
        ("v5p-0", "nearest is v5p-1"),
        ("v6e:4x5", "nearest is v6e:4x4"),
        ("v6e:3x5", "nearest is v6e:4x4"),
        ("v6e:4x4x4", "nearest is v6e:4x4"),
        ("v5p:8x4x4", "nearest is v5p:4x4x8"),
        ("v6-16", "did you mean 'v6e'"),
        ("v9x-16", "nearest first: v"),
        ("v4-8", "did you mean 'v5.'. known, nearest first: v5"),
        ("99999999999xv5e-256", "25,599,999,999,744 chips; at most 131,072"),
        ("v5p", "expected generation and chips.*nearest first: v5p"),
        ("h100-8", "h100 is no TPU"),
        ("0xv5p-4", "expected generation and chips"),
    ],
)
def test_errors_are_one_line_and_name_what_works(name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_name(name)
    assert "\n" not in str(caught.value)


def test_generations_go_by_their_other_names_too():
    for name, chip in (("v5litepod-16", "v5e"), ("ironwood-64", "tpu7x")):
        assert parse_target(name).chip.name == chip


def test_every_nearest_slice_can_be_asked_for():
    for chip in (chip for chip in CHIPS.values() if chip.kind == "tpu"):
        sizes = [math.prod(shape) for shape in shapes(chip)]
        assert sizes == sorted(sizes)
        assert max(sizes) <= chip.largest
        for shape in shapes(chip):
            by_number = parse_name(f"{chip.name}-{math.prod(shape)}")[1]
            assert math.prod(by_number) == math.prod(shape)
            assert sum(by_number) <= sum(shape), "the most compact one of its size"


@pytest.mark.parametrize(
    ("name", "kind", "chips", "slices"),
    [
        ("v5p:4x4x4", "tpu", 64, 1),
        ("2xv6e-256/mesh", "tpu", 512, 2),
        ("h100-8", "gpu", 8, 1),
        ("l4-1", "gpu", 1, 1),
        ("2xh100-8", "gpu", 16, 2),
        ("h100-64", "gpu", 64, 8),
        ("a100_40gb-4", "gpu", 4, 1),
        ("local", "local", 0, 1),
    ],
)
def test_targets(name, kind, chips, slices):
    target = parse_target(name)
    assert (target.name, target.kind, target.num_chips, target.num_slices) == (
        name, kind, chips, slices,
    )  # fmt: skip
    assert (target.chip is None) == (name == "local")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h100-12", "the nearest is h100-16"),
        ("h100", "the nearest is h100-8"),
        ("h10-8", "did you mean 'h100'"),
        ("loca", "nearest first: local"),
        ("H100-8", "nearest first: h100, h200"),
        ("99999999999xh100-8", "799,999,999,992 chips; at most 131,072"),
        ("v5p:4x4", "nearest is v5p:"),
    ],
)
def test_unknown_targets_name_the_nearest_in_one_line(name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_target(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chip_of_two_devices_says_so():
    assert parse_target("tpu7x-8").devices_per_chip == 2
    assert parse_target("v5p-8").devices_per_chip == 1


def test_links_after_the_slash():
    with pytest.raises(ConfigError, match="must be torus or mesh"):
        topology.topology("v5p-16/ring")


def test_without_libtpu_one_line_names_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(topology.importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r'pip install "llm_jax\[tpu\]"'):
        topology.topology("v5p-16")


DEVICES = """
import json, os
from llm_jax.planner.topology import make_mesh, topology
from llm_jax.sharding.mesh import MeshConfig
found = {}
for name in ("v5e-1", "v5p-1", "v5p-16", "v5p-16/torus", "v5p-4096", "v6e-256", "v6e-512", "tpu7x-64"):
    slices = topology(name)
    mesh = make_mesh(MeshConfig(fsdp=-1), slices)
    shape = {k: n for k, n in mesh.shape.items() if n > 1}
    found[name] = [slices.num_chips, len(slices.devices), sum(slices.wrap), shape]
assert os.environ["JAX_PLATFORMS"] == "cpu"
print(json.dumps(found))
"""


@libtpu
def test_devices_and_meshes_from_one_chip_to_4096(run_python):
    done = run_python("-c", DEVICES)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "v5e-1": [1, 1, 0, {}],
        "v5p-1": [1, 1, 0, {}],
        "v5p-16": [16, 16, 0, {"fsdp": 16}],
        "v5p-16/torus": [16, 16, 3, {"fsdp": 16}],
        "v5p-4096": [4096, 4096, 3, {"fsdp": 4096}],
        "v6e-256": [256, 256, 2, {"fsdp": 256}],
        "v6e-512": [512, 512, 2, {"data": 2, "fsdp": 256}],
        "tpu7x-64": [64, 128, 3, {"fsdp": 128}],
    }
