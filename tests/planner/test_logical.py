"""Whole shapes of activations, from what one device holds."""

import types

import pytest

from llm_jax.planner.compiled import MeshAxis
from llm_jax.planner.logical import name_shapes
from llm_jax.planner.plan import LiveBuffer, Memory

CONFIG = {
    "model": {"num_layers": 24, "num_heads": 16, "num_kv_heads": 4, "embed_dim": 2048,
              "mlp_dim": 5632, "vocab_size": 32_768, "head_dim": 128},
    "data": {"sequence_length": 4096},
    "train": {"batch_size": 512, "accumulate_steps": 2},
    "mesh": {"rules": "default"},
}  # fmt: skip


def named(shape, part="activations", fsdp=16, tensor=4, context=2):
    mesh = tuple(
        MeshAxis(name, size, ())
        for name, size in {"fsdp": fsdp, "tensor": tensor, "context": context, "data": 1}.items()
    )
    step = types.SimpleNamespace(config=CONFIG, mesh=mesh, arguments=())
    buffer = LiveBuffer(part, 1, "bf16", shape, None, None, "", "", "", "")
    memory = Memory(1, 1, {}, (buffer,), (), "")
    (found,) = name_shapes(memory, step).buffers
    return found.logical_shape, found.sharding


@pytest.mark.parametrize(
    ("local", "whole", "sharding"),
    [
        ((24, 16, 4, 2048, 128), (24, 256, 16, 4096, 128), "[-, fsdp, tensor, context, -]"),
        ((16, 2048, 1408), (256, 4096, 5632), "[fsdp, context, tensor]"),
        ((32_768, 8192), (256 * 4096, 32_768), "[fsdp+context, tensor]"),
    ],
)
def test_local_sizes_tell_the_whole(local, whole, sharding):
    assert named(local) == (whole, sharding)


def test_what_no_size_explains_keeps_its_local_shape():
    assert named((16, 2048, 77)) == (None, None)
    assert named((16, 2048, 1408), part="gradients") == (None, None)


def test_a_dimension_of_one_is_itself_where_nothing_is_cut_to_one():
    whole = ((1, 256, 4096, 2048), "[-, fsdp, context, -]")
    assert named((1, 16, 2048, 2048), tensor=2) == whole


def test_one_row_per_device_is_a_share_of_all_rows():
    assert named((24, 1, 4096, 2048), fsdp=256, tensor=1, context=1) == (
        (24, 256, 4096, 2048),
        "[-, fsdp, -, -]",
    )
    # Which of two is the row, nobody can tell.
    assert named((1, 1, 4096, 2048), fsdp=256, tensor=1, context=1) == (None, None)


def test_a_size_is_used_once():
    assert named((16, 16, 2048)) == (None, None)
