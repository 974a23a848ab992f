"""Time of a step: who says how long an op takes, what hides, what is left exposed."""

import dataclasses
import math

import pytest

from llm_jax.planner.chips import CHIPS
from llm_jax.planner.compiled import CompiledStep, MeshAxis, Span
from llm_jax.planner.kernels import Mask, cores
from llm_jax.planner.roofline import read_roofline

V5E, V5P, V6E = CHIPS["v5e"], CHIPS["v5p"], CHIPS["v6e"]
RING = Span("link", 0, 16, True)
MESH = (MeshAxis("data", 1, ()), MeshAxis("fsdp", 16, (RING,)))
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, use_global_device_ids=true"
WEIGHT = "bf16[4096,4096]{1,0:T(8,128)(2,1)}"
SHARE = "bf16[256,4096]{1,0:T(8,128)(2,1)}"
GATHERED = 4096 * 4096 * 2 * 15 / 16 / (2 * V5E.link_bytes_per_second)
CYCLES = 1_500_000  # a millisecond on v5e


def step_of(*lines, before="", mesh=MESH, config=None):
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m, num_partitions=16\n\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    return CompiledStep(
        target="v5e:16x16", config=config or {"model": {"name": "gpt"}}, mesh=mesh,
        arguments=(), num_params=1, tokens_per_step=16_000, model_flops={"full": 6e9, "causal": 5e9},
        seconds={}, host_peak_bytes=0, versions={}, memory=None, out_of_memory=None, hlo=text,
        buffer_assignment="", live_ranges="",
    )  # fmt: skip


def timed(name, operands, cycles=CYCLES, result="f32[8]{0:S(1)}"):
    return (
        f"%{name} = {result} fusion({operands}), kind=kLoop, calls=%nothing, "
        f'metadata={{op_name="jit(f)/jvp(stack)/layers/mlp/mul"}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


NOTHING = "%nothing (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8] parameter(0)\n}\n"
A = "%a = f32[8]{0:S(1)} parameter(0)"
SHARD = f"%w = {SHARE} parameter(1)"
START = (
    f"%start = ({SHARE}, {WEIGHT}) all-gather-start(%w), {GROUPS}, dimensions={{0}}, "
    'metadata={op_name="jit(f)/jvp(stack)/layers/mlp/btd,df->btf/dot_general"}'
)
DONE = f"%done = {WEIGHT} all-gather-done(%start)"


def read(*lines, chip=V5E, **fields):
    return read_roofline(step_of(*lines, before=fields.pop("before", NOTHING), **fields), chip)


def op(roofline, name):
    return next(one for one in roofline.ops if one.name == name)


def test_the_bounds_sum_to_the_step_and_the_rates_follow():
    roofline = read(A, SHARD, timed("x", "%a"), START, DONE, timed("y", "%x"))
    assert math.fsum(roofline.bounds.values()) == pytest.approx(roofline.step_seconds, rel=1e-12)
    exposed = sum(one.exposed * one.times for one in roofline.ops)
    assert exposed == pytest.approx(roofline.step_seconds)
    assert roofline.tokens_per_second == pytest.approx(1000 / roofline.step_seconds)
    assert roofline.mfu == pytest.approx(6e12 / roofline.step_seconds / V5E.peak_flops)
    assert roofline.mfu_causal == pytest.approx(roofline.mfu * 5 / 6)
    assert roofline.from_compiler == pytest.approx(2e-3 / roofline.step_seconds)


def test_efficiency_divides_all_times():
    step = step_of(A, SHARD, timed("x", "%a"), START, DONE, before=NOTHING)
    whole, half = read_roofline(step, V5E), read_roofline(step, V5E, efficiency=0.5)
    assert half.step_seconds == pytest.approx(2 * whole.step_seconds)
    assert half.exchanges[0].exposed == pytest.approx(2 * whole.exchanges[0].exposed)
    assert (whole.efficiency, half.efficiency) == (1.0, 0.5)


def test_a_gather_hides_behind_what_runs_beside_it():
    alone = read(A, SHARD, START, DONE)
    (exchange,) = alone.exchanges
    assert (exchange.axes, exchange.kind, exchange.direction) == ("fsdp", "all-gather", "forward")
    assert exchange.seconds == pytest.approx(GATHERED, rel=0.05)
    assert exchange.exposed == exchange.seconds == alone.step_seconds
    short = int(exchange.seconds / 2 * V5E.clock_hz)
    half = read(A, SHARD, START, timed("x", "%a", short), DONE)
    assert half.exchanges[0].exposed == pytest.approx(exchange.seconds / 2, rel=1e-3)
    assert half.step_seconds == pytest.approx(exchange.seconds, rel=1e-3)
    hidden = read(A, SHARD, START, timed("x", "%a", 10 * short), DONE)
    assert hidden.exchanges[0].exposed == 0
    assert list(hidden.bounds) == ["other"], "the unknown work of a fusion in VMEM"


def test_gathers_under_way_share_their_links():
    again = (
        START.replace("%start", "%start2"),
        DONE.replace("%done", "%done2").replace("%start", "%start2"),
    )
    both = read(A, SHARD, START, again[0], DONE, again[1])
    assert both.step_seconds == pytest.approx(2 * read(A, SHARD, START, DONE).step_seconds)


def test_a_synchronous_collective_is_exposed_and_delays_what_is_under_way():
    reduce = f"%r = f32[4096]{{0}} all-reduce(%v), {GROUPS}, to_apply=%add"
    vector = "%v = f32[4096]{0} parameter(2)"
    lines = (A, SHARD, vector, START, reduce, DONE)
    small, large = (one.seconds for one in reversed(read(*lines).exchanges))
    assert [one.exposed for one in read(*lines).exchanges] == pytest.approx([large, small])
    assert read(*lines).bounds == pytest.approx({"communication fsdp": large + small})


def test_copies_between_memories_hide_too():
    lines = (
        "%h = bf16[4096,4096]{1,0} parameter(0)",
        "%s = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%h)",
        "%x = f32[8]{0:S(1)} parameter(1)",
        timed("work", "%x", 10_000),
        "%d = bf16[4096,4096]{1,0:S(1)} copy-done(%s)",
    )
    copied = op(read(*lines), "s")
    whole = 4096 * 4096 * 2 / V5E.hbm_bytes_per_second
    assert (copied.kind, copied.bound, copied.seconds) == ("copy", "memory", pytest.approx(whole))
    assert copied.exposed == pytest.approx(whole - 10_000 / V5E.clock_hz)


def test_what_goes_to_the_host_goes_over_its_bus():
    lines = (
        "%h = bf16[4096,4096]{1,0} parameter(0)",
        "%s = (bf16[4096,4096]{1,0:S(5)}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%h)",
        "%d = bf16[4096,4096]{1,0:S(5)} copy-done(%s)",
    )
    for chip, rate in ((V5E, 16e9), (V6E, 32e9)):
        roofline = read(*lines, chip=chip)
        assert roofline.bounds == {"communication host": pytest.approx(4096 * 4096 * 2 / rate)}
        assert roofline.exchanges == ()


def test_loops_multiply_and_the_dearest_branch_counts():
    before = f"""{NOTHING}
%one (p: f32[8]) -> f32[8] {{
  {A}
  ROOT {timed("cheap", "%a", 1000)}
}}

%two (p: f32[8]) -> f32[8] {{
  {A}
  ROOT {timed("dear", "%a", 3000)}
}}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{{0:S(1)}} get-tuple-element(%t), index=1
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  %y = f32[8] conditional(%i, %x, %x), branch_computations={{%one, %two}}
  ROOT %out = (s32[], f32[8]) tuple(%next, %y)
}}

%cond (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
"""
    roofline = read(
        A,
        "%zero = s32[] constant(0)",
        "%t = (s32[], f32[8]) tuple(%zero, %a)",
        "ROOT %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body",
        before=before,
    )
    names = {one.name: one.times for one in roofline.ops}
    assert names["dear"] == 12
    assert "cheap" not in names
    assert op(roofline, "dear").exposed * 12 == pytest.approx(12 * 3000 / V5E.clock_hz)


PRODUCT = (
    "%x = bf16[4096,4096]{1,0} parameter(0)",
    "%y = bf16[4096,4096]{1,0} parameter(1)",
    "ROOT %z = bf16[4096,4096]{1,0} convolution(%x, %y), dim_labels=bf_io->bf",
)


def test_without_cycles_the_roofline_decides():
    product = op(read(*PRODUCT), "z")
    assert (product.by, product.bound, product.kind) == ("roofline", "compute", "matmul")
    assert product.seconds == pytest.approx(2 * 4096**3 / V5E.peak_flops)
    slow = dataclasses.replace(V5E, hbm_bytes_per_second=1e9)
    assert op(read(*PRODUCT, chip=slow), "z").bound == "memory"


def test_cycles_nobody_knows_are_no_cycles():
    unknown = PRODUCT[-1] + ', backend_config={"estimated_cycles":"9223372036854775807"}'
    assert op(read(*PRODUCT[:2], unknown), "z").by == "roofline"
    assert read(A).step_seconds == 0
    assert read(A).mfu == 0


def splash(part, rows=4, heads=8, length=4096, head_dim=128, block=512):
    shape = f"bf16[{rows},{heads},{length},{head_dim}]{{3,2,1,0}}"
    grid = length // block
    names = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}[part]
    return (
        f"%next = s8[1,{grid},{grid}]{{2,1,0}} parameter(0)",
        *(f"%{name} = {shape} parameter({i})" for i, name in enumerate("qkv", 1)),
        f"%splash_mha_{part}_segmented.1 = ({shape}) custom-call(%next, %next, %q, %k, %v), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        f'"xprof_metadata":"{{\\"block_q{names}\\": {block}, \\"block_kv{names}\\": {block}}}"\n'
        f'}}}}, metadata={{op_name="jit(f)/splash_mha_{part}"}}',
    )


@pytest.mark.parametrize(("part", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_attention_visits_the_blocks_of_its_mask(part, products):
    causal = op(read(*splash(part)), f"splash_mha_{part}_segmented.1")
    assert (causal.kind, causal.by) == ("attention", "kernel")
    blocks = 8 * 9 // 2
    assert causal.flops == 2 * products * 128 * 4 * 8 * blocks * 512 * 512
    share = causal.flops / V5E.peak_flops / causal.seconds
    assert 0.5 < share < 1, "never faster than the matrix unit"
    full = op(read(*splash(part), config={"model": {"name": "bert"}}), causal.name)
    assert full.flops == pytest.approx(causal.flops * 64 / 36)
    assert full.seconds > 1.5 * causal.seconds


def test_narrow_heads_leave_half_of_a_wide_matrix_unit_idle():
    on_v6e = [op(read(*splash("dkv", head_dim=h), chip=V6E), "splash_mha_dkv_segmented.1")
              for h in (128, 256)]  # fmt: skip
    shares = [one.flops / V6E.peak_flops / one.seconds for one in on_v6e]
    assert shares[0] <= 0.5
    assert shares[1] > 1.5 * shares[0]


def test_a_chip_of_two_cores_splits_the_rows_of_a_batch():
    name = "splash_mha_dq_segmented.1"
    assert (cores(V5E), cores(V5P), cores(V6E), cores(CHIPS["tpu7x"])) == (1, 2, 1, 1)
    two, one = (op(read(*splash("dq", rows=r), chip=V5P), name).seconds for r in (2, 1))
    assert one == pytest.approx(two), "one row keeps one core busy"


def test_visible_blocks_of_windows():
    assert Mask(True, None).blocks(8, 1, 1) == 36
    assert Mask(True, 2).blocks(8, 1, 1) == 15
    assert Mask(False, None).blocks(8, 2, 4) == 8
    assert Mask(True, 3).blocks(8, 2, 2) == 4 + 3


def test_which_layers_a_mask_is_of():
    gemma = Mask.of({"model": {"name": "gpt", "attention_window": 4, "global_every": 2}})
    assert gemma.at("a/layers/attention/b", is_windowed=True) == Mask(True, 4)
    assert gemma.at("a/layers/attention/b", is_windowed=False) == Mask(True, None)
    mistral = Mask.of({"model": {"name": "gpt", "attention_window": 4}})
    assert mistral.at("", is_windowed=False) == Mask(True, 4), (
        "its tables may be as wide as all keys"
    )
    pair = Mask.of({"model": {"name": "encoder_decoder"}})
    assert pair.at("jvp(encoder)/layers/x", is_windowed=False) == Mask(False, None)
    assert pair.at("jvp(decoder)/layers/x", is_windowed=False) == Mask(True, None)
    assert Mask.of({"model": {"name": "bert"}}) == Mask(False, None)


@pytest.mark.parametrize(
    ("mask", "length", "blocks"),
    [
        (Mask(True, None), 1000, 36),
        (Mask(True, None), 200, 3),
        (Mask(True, None), 100, 1),
        (Mask(False, None), 100, 1),
        (Mask(False, 8), 200, 4),
    ],
)
def test_a_last_block_that_is_not_full_counts(mask, length, blocks):
    assert mask.blocks(length, 128, 128) == blocks


def test_float32_on_a_gpu_runs_as_tf32():
    h100, dot = CHIPS["h100"], "%d = f32[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}"
    lines = ("%a = f32[4096,4096]{1,0} parameter(0)", dot)
    seconds = {
        (chip.name, dtype): read(*lines, chip=chip, config={"train": {"compute_dtype": dtype}}).step_seconds
        for chip in (h100, V5E)
        for dtype in ("bfloat16", "float32")
    }  # fmt: skip
    assert seconds["h100", "bfloat16"] == pytest.approx(2 * 4096**3 / h100.peak_flops)
    assert seconds["h100", "float32"] == pytest.approx(2 * seconds["h100", "bfloat16"])
    assert seconds["v5e", "float32"] == seconds["v5e", "bfloat16"]


ASYNC_FUSION = f"""\
%begins (p: {SHARE}) -> ({SHARE}, {WEIGHT}) {{
  %p = {SHARE} parameter(0)
  %g = {WEIGHT} all-gather(%p), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="7"}}
  ROOT %s = ({SHARE}, {WEIGHT}) custom-call(%g), custom_call_target="AsyncCollectiveStart", frontend_attributes={{chain_id="7"}}
}}
%ends (p: {WEIGHT}) -> {WEIGHT} {{
  %p = {WEIGHT} parameter(0)
  ROOT %e = {WEIGHT} custom-call(%p), custom_call_target="AsyncCollectiveDone", frontend_attributes={{chain_id="7"}}
}}
"""
SPARSE = f"""\
%sparse (p: {SHARE}) -> {WEIGHT} {{
  %p = {SHARE} parameter(0)
  ROOT %g = {WEIGHT} all-gather(%p), {GROUPS}, dimensions={{0}}
}}, execution_thread="sparsecore"
"""
RENDEZVOUS = '_xla_host_transfer_rendezvous="r1"'
# As v5e, tpu7x and several slices have it: what begins, and what waits for the end.
ASYNC = {
    "fusions": (
        ASYNC_FUSION,
        (f"%start = ({SHARE}, {WEIGHT}) fusion(%w), kind=kCustom, calls=%begins",
         f"%piece = {WEIGHT} get-tuple-element(%start), index=1"),
        f"%done = {WEIGHT} fusion(%piece), kind=kCustom, calls=%ends",
    ),
    "sparse cores": (
        SPARSE,
        (f"%start = (({SHARE}), {WEIGHT}) call-start(%w), to_apply=%sparse",),
        f"%done = {WEIGHT} call-done(%start)",
    ),
    "slices": (
        "",
        (f'%sent = ({SHARE}, u32[], token[]) send(%w), frontend_attributes={{_xla_megascale_transfer_type="ALL_GATHER",{RENDEZVOUS}}}',
         f"%answer = ({WEIGHT}, u32[], token[]) recv(%a), frontend_attributes={{{RENDEZVOUS}}}"),
        f"%done = ({WEIGHT}, token[]) recv-done(%answer)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ASYNC)
def test_each_form_of_an_asynchronous_collective_hides(form):
    before, begin, end = ASYNC[form]
    mesh = (MeshAxis("data", 2, (Span("network", 0, 2, False),)), *MESH[1:])
    timeline = lambda *between: read(  # noqa: E731
        A, SHARD, *begin, *between, end, before=NOTHING + before, mesh=mesh
    )
    (alone,) = timeline().exchanges
    assert alone.exposed == alone.seconds > 1e-4
    half = timeline(timed("x", "%a", int(alone.seconds / 2 * V5E.clock_hz)))
    assert half.exchanges[0].exposed == pytest.approx(alone.seconds / 2, rel=1e-3)
    hidden = timeline(timed("x", "%a", int(2 * alone.seconds * V5E.clock_hz)))
    assert hidden.exchanges[0].exposed == 0


def test_what_a_loop_exchanges_delays_what_was_begun_before_it():
    loop = f"""\
%body (s: (s32[], {SHARE})) -> (s32[], {SHARE}) {{
  %s = (s32[], {SHARE}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = {SHARE} get-tuple-element(%s), index=1
  %inner = {WEIGHT} all-gather(%v), {GROUPS}, dimensions={{0}}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], {SHARE}) tuple(%next, %v)
}}
%condition (s: (s32[], {SHARE})) -> pred[] {{
  %s = (s32[], {SHARE}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}}
"""
    lines = (
        SHARD, "%zero = s32[] constant(0)", f"%given = (s32[], {SHARE}) tuple(%zero, %w)", START,
        f"%while = (s32[], {SHARE}) while(%given), condition=%condition, body=%body", DONE,
    )  # fmt: skip
    one = read(SHARD, START, DONE).step_seconds
    assert read(*lines, before=NOTHING + loop).step_seconds == pytest.approx(5 * one)


def test_a_loop_whose_turns_nobody_states_counts_once_and_is_named():
    def loop(moved):
        return f"""\
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[8]{{0:S(1)}} get-tuple-element(%s), index=1
  {timed("work", "%v")}
  %one = s32[] constant(1)
  %next = s32[] {moved}
  ROOT %t = (s32[], f32[8]) tuple(%next, %work)
}}
%condition (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %ten), direction=LT
}}
"""

    lines = (
        A, "%zero = s32[] constant(0)", "%given = (s32[], f32[8]) tuple(%zero, %a)",
        "%while = (s32[], f32[8]) while(%given), condition=%condition, body=%body, "
        'metadata={op_name="jit(f)/jvp(stack)/layers/mlp/while"}',
    )  # fmt: skip
    known = read(*lines, before=NOTHING + loop("add(%i, %one)"))
    assert (known.step_seconds, known.unknown_loops) == (pytest.approx(10e-3), ())
    unknown = read(*lines, before=NOTHING + loop("multiply(%i, %i)"))
    assert unknown.step_seconds == pytest.approx(1e-3)
    assert unknown.unknown_loops == ("stack.layers.mlp",)


def test_several_collectives_of_one_fusion_each_take_their_own_way():
    both = f"""\
%two (p: {SHARE}, q: f32[4096]) -> ({WEIGHT}, f32[4096]) {{
  %p = {SHARE} parameter(0)
  %q = f32[4096]{{0}} parameter(1)
  %g = {WEIGHT} all-gather(%p), {GROUPS}, dimensions={{0}}
  %r = f32[4096]{{0}} all-reduce(%q), {GROUPS}, to_apply=%add
  ROOT %t = ({WEIGHT}, f32[4096]{{0}}) tuple(%g, %r)
}}
"""
    vector = "%v = f32[4096]{0} parameter(2)"
    fused = f"%f = ({WEIGHT}, f32[4096]{{0}}) fusion(%w, %v), kind=kCustom, calls=%two"
    alone = (
        f"%g = {WEIGHT} all-gather(%w), {GROUPS}, dimensions={{0}}",
        f"%r = f32[4096]{{0}} all-reduce(%v), {GROUPS}, to_apply=%add",
    )
    together = read(SHARD, vector, fused, before=NOTHING + both)
    assert together.step_seconds == pytest.approx(read(SHARD, vector, *alone).step_seconds)


def test_ragged_products_count_a_tile_more_per_expert():
    lines = (
        "%rows = bf16[4096,512]{1,0} parameter(0)",
        "%w = bf16[4,512,1024]{2,1,0} parameter(1)",
        '%ragged-dot-none.1 = bf16[4096,1024]{1,0} custom-call(%rows, %w), custom_call_target="tpu_custom_call", '
        'frontend_attributes={ragged_dot_tiling="128,512,1024"}, '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"4294967296"}}}',
    )
    product = op(read(*lines), "ragged-dot-none.1")
    assert product.flops == 2 * 4096 * 512 * 1024
    assert product.seconds == pytest.approx(product.flops / V5E.peak_flops * (32 + 3) / 32)
