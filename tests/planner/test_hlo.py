"""Collectives, loops and buffers read from programs that are compiled here."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm_jax.planner.hlo import analyse
from llm_jax.planner.hlo_text import array_bytes, parse_instruction

LAYERS, WIDTH, ROWS = 5, 64, 16
P = PartitionSpec


def mesh_of(*shape):
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


@pytest.fixture(scope="module")
def fsdp():
    """The gradient of a scan over layers whose weights are gathered on the way."""
    mesh = mesh_of(8)
    sharding = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def loss(x, weights):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), sharding("x")), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=sharding("x"))
    weights = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=sharding(None, "x")
    )
    gradient = jax.jit(jax.grad(loss, 1), out_shardings=sharding(None, "x"))
    return analyse(gradient.lower(x, weights).compile().as_text())


def test_counts_and_bytes_per_step_and_per_layer(fsdp):
    weight = WIDTH * WIDTH * 4
    gathers, sums = fsdp.totals()["all-gather"], fsdp.totals()["all-reduce"]
    assert (gathers.count, gathers.bytes) == (2 * LAYERS, 2 * LAYERS * weight)
    assert (sums.count, sums.bytes) == (LAYERS, LAYERS * weight)
    assert gathers.sent_bytes == gathers.bytes * 7 / 8
    assert sums.sent_bytes == sums.bytes * 2 * 7 / 8
    forward, backward = fsdp.layers("forward"), fsdp.layers("backward")
    assert (forward.trips, backward.trips) == (LAYERS, LAYERS)
    assert {k: t.count for k, t in fsdp.loop_totals(forward).items()} == {"all-gather": 1}
    assert fsdp.loop_totals(backward)["all-reduce"].bytes == weight
    assert fsdp.untimed == {"all-gather": 2 * LAYERS, "all-reduce": LAYERS}
    assert fsdp.cycles == 0


def test_buffers_are_those_of_one_device(fsdp):
    assert fsdp.has_buffer((WIDTH, WIDTH), "f32")
    assert not fsdp.has_buffer((WIDTH, WIDTH), "bf16")
    assert not fsdp.has_buffer((ROWS, WIDTH)), "rows are in shares of 2"
    largest = fsdp.largest_buffers(3)
    assert largest[0].bytes == WIDTH * WIDTH * 4
    assert [b.bytes for b in largest] == sorted((b.bytes for b in largest), reverse=True)


def test_every_kind_with_its_group_in_nested_loops():
    mesh = mesh_of(4, 2)

    def body(x):
        def step(x, _):
            x = jax.lax.psum_scatter(jnp.sin(x), "x", scatter_dimension=0, tiled=True)
            x = jax.lax.all_gather(x * 2, "x", tiled=True)
            x = jax.lax.all_to_all(jnp.cos(x), "y", 0, 0, tiled=True)
            x = jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.psum(jnp.tanh(x), ("x", "y")), None

        inner = lambda x, _: (jax.lax.scan(step, x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, length=7)[0]

    split = P(("x", "y"))
    function = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, split))
    summary = analyse(jax.jit(function).lower(x).compile().as_text())
    local = 64 * 32 * 4 // 8
    found = {c.kind: (c.group_size, c.bytes, c.times) for c in summary.collectives}
    assert found == {
        "reduce-scatter": (4, local, 21),
        "all-gather": (4, local, 21),
        "all-to-all": (2, local, 21),
        "collective-permute": (None, local, 21),
        "all-reduce": (8, local, 21),
    }
    outer = next(loop for loop in summary.loops if loop.trips == 7)
    assert summary.loop_totals(outer)["all-reduce"].count == 3


def test_lines_as_the_tpu_compiler_writes_them():
    one = parse_instruction(
        "  %all-gather-start.1 = ((bf16[4,8]{1,0:T(8,128)(2,1)}, f32[2]{0:T(1024)S(1)}), "
        "(bf16[32,8]{1,0:T(8,128)(2,1)}, f32[16]{0})) all-gather-start(%a.1, %b), channel_id=3, "
        "replica_groups=[2,8]<=[4,4]T(1,0), dimensions={0}, "
        'metadata={op_name="jit(f)/while/body/x" stack_frame_id=4}'
    )
    assert (one.name, one.opcode, one.op_name) == (
        "all-gather-start.1", "all-gather-start", "jit(f)/while/body/x"
    )  # fmt: skip
    assert [shape for _, shape in one.shapes] == [(4, 8), (2,), (32, 8), (16,)]
    text = f"HloModule m, num_partitions=16\n\nENTRY %main (a: f32[]) -> f32[] {{\n{one_line(one)}\n}}\n"
    (found,) = analyse(text).collectives
    assert (found.kind, found.group_size, found.overlapped) == ("all-gather", 8, True)
    assert found.bytes == 32 * 8 * 2 + 16 * 4
    assert (
        parse_instruction("  ROOT %t = (s32[], /*index=1*/f32[]) tuple(%a, %b)").opcode == "tuple"
    )
    assert parse_instruction("}") is None


def test_a_collective_started_in_a_computation_of_its_own_counts_once():
    text = """HloModule m, num_partitions=8

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  %start = ((f32[64]{0}), f32[8]{0}, u32[]) async-start(%a), calls=%wrapped
  ROOT %done = f32[8]{0} async-done(%start), calls=%wrapped
}
"""
    (found,) = analyse(text).collectives
    assert (found.kind, found.bytes, found.group_size) == ("reduce-scatter", 256, 8)
    assert (found.times, found.overlapped) == (1, True)


def one_line(one) -> str:
    return f"  %{one.name} = {one.result} {one.opcode}({one.operands}){one.attributes}"


def test_bytes_of_narrow_and_wide_types():
    assert array_bytes("s4", (3,)) == 2
    assert array_bytes("f8e4m3fn", (10,)) == 10
    assert array_bytes("c64", (2, 2)) == 32
    assert array_bytes("pred", ()) == 1
    assert array_bytes("token", ()) == 0


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no HLO module"):
        analyse("nothing")


# Two programs of the TPU compiler: v5p's hides reduce-scatters in fusions, v5e's spreads an all-gather
# over the fusions that it runs beside.
TPU = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from llm_jax.planner.hlo import analyse
from llm_jax.planner.topology import topology

def summary(name, options, width=256, layers=5):
    slices = topology(name)
    n = len(slices.devices)
    mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,), devices=slices.devices)
    sharding = lambda *axes: NamedSharding(mesh, P(*axes))
    def loss(x, w):
        def layer(x, w):
            up, down = (m.astype(jnp.bfloat16) for m in w)
            return jax.lax.with_sharding_constraint(x + jax.nn.silu(x @ up) @ down, sharding("x")), None
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, w)
        return jnp.sum(x * x).astype(jnp.float32)
    array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*axes))
    x = array((2048 * n, width), jnp.bfloat16, "x")
    w = tuple(array((layers, *s), jnp.float32, None, "x") for s in ((width, 4 * width), (4 * width, width)))
    step = lambda x, w: jax.tree.map(jnp.subtract, w, jax.grad(loss, 1)(x, w))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=tuple(a.sharding for a in w))
    found = analyse(jitted.lower(x, w).compile(compiler_options=options).as_text())
    totals = {k: (t.count, t.bytes, t.overlapped) for k, t in found.totals().items()}
    loops = {d: (found.layers(d).trips, found.layers(d).cycles) for d in ("forward", "backward")}
    return dict(totals=totals, cycles=found.cycles, loops=loops)

whole = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
print(json.dumps([summary("v5p-4", {}), summary("v5e-16", whole)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_programs_of_the_tpu_compiler(run_python):
    done = run_python("-c", TPU)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout.splitlines()[-1])
    weights = 5 * 2 * 256 * 1024 * 2
    assert small["totals"]["all-gather"][:2] == [20, 2 * weights]
    count, scattered, _ = small["totals"]["reduce-scatter"]
    assert count == 10
    assert weights <= scattered < 1.2 * weights, "padded for the ring, counted once"
    assert "all-reduce" not in small["totals"]
    for one in (small, large):
        loops = one["loops"]
        assert all(trips == 5 for trips, _ in loops.values())
        inside = sum(trips * cycles for trips, cycles in loops.values())
        assert 0.7 * one["cycles"] < inside < one["cycles"]
        assert loops["backward"][1] > loops["forward"][1] > 0
    *gathers, overlapped = large["totals"]["all-gather"]
    assert gathers == [20, 2 * weights], "once each, however many fusions it stands in"
    assert 0 < overlapped < 20
