"""Estimates and search of every family: one stack or two, windows in turn, heads on some tokens, frozen parts."""

import dataclasses

import jax
import pytest

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.planner.changes import changes_for
from llm_jax.planner.collectives import Namer
from llm_jax.planner.compiled import Argument, CompiledStep, MeshAxis
from llm_jax.planner.estimate import estimate
from llm_jax.planner.hunt import Hunt
from llm_jax.planner.layout import arguments_of
from llm_jax.planner.memory import read_memory
from llm_jax.planner.pace import pace
from llm_jax.planner.placement import place
from llm_jax.planner.plan import LiveBuffer
from llm_jax.planner.space import meshes
from llm_jax.planner.topology import parse_target
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

SIZES = {"vocab_size": 512, "embed_dim": 64, "num_layers": 4, "num_heads": 4, "mlp_dim": 128}
GPT = {"name": "gpt", **SIZES, "max_length": 256}
BERT = {"name": "bert", **SIZES, "num_positions": 128}
PAIR = {"name": "encoder_decoder", **SIZES, "num_decoder_layers": 2}
MASKED = {"name": "masked_lm", "pairs": "next_sentence"}
EMPTY = CompiledStep(
    target="v5e:2x4", config={}, mesh=(), arguments=(), num_params=1, tokens_per_step=1, model_flops={},
    seconds={}, host_peak_bytes=0, versions={}, memory=None, out_of_memory=None, hlo="",
    buffer_assignment="", live_ranges="",
)  # fmt: skip
LORA = {"name": "lora", "rank": 2}
FAMILIES = {
    "gpt": (GPT, {}),
    "prefix": (GPT, {"objective": {"name": "prefix_lm"}}),
    "local": ({**GPT, "attention_window": 32, "global_every": 2}, {}),
    "bert": (BERT, {"objective": MASKED}),
    "classify": (
        {**BERT, "head": "sequence_classification", "num_labels": 2},
        {
            "objective": {"name": "classify", "labels": ("a", "b")},
            "optimizer": {"freeze": ("embed", "stack.layers[:3].*"), "layer_decay": 0.9},
        },
    ),
    "pair": (PAIR, {"objective": {"name": "seq2seq", "target_length": 64}}),
    "relative": ({**PAIR, "position": "relative"}, {"objective": {"name": "span_corruption"}}),
    "lora": (GPT, {"transforms": [LORA]}),
    "qlora": (GPT, {"transforms": [{**LORA, "quantize": "nf4"}]}),
    "dpo": (GPT, {"objective": {"name": "dpo"}, "transforms": [{"name": "reference"}]}),
}


def family(name, **mesh):
    model, sections = FAMILIES[name]
    tokenizer = {"name": "raw_bytes"}
    return resolve(
        {
            "model": model,
            "data": {"sequence_length": 128, "tokenizer": tokenizer},
            "train": {"num_steps": 10, "batch_size": 16},
            "mesh": mesh,
            **sections,
        }
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_state_is_exactly_what_the_program_holds(name):
    run = family(name, fsdp=4, tensor=2)
    program = build_program(run, make_mesh(run.mesh, jax.devices()[:8]))
    arguments = arguments_of(program)
    held = lambda kind: sum(a.bytes for a in arguments if a.kind == kind)  # noqa: E731
    plan = estimate(run, parse_target("v5e:2x4"))
    assert plan.num_params == program.num_params
    assert plan.memory.parts["parameters"] == held("parameter")
    assert plan.memory.parts["frozen"] == held("extra")
    assert plan.memory.parts["optimizer"] == held("optimizer")
    assert plan.memory.parts["batch"] == held("batch")


@pytest.mark.parametrize("axis", ["context", "pipeline"])
@pytest.mark.parametrize("name", ["gpt", "prefix", "local", "bert", "pair", "relative"])
def test_a_mesh_is_refused_where_training_refuses_it(name, axis):
    run = family(name, **{axis: 2, "data": 4})

    def refusal(act):
        try:
            act()
        except ConfigError as error:
            return str(error)
        return None

    trained = refusal(lambda: build_program(run, make_mesh(run.mesh, jax.devices()[:8])))
    estimated = refusal(lambda: estimate(run, parse_target("v5e:2x4")))
    assert (estimated is None) == (trained is None)


@pytest.mark.parametrize("name", ["local", "bert", "pair", "relative"])
def test_a_search_has_only_meshes_that_can_be(name):
    run, hunt = family(name), Hunt("time", None, 4)
    hunt.add(run, parse_target("2xv5e:2x2"))
    assert hunt.next(2)
    for mesh in meshes(run, parse_target("2xv5e:2x2")):
        assert mesh.pipeline * mesh.dcn.pipeline == 1 or name == "bert"
        assert mesh.context == 1 or name == "local"


def flops(name, **model):
    run = family(name)
    config = {**FAMILIES[name][0], **model}
    run = resolve({
        "model": config, "objective": {"name": run.objective.name},
        "data": {"sequence_length": 128, "tokenizer": {"name": "raw_bytes"}},
        "train": {"num_steps": 10, "batch_size": 16},
    })  # fmt: skip
    return pace(run, place(run, parse_target("v5e:2x2"))).hardware_flops


def test_a_window_in_every_other_layer_costs_half_of_what_it_saves():
    all_windowed = flops("local", global_every=None)
    whole = flops("local", global_every=None, attention_window=None)
    assert flops("local") == pytest.approx((all_windowed + whole) / 2)


@pytest.mark.parametrize("name", ["bert", "pair"])
def test_executed_flops_are_near_those_of_the_model(name):
    """More by the scores that the backward pass of attention computes again."""
    roofline = estimate(family(name), parse_target("v5e:2x2")).roofline
    assert 1 < roofline.hardware_flops / roofline.model_flops < 1.2


def test_what_lora_froze_is_named_so():
    run = family("lora", data=8)
    arguments = arguments_of(build_program(run, make_mesh(run.mesh, jax.devices()[:8])))
    step = dataclasses.replace(EMPTY, arguments=arguments)
    memory = read_memory(step, 2**34)
    frozen = {b.module: b.bytes for b in memory.buffers if b.part == "frozen"}
    assert {"embed", "stack.layers.mlp.up.base"} <= frozen.keys()
    assert sum(frozen.values()) == memory.parts["frozen"]
    trained = {b.module for b in memory.buffers if b.part == "parameters"}
    assert trained
    assert all("lora_" in module for module in trained)


def test_the_gradient_of_a_frozen_weight_is_no_activation():
    wide, name = (4, 64, 128), "stack.layers.mlp.up.base"
    frozen = Argument(f"extra.{name}", "x", "extra", wide, "float32", ((), (), ()), wide, 131_072)
    reduced = (
        "HloModule m\n\n%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
        "ENTRY %main (p: f32[4,64,128]) -> f32[4,64,128] {\n  %p = f32[4,64,128]{2,1,0} parameter(0)\n"
        "  %x = f32[4,64,128]{2,1,0} negate(%p)\n  ROOT %r = f32[4,64,128]{2,1,0} all-reduce(%x), "
        "replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    (served,) = Namer(dataclasses.replace(EMPTY, arguments=(frozen,), hlo=reduced)).served("r")
    assert (served.role, served.name) == ("gradient", frozen.path)


@pytest.mark.parametrize("name", ["local", "bert", "pair", "relative"])
def test_no_change_is_advised_that_the_model_refuses(name):
    run = family(name, fsdp=8)
    arguments = arguments_of(build_program(run, make_mesh(run.mesh, jax.devices()[:8])))
    axes = (MeshAxis("fsdp", 8, ()),)
    step = dataclasses.replace(EMPTY, arguments=arguments, config=to_dict(run), mesh=axes)
    rows, length = (next(a for a in arguments if a.path == "batch.tokens")).shard_shape
    stack = "stack" if name in ("local", "bert") else "decoder"
    layers = run.model.num_layers if stack == "stack" else run.model.num_decoder_layers
    buffers = [
        LiveBuffer(part, 2**20, "f32", shape, None, None, f"{stack}.layers.{module}", "", "", "")
        for part, shape, module in (
            ("activations", (layers, rows, length, 64), "mlp"),
            ("activations", (layers, rows, length, 128), "mlp"),
            ("attention", (rows, 4, 1, length, length), "attention"),
        )
    ]
    changes = {c.override: c for c in changes_for(step, buffers)}
    assert changes["model.remat=full"].saves == (0, 2**20, 0)
    assert any("context" in override for override in changes) == (name == "local" and rows == 1)
    assert ("train.attention_kernel=blockwise" in changes) == (name != "relative")
