"""How often loops run, from the forms that compilers write."""

import pytest
from small_step import compile_small

from llm_jax.nn.experts import OVERFLOW_ROUNDS
from llm_jax.planner.hlo import analyse

BODY = """HloModule m

%cond (p: (s32[], s32[], f32[4])) -> pred[] {{
  %noise = s32[] constant(1000)
  {constant}
  %p = (s32[], s32[], f32[4]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare({compared}), direction={direction}
}}

%body (p: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {{
  %p = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[4] get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[] {move}(%i, %step)
  %moved = s32[] add(%n, %step)
  %y = f32[4] negate(%x)
  ROOT %t = (s32[], s32[], f32[4]) tuple(%next, %{passed}, %y)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %first = s32[] constant({first})
  %unknown = s32[] fusion(%x), kind=kLoop, calls=%nowhere
  %most = s32[] constant({most})
  %copied = s32[] copy(%{bound})
  %t = (s32[], s32[], f32[4]) tuple(%first, %copied, %x)
  %w = (s32[], s32[], f32[4]) while(%t), condition=%cond, body=%body
  ROOT %out = f32[4] get-tuple-element(%w), index=2
}}

%nowhere (x: f32[4]) -> s32[] {{
  %x = f32[4] parameter(0)
  ROOT %r = s32[] custom-call(%x), custom_call_target="any"
}}
"""


BODY_OF_SEVEN = BODY.format(
    constant="", compared="%i, %n", direction="LT", step=1, first=0, most=7,
    move="add", passed="n", bound="most",
)  # fmt: skip


def trips(constant=None, compared="%i, %n", direction="LT", step=1, first=0, most=7, **more):
    line = "" if constant is None else f"%c = s32[] constant({constant})"
    fields = {"move": "add", "passed": "n", "bound": "most", **more}
    text = BODY.format(
        constant=line, compared=compared, direction=direction, step=step, first=first, most=most,
        **fields,
    )  # fmt: skip
    (loop,) = analyse(text).loops
    return loop.trips


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"constant": 24, "compared": "%i, %c"}, 24),
        ({"constant": 24, "compared": "%c, %i", "direction": "GT"}, 24),
        ({"constant": 24, "compared": "%i, %c", "direction": "LE"}, 25),
        ({"constant": 24, "compared": "%i, %c", "direction": "NE"}, 24),
        ({"constant": 10, "compared": "%i, %c", "step": 3}, 4),
        ({"constant": 24, "compared": "%i, %c", "first": 4}, 20),
        ({}, 7),
        ({"constant": 0, "compared": "%i, %c", "direction": "GE", "first": 5, "step": -1}, 6),
        (
            {"constant": 0, "compared": "%i, %c", "direction": "GT", "first": 5,
             "move": "subtract"},
            5,
        ),
        ({"most": 0}, 0),
    ],
)  # fmt: skip
def test_counters(form, expected):
    assert trips(**form) == expected


def test_what_the_text_does_not_say_counts_once():
    """And never by a constant that merely stands in the condition."""
    assert trips(bound="unknown") == 1
    assert trips(passed="moved") == 1, "the bound changes"
    assert trips(move="multiply") == 1


def test_rounds_that_only_the_router_knows_count_as_none():
    named = f'body=%body, metadata={{op_name="jit(step)/mlp/{OVERFLOW_ROUNDS}/while"}}'
    (loop,) = analyse(BODY_OF_SEVEN.replace("body=%body", named)).loops
    assert (loop.trips, loop.times) == (0, 0)
    (loop,) = analyse(BODY_OF_SEVEN.replace("body=%body", named.replace("overflow", "other"))).loops
    assert loop.trips == 7


@pytest.mark.slow
def test_experts_name_their_further_rounds():
    experts = {"num_experts": 4, "mlp_dim": 32}
    step = compile_small({"expert": 2, "fsdp": 4}, experts=experts, mlp_dim=None)
    loops = [loop for loop in analyse(step.hlo).loops if OVERFLOW_ROUNDS in loop.op_name]
    assert {loop.direction for loop in loops if loop.op_name.endswith("while")} == {
        "forward",
        "backward",
    }
    assert {loop.trips for loop in loops} == {0}
    assert any(loop.trips == 3 for loop in analyse(step.hlo).loops), "the layers count as before"
