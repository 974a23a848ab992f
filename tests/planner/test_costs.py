"""FLOPs and bytes of instructions, by hand and for a whole training step."""

import dataclasses
import itertools

import pytest
from small_step import compile_small

from llm_jax.planner.chips import CHIPS
from llm_jax.planner.costs import Costs, _pairs
from llm_jax.planner.hlo_text import parse_computations
from llm_jax.planner.roofline import read_roofline


def cost(text, name):
    """(FLOPs, bytes) of the instruction so called in the entry."""
    computations, entry = parse_computations(text)
    one = next(one for one in computations[entry] if one.name == name)
    costs = Costs(computations)
    return costs.flops(entry, one), costs.bytes(entry, one)


def module(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


def roofline_of(length=128, **model):
    step = compile_small({"fsdp": 8}, length=length, position="learned", **model)
    return step, read_roofline(step, CHIPS["v5e"])


def attention_product(length):
    """FLOPs of queries by keys of all layers, for a device's rows: 64 sequences over 8 devices."""
    return 3 * 2 * 64 * length * length * 8


@pytest.mark.parametrize("length", [64, 128])
def test_a_dense_model_takes_the_flops_of_its_formula(length):
    """6 N D and attention, layers in a loop; each of eight devices has an eighth of the tokens."""
    step, roofline = roofline_of(length, remat="none")
    assert roofline.model_flops == step.model_flops["full"] * 64 * length / 8
    # Attention keeps no scores: its backward pass multiplies queries and keys once more.
    expected = roofline.model_flops + attention_product(length)
    assert roofline.hardware_flops == pytest.approx(expected, rel=0.01)
    assert any(op.times == 3 for op in roofline.ops if op.kind == "matmul"), "a loop over layers"


def test_recomputed_layers_are_counted_again():
    (_, plain), (_, again) = roofline_of(remat="none"), roofline_of(remat="full")
    weights = (
        64 * 64 * 2 + 2 * 64 * 32 + 2 * 64 * 192
    )  # all but the MLP's last, which nothing needs
    expected = 3 * 2 * weights * 8 * 128 + attention_product(128)
    assert again.hardware_flops - plain.hardware_flops == pytest.approx(expected, rel=0.01)
    assert again.model_flops == plain.model_flops


def test_products_as_the_tpu_compiler_writes_them():
    batched = module(
        "%x = bf16[2048,16,128,1]{0,2,1,3} parameter(0)",
        "%w = bf16[8,2048,2048,1]{1,2,0,3} parameter(1)",
        "ROOT %y = bf16[16,128,8,2048]{1,3,0,2} convolution(%x, %w), "
        "window={size=8x1 pad=7_7x0_0 rhs_reversal=1x0}, dim_labels=f1b0_0oi1->1b0f",
    )
    tokens, width, heads = 8 * 2048, 2048, 16 * 128
    assert cost(batched, "y")[0] == 2 * tokens * width * heads
    plain = module(
        "%x = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)",
        "%w = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %y = f32[2048,1024]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf",
    )
    flops, moved = cost(plain, "y")
    assert flops == 2 * 2048 * 512 * 1024
    assert moved == 2 * (2048 * 512 + 512 * 1024) + 4 * 2048 * 1024


def test_pairs_of_any_window_are_those_that_meet_the_input():
    for inputs, kernel, stride, low, left, right in itertools.product(
        (1, 5), (1, 2, 4), (1, 2), (0, 1, 3), (1, 2), (1, 3)
    ):
        outputs = 6
        met = 0
        for o, k in itertools.product(range(outputs), range(kernel)):
            at = o * stride + k * right - low
            met += at % left == 0 and 0 <= at // left < inputs
        assert _pairs(inputs, kernel, outputs, stride, low, left, right) == met


def test_a_fusion_pays_for_what_it_touches():
    layer = 64 * 256 * 2
    before = """%slice_and_scale (p: bf16[24,64,256], i: s32[]) -> bf16[1,64,256] {
  %p = bf16[24,64,256]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = bf16[24,64,256]{2,1,0} bitcast(%p)
  %cut = bf16[1,64,256]{2,1,0} dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1,64,256}
  ROOT %twice = bf16[1,64,256]{2,1,0} add(%cut, %cut)
}

%update (p: bf16[24,64,256], u: bf16[1,64,256], i: s32[]) -> bf16[24,64,256] {
  %p = bf16[24,64,256]{2,1,0} parameter(0)
  %u = bf16[1,64,256]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = bf16[24,64,256]{2,1,0} dynamic-update-slice(%p, %u, %i, %zero, %zero)
}
"""
    lines = (
        "%all = bf16[24,64,256]{2,1,0} parameter(0)",
        "%i = s32[]{:S(6)} parameter(1)",
        "%one = bf16[1,64,256]{2,1,0} fusion(%all, %i), kind=kLoop, calls=%slice_and_scale",
        "%near = bf16[1,64,256]{2,1,0:T(8,128)(2,1)S(1)} fusion(%all, %i), kind=kLoop, "
        "calls=%slice_and_scale",
        "%whole = bf16[24,64,256]{2,1,0} negate(%all)",
        "ROOT %out = bf16[24,64,256]{2,1,0} fusion(%all, %one, %i), kind=kLoop, calls=%update",
    )
    text = module(*lines, before=before)
    assert cost(text, "one")[1] == 2 * layer
    assert cost(text, "near")[1] == layer, "the result stays in VMEM"
    assert cost(text, "whole")[1] == 2 * 24 * layer
    assert cost(text, "out")[1] == 2 * layer, "in place"
    assert cost(text, "i") == (0, 0)


def test_without_rates_there_is_no_roofline():
    step = compile_small({"fsdp": 8})
    chip = CHIPS["v5e"]
    assert read_roofline(step, dataclasses.replace(chip, peak_flops=None)) is None
    assert read_roofline(dataclasses.replace(step, hlo=""), chip) is None
    assert read_roofline(step, chip).step_seconds > 0
