"""GPT-1B under fsdp on 128 and 256 TPU chips that are not here: what one step sends and holds.

Compiled by libtpu from shapes. The model, its sizes and MaxText's figures are those of
bench/scaling.py. Any collective that the strategy does not ask for fails here.
"""

import collections
import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from llm_jax.planner.hlo import HloSummary, analyse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]

ROWS, LENGTH, LAYERS, VOCAB, EMBED, HEADS, HEAD_DIM, MLP = 4, 2048, 24, 32_000, 2048, 16, 128, 5632
LAYER_WEIGHTS = {
    "query": (EMBED, HEADS, HEAD_DIM),
    "key": (EMBED, HEADS, HEAD_DIM),
    "value": (EMBED, HEADS, HEAD_DIM),
    "out": (HEADS, HEAD_DIM, EMBED),
    "gate": (EMBED, MLP),
    "up": (EMBED, MLP),
    "down": (MLP, EMBED),
}
LAYER_NORMS = 2 * EMBED
EMBEDDING = (VOCAB, EMBED)
LAYER_SIZE = sum(map(math.prod, LAYER_WEIGHTS.values()))
# Most peak GB per chip and milliseconds of estimated cycles: MaxText's.
BOUNDS = {"v5p-128": (2.165, 269), "v6e-256": (1.921, 186)}


class Step(NamedTuple):
    chips: str
    figures: dict
    hlo: HloSummary


@pytest.fixture(scope="module", params=["v5p-128", "v6e-256"])
def step(request, tmp_path_factory):
    """The training step as bench/scaling.py compiles it, with the compiler's own choices."""
    hlo = tmp_path_factory.mktemp("gpt_1b") / "step.hlo"
    job = json.dumps({"chips": request.param, "hlo": str(hlo)})
    # The flags of the tests make the compiler skip work.
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", "--one", job],
        capture_output=True, text=True, timeout=600, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Step(request.param, json.loads(done.stdout.splitlines()[-1]), analyse(hlo.read_text()))


def group_size(step):
    return int(step.chips.partition("-")[2])


def in_loop(step, direction):
    """The loop over layers of a pass, and the collectives in it."""
    loop = step.hlo.layers(direction)
    return loop, [one for one in step.hlo.collectives if loop.body in one.loops]


def sizes(collectives):
    """How often a step moves an array of so many elements, by dtype and elements."""
    return collections.Counter(
        (dtype, math.prod(shape)) for one in collectives for dtype, shape in one.shapes
    )


def gathered_weights():
    return collections.Counter(("bf16", math.prod(shape)) for shape in LAYER_WEIGHTS.values())


def test_the_forward_pass_gathers_each_weight_of_a_layer_once(step):
    loop, found = in_loop(step, "forward")
    assert loop.trips == loop.times == LAYERS
    assert {one.kind for one in found} == {"all-gather"}, found
    assert sizes(found) == gathered_weights()
    assert {(one.times, one.group_size) for one in found} == {(LAYERS, group_size(step))}


def test_the_backward_pass_gathers_them_again_and_reduces_their_gradients(step):
    loop, found = in_loop(step, "backward")
    assert loop.trips == loop.times == LAYERS
    gathers = [one for one in found if one.kind == "all-gather"]
    reductions = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert len(gathers) + len(reductions) == len(found), found
    assert sizes(gathers) == gathered_weights()
    assert {dtype for one in reductions for dtype, _ in one.shapes} == {"f32"}
    assert sum(one.bytes for one in reductions) == 4 * (LAYER_SIZE + LAYER_NORMS)
    assert {(one.times, one.group_size) for one in found} == {(LAYERS, group_size(step))}


def test_outside_the_layers_only_the_embedding_and_sums_move(step):
    """The tied embedding twice, as table and as head: gathered for each, its gradient reduced."""
    layers = {step.hlo.layers(direction).body for direction in ("forward", "backward")}
    rest = [one for one in step.hlo.collectives if not layers & set(one.loops)]
    assert all(one.times == 1 and not one.loops for one in rest), rest
    large = [one for one in rest if one.bytes > 4 * (LAYERS * LAYER_NORMS)]
    assert {shape for one in large for _, shape in one.shapes} == {EMBEDDING}, large
    found = collections.Counter(one.kind for one in large)
    assert found.pop("all-gather") <= 2
    assert found.pop("all-reduce", 0) + found.pop("reduce-scatter", 0) <= 2
    assert not found
    small = [one for one in rest if one not in large]
    assert {one.kind for one in small} <= {"all-reduce"}, small
    assert max(map(len, (shape for one in small for _, shape in one.shapes))) <= 1


def test_no_buffer_holds_the_logits_of_all_tokens(step):
    """Of no dtype and in no arrangement; the cross entropy works on a chunk of tokens at a time."""
    logits = ROWS * LENGTH * VOCAB
    whole = [b for b in step.hlo.buffers if math.prod(b.shape) == logits]
    parts = [b for b in step.hlo.buffers if VOCAB in b.shape and math.prod(b.shape) > logits // 4]
    assert whole == []
    assert parts == []
    assert any(VOCAB in b.shape for b in step.hlo.buffers), "the chunks are looked for in vain"


def test_attention_is_the_splash_kernel_and_holds_no_scores(step):
    names = {b.instruction for b in step.hlo.buffers}
    kernels = ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq")
    assert all(any(name.startswith(kernel) for name in names) for kernel in kernels)
    # In each layer: forward, once more for the backward pass, and two for its gradients.
    assert step.hlo.untimed["tpu_custom_call"] == 4 * LAYERS
    scores = ROWS * HEADS * LENGTH * LENGTH
    assert [b for b in step.hlo.buffers if math.prod(b.shape) == scores] == []


def test_memory_and_cycles_stay_below_maxtext(step):
    peak_gb, cycles_ms = BOUNDS[step.chips]
    assert step.figures["peak_gb"] < peak_gb
    assert step.figures["cycles_ms"] < cycles_ms
