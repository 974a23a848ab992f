"""Collectives are named by what they serve, in every form that compilers give them."""

import dataclasses

import pytest
from small_step import compile_small

from llm_jax.planner.collectives import Namer, exchanges_of, name_exchanges
from llm_jax.planner.compiled import Argument, CompiledStep, MeshAxis
from llm_jax.planner.plan import Exchange, Roofline

# As the TPU compilers write them: a loop over layers whose weights are gathered beside matrix products
# (v5e), on the SparseCores (tpu7x), and gradients that are reduced together, in the loop and after it.
TPU = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias), {2}: (2, {}, may-alias) }, num_partitions=4

%start.1 (p.1: bf16[16,8]) -> (bf16[16,8], bf16[64,8], u32[]) {
  %p.1 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="9"}, metadata={op_name="jit(step)/jvp(stack)/while/body/layers/mlp/td,df->tf/dot_general"}
  ROOT %custom-call.1 = (bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside.1 (p.2: bf16[16,8], p.3: bf16[64,8], p.4: u32[], p.5: f32[4,8]) -> (f32[4,8], bf16[16,8], bf16[64,8], u32[]) {
  %p.2 = bf16[16,8]{1,0} parameter(0)
  %p.3 = bf16[64,8]{1,0} parameter(1)
  %p.4 = u32[]{:S(2)} parameter(2)
  %p.5 = f32[4,8]{1,0} parameter(3)
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%p.2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="9"}
  %exp.1 = f32[4,8]{1,0} exponential(%p.5)
  ROOT %tuple.1 = (f32[4,8]{1,0}, bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) tuple(%exp.1, %p.2, %all-gather.2, %p.4)
}

%sparse.1 (p.6: f32[64,8], p.7: token[]) -> f32[16,8] {
  %p.6 = f32[64,8]{1,0} parameter(0)
  %p.7 = token[] parameter(1)
  ROOT %reduce-scatter.1 = f32[16,8]{1,0} reduce-scatter(%p.6), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={0}, to_apply=%sum
}, execution_thread="sparsecore"

%stored.1 (p.8: f32[3,16,8], p.9: f32[16,8], p.10: s32[]) -> f32[3,16,8] {
  %p.8 = f32[3,16,8]{2,1,0} parameter(0)
  %p.9 = f32[16,8]{1,0} parameter(1)
  %p.10 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %bitcast.1 = f32[1,16,8]{2,1,0} bitcast(%p.9)
  ROOT %dynamic-update-slice.1 = f32[3,16,8]{2,1,0} dynamic-update-slice(%p.8, %bitcast.1, %p.10, %zero.1, %zero.1)
}

%body (state: (s32[], f32[3,16,8], f32[4,8], f32[3,16,8])) -> (s32[], f32[3,16,8], f32[4,8], f32[3,16,8]) {
  %state = (s32[], f32[3,16,8], f32[4,8], f32[3,16,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = f32[3,16,8]{2,1,0} get-tuple-element(%state), index=1
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=2
  %sums = f32[3,16,8]{2,1,0} get-tuple-element(%state), index=3
  %zero.2 = s32[] constant(0)
  %one = s32[] constant(1)
  %slice.1 = f32[1,16,8]{2,1,0} dynamic-slice(%weights, %i, %zero.2, %zero.2), dynamic_slice_sizes={1,16,8}
  %bitcast.2 = f32[16,8]{1,0} bitcast(%slice.1)
  %convert.1 = bf16[16,8]{1,0} convert(%bitcast.2)
  %copy-start.1 = (bf16[16,8]{1,0:S(1)}, bf16[16,8]{1,0}, u32[]{:S(2)}) copy-start(%convert.1)
  %copy-done.1 = bf16[16,8]{1,0:S(1)} copy-done(%copy-start.1)
  %collective-start.1 = (bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%copy-done.1), kind=kCustom, calls=%start.1
  %piece.1 = bf16[16,8]{1,0} get-tuple-element(%collective-start.1), index=0
  %piece.2 = bf16[64,8]{1,0} get-tuple-element(%collective-start.1), index=1
  %piece.3 = u32[]{:S(2)} get-tuple-element(%collective-start.1), index=2
  %fusion.1 = (f32[4,8]{1,0}, bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%piece.1, %piece.2, %piece.3, %x), kind=kOutput, calls=%beside.1
  %gathered = bf16[64,8]{1,0} get-tuple-element(%fusion.1), index=2
  %y = f32[4,8]{1,0} get-tuple-element(%fusion.1), index=0
  %all-to-all.1 = f32[4,8]{1,0} all-to-all(%y), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(step)/jvp(stack)/while/body/layers/attention/transpose"}
  %gradient = f32[64,8]{1,0} dot(%gathered, %all-to-all.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %prepared = token[] after-all()
  %call-start.1 = ((f32[64,8]{1,0}, token[]), f32[16,8]{1,0}) call-start(%gradient, %prepared), async_execution_thread="sparsecore", to_apply=%sparse.1
  %call-done.1 = f32[16,8]{1,0} call-done(%call-start.1)
  %stored = f32[3,16,8]{2,1,0} fusion(%sums, %call-done.1, %i), kind=kLoop, calls=%stored.1
  %next = s32[] add(%i, %one)
  ROOT %state.1 = (s32[], f32[3,16,8]{2,1,0}, f32[4,8]{1,0}, f32[3,16,8]{2,1,0}) tuple(%next, %weights, %all-to-all.1, %stored)
}

%condition (state.2: (s32[], f32[3,16,8], f32[4,8], f32[3,16,8])) -> pred[] {
  %state.2 = (s32[], f32[3,16,8], f32[4,8], f32[3,16,8]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.2, %three), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %added = f32[] add(%a, %b)
}

ENTRY %main (up: f32[3,16,8], norm: f32[32], up_mu: f32[3,16,8], tokens: s32[4,8]) -> (f32[3,16,8], f32[32], f32[3,16,8], f32[]) {
  %up = f32[3,16,8]{2,1,0} parameter(0), metadata={op_name="state.params[\\'stack\\'][\\'layers\\'][\\'mlp\\'][\\'up\\']"}
  %norm = f32[32]{0} parameter(1), metadata={op_name="state.params[\\'norm\\']"}
  %up_mu = f32[3,16,8]{2,1,0} parameter(2), metadata={op_name="state.opt_state[0].mu[\\'stack\\'][\\'layers\\'][\\'mlp\\'][\\'up\\']"}
  %tokens = s32[4,8]{1,0} parameter(3), metadata={op_name="batch[\\'tokens\\']"}
  %zero.3 = s32[] constant(0)
  %zero.4 = f32[] constant(0)
  %zeros = f32[3,16,8]{2,1,0} broadcast(%zero.4), dimensions={}
  %x.1 = f32[4,8]{1,0} gather(%norm, %tokens)
  %start = (s32[], f32[3,16,8]{2,1,0}, f32[4,8]{1,0}, f32[3,16,8]{2,1,0}) tuple(%zero.3, %up, %x.1, %zeros)
  %while.1 = (s32[], f32[3,16,8]{2,1,0}, f32[4,8]{1,0}, f32[3,16,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %gradients = f32[3,16,8]{2,1,0} get-tuple-element(%while.1), index=3
  %norm_sum = f32[32]{0} dot(%gradients, %norm)
  %total = f32[] reduce(%norm, %zero.4), dimensions={0}, to_apply=%sum
  %all-reduce.1 = (f32[32]{0}, f32[]) all-reduce(%norm_sum, %total), channel_id=4, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%sum
  %norm_gradient = f32[32]{0} get-tuple-element(%all-reduce.1), index=0
  %loss = f32[] get-tuple-element(%all-reduce.1), index=1
  %up_mu.1 = f32[3,16,8]{2,1,0} add(%up_mu, %gradients)
  %up.1 = f32[3,16,8]{2,1,0} subtract(%up, %up_mu.1)
  %norm.1 = f32[32]{0} subtract(%norm, %norm_gradient)
  ROOT %out = (f32[3,16,8]{2,1,0}, f32[32]{0}, f32[3,16,8]{2,1,0}, f32[]) tuple(%up.1, %norm.1, %up_mu.1, %loss)
}
"""
UP = "params.stack.layers.mlp.up"


def argument(path, name, kind, shape, shares=1):
    shard = (shape[0], shape[1] // shares, *shape[2:]) if shares > 1 else shape
    spec = tuple(("fsdp",) if a != b else () for a, b in zip(shape, shard, strict=True))
    return Argument(path, name, kind, shape, "float32", spec, shard, 4)


@pytest.fixture(scope="module")
def tpu_step():
    keys = "['stack']['layers']['mlp']['up']"
    return CompiledStep(
        target="v5e:2x2",
        config={},
        mesh=(MeshAxis("fsdp", 4, ()),),
        arguments=(
            argument(UP, f"state.params{keys}", "parameter", (3, 64, 8), 4),
            argument("params.norm", "state.params['norm']", "parameter", (32,)),
            argument("opt_state.0.mu.stack.layers.mlp.up", f"state.opt_state[0].mu{keys}",
                     "optimizer", (3, 64, 8), 4),
            argument("batch.tokens", "batch['tokens']", "batch", (4, 8)),
        ),
        num_params=0, tokens_per_step=0, model_flops={}, seconds={}, host_peak_bytes=0,
        versions={}, memory=None, out_of_memory=None, hlo=TPU, buffer_assignment="", live_ranges="",
    )  # fmt: skip


def test_forms_of_the_tpu_compilers(tpu_step):
    named = {e.name: (e.tensor, e.role, e.direction) for e in exchanges_of(Namer(tpu_step))}
    assert named == {
        "collective-start.1": (UP, "parameter", "forward"),
        "all-to-all.1": ("stack.layers.attention", "activation", "forward"),
        "call-start.1": (UP, "gradient", "backward"),
        "all-reduce.1": ("params.norm", "gradient", "backward"),
    }


def test_a_collective_in_several_fusions_counts_once(tpu_step):
    (served,) = Namer(tpu_step).served("collective-start.1")
    assert (served.dtype, served.shape) == ("bf16", (64, 8))
    assert served.argument.path == UP


def test_numbers_stay_apart_from_arrays(tpu_step):
    roles = [(one.name, one.role) for one in Namer(tpu_step).served("all-reduce.1")]
    assert roles[0] == ("params.norm", "gradient")
    assert roles[1][1] == "scalar"


def test_a_gradient_is_told_by_its_shape_where_the_way_ends(tpu_step):
    cut = TPU.replace("%up.1 = f32[3,16,8]{2,1,0} subtract(%up, %up_mu.1)",
                      "%up.1 = f32[3,16,8]{2,1,0} custom-call(%up, %gradients), custom_call_target=\"update\"")  # fmt: skip
    cut = cut.replace("add(%up_mu, %gradients)", "negate(%up_mu)")
    step = dataclasses.replace(tpu_step, hlo=cut)
    named = {e.name: (e.tensor, e.role) for e in exchanges_of(Namer(step))}
    assert named["call-start.1"] == (UP, "gradient")


def test_an_unknown_instruction_is_named_by_its_source(tpu_step):
    plain = Exchange(
        "gone", "all-gather", "fsdp", 1, 1.0, 1, 0.0, 0.0, "", "other", "forward", "",
        "jit(step)/jvp(embed)/gather",
    )  # fmt: skip
    roofline = Roofline(1.0, {}, (), (plain,), 1.0, None, 1.0, None, None, 1.0, 0.0)
    (named,) = name_exchanges(roofline, Namer(tpu_step)).exchanges
    assert (named.tensor, named.role) == ("embed", "other")


def test_a_moment_has_the_line_of_its_parameter(tpu_step):
    used = 'metadata={op_name="jit(step)/jvp(stack)/while/body/layers/mlp/mul" stack_frame_id=1}'
    tables = (
        'FileNames\n1 "/home/llm_jax/nn/mlp.py"\n\nFunctionNames\n1 "up"\n\nFileLocations\n'
        "1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n\n"
    )
    head, rest = TPU.split("\n", 1)
    text = rest.replace(
        "bf16[16,8]{1,0} convert(%bitcast.2)", f"bf16[16,8]{{1,0}} convert(%bitcast.2), {used}"
    )
    namer = Namer(dataclasses.replace(tpu_step, hlo=f"{head}\n\n{tables}{text}"))
    up, norm, moment, _ = tpu_step.arguments
    assert namer.source_of(moment) == namer.source_of(up) == "llm_jax/nn/mlp.py:7"
    assert namer.source_of(norm) == ""


def test_every_parameter_in_shares_is_gathered_and_every_gradient_reduced():
    step = compile_small({"fsdp": 4, "tensor": 2})
    namer = Namer(step)
    exchanges = exchanges_of(namer)
    served = {
        role: {
            one.name
            for exchange in exchanges
            for one in namer.served(exchange.name, exchange.op_name)
            if one.role == role
        }
        for role in ("parameter", "gradient")
    }
    parameters = [a for a in step.arguments if a.kind == "parameter"]
    assert served["parameter"] == {a.path for a in parameters if any(a.spec)}
    assert served["gradient"] == {a.path for a in parameters}
    activations = [e for e in exchanges if e.role == "activation"]
    assert {e.axes for e in activations} == {"tensor"}
    assert any(e.tensor == "stack.layers.mlp btf,fd->btd" for e in activations)
    assert all(e.source.startswith("llm_jax/") for e in exchanges if e.role != "scalar")
