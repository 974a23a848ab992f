"""Where instructions come from: tables of lines, name stacks, and a model compiled here."""

import re

import pytest
from small_step import compile_small

from llm_jax.planner.source import Sources, direction_of, module_of

TABLES = """HloModule x

FileNames
1 "/home/me/llm_jax/llm_jax/models/gpt/model.py"
2 "/home/me/llm_jax/llm_jax/nn/mlp.py"
3 "/home/me/llm_jax/llm_jax/nn/precision.py"
4 "/home/me/llm_jax/.venv/lib/python3.12/site-packages/optax/_src/base.py"

FunctionNames
1 "GPT.__call__"
2 "Mlp.__call__"
3 "Precision.project"
4 "chain"

FileLocations
1 {file_name_id=1 function_name_id=1 line=66 end_line=66 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=88 end_line=88 column=1 end_column=9}
3 {file_name_id=3 function_name_id=3 line=12 end_line=12 column=1 end_column=9}
4 {file_name_id=4 function_name_id=4 line=5 end_line=5 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=%d}
2 {file_location_id=2 parent_frame_id=%d}
3 {file_location_id=3 parent_frame_id=%d}
4 {file_location_id=4 parent_frame_id=%d}
5 {file_location_id=4 parent_frame_id=%d}


"""


@pytest.mark.parametrize("parents", [(1, 2, 3, 1, 2), (0, 1, 2, 0, 1)])
def test_the_line_is_the_innermost_one_that_tells(parents):
    """Both ways of numbering parents: XLA's text counts from the root's parent, 1."""
    sources = Sources(TABLES % parents)
    assert sources.of(1) == "llm_jax/models/gpt/model.py:66"
    assert sources.of(2) == "llm_jax/nn/mlp.py:88"
    assert sources.of(3) == "llm_jax/nn/mlp.py:88", "a helper of the layer says less than the layer"
    assert sources.of(5) == "llm_jax/models/gpt/model.py:66", "a library was called by the package"
    assert sources.of(4).endswith("site-packages/optax/_src/base.py:5")
    assert sources.frame(2).function == "Mlp.__call__"
    assert [frame.line for frame in sources.stack(3)] == [12, 88, 66]
    assert sources.of_attributes('metadata={op_name="a" stack_frame_id=2}') == sources.of(2)


def test_a_text_without_tables_knows_no_place():
    assert Sources("ENTRY %main () -> f32[] {\n}").of(3) == ""
    assert Sources(TABLES % (1, 2, 3, 1, 2)).of(None) == ""


@pytest.mark.parametrize(
    ("op_name", "module", "direction"),
    [
        (
            "jit(wrapped)/jvp(stack)/while/body/closed_call/layers/mlp/btd,df->btf/dot_general",
            "stack.layers.mlp",
            "forward",
        ),
        (
            "jit(f)/while/body/eval_jaxpr/transpose(jvp(stack))/while/body/eval_jaxpr/checkpoint/"
            "rematted_computation/layers/attention/shard_map/psum",
            "stack.layers.attention",
            "backward",
        ),
        (
            "jit(f)/transpose(jvp(stack))/while/body/layers/mlp/layers/mlp/checkpoint/mul",
            "stack.layers.mlp",
            "backward",
        ),
        ("checkpoint/rematted_computation/layers/mlp_norm/sum", "layers.mlp_norm", "backward"),
        ("jit(f)/vmap(jvp(stack))/vmap()/layers/add", "stack.layers", "forward"),
        ("jit(f)/optimizer/jit(_where)/select_n", "optimizer", "optimizer"),
        ("jit(f)/jvp(stack)/layers/(mlp/dot:mlp_norm/mul)", "stack.layers", "forward"),
        ("jit(f)/jvp(loss)/mul;jit(f)/jvp(loss)/add", "loss", "forward"),
        ("jit(f)/jvp()/mul", "", "forward"),
        ("jit(f)/div", "", "other"),
        ("", "", "other"),
        (r"state.params[\'stack\'][\'layers\'][\'mlp\'][\'up\']", "stack.layers.mlp.up", "other"),
    ],
)
def test_module_and_direction(op_name, module, direction):
    assert module_of(op_name) == module
    assert direction_of(op_name) == direction


def test_every_module_with_parameters_is_named_in_both_passes():
    step = compile_small({"data": 4, "fsdp": 2})
    names = re.findall(r'op_name="([^"]*)"', step.hlo)
    named = {(module_of(name), direction_of(name)) for name in names}
    paths = [a.path.split(".")[1:-1] for a in step.arguments if a.kind == "parameter"]
    modules = {".".join(path) for path in paths} - {""}
    assert modules == {"stack.layers." + m for m in (
        "attention", "attention_norm", "mlp", "mlp_norm")} | {"final_norm"}  # fmt: skip
    for direction in ("forward", "backward"):
        assert modules | {"embed"} <= {module for module, way in named if way == direction}
    assert {("loss", "forward"), ("optimizer", "optimizer")} <= named
