"""Advice that is followed until a step fits, or until nothing more is advised."""

import dataclasses

import fake_plans
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.planner.cure import MOST_TRIES, with_tried_cure
from llm_jax.planner.plan import Finding
from llm_jax.training.config import resolve

GIB = 2**30
RUN = resolve(
    {
        "model": {"name": "gpt", "vocab_size": 512, "embed_dim": 64, "num_layers": 2, "num_heads": 4,
                  "mlp_dim": 128, "max_length": 128},
        "data": {"sequence_length": 128, "tokenizer": {"name": "raw_bytes"}},
        "train": {"num_steps": 10, "batch_size": 64},
    }
)  # fmt: skip


def short_of(
    gib, change, text="does not fit: 20.0 GiB of 16.0 GiB, 4.00 GiB too much; CHANGE saves"
):
    """A plan that does not fit, with its advice."""
    memory = dataclasses.replace(fake_plans.memory(), capacity=16 * GIB, peak=int((16 + gib) * GIB))
    found = Finding("memory", text, bytes=int(gib * GIB), change=change)
    note = Finding("note", "something else")
    return fake_plans.plan(memory=memory, roofline=None, cost=None, findings=(found, note))


def fitting():
    memory = dataclasses.replace(fake_plans.memory(), capacity=16 * GIB, peak=10 * GIB)
    return fake_plans.plan(memory=memory)


def following(*answers):
    """A planner that gives these answers, and the runs that it was asked about."""
    asked, left = [], list(answers)

    def replan(run):
        asked.append((run.model.remat, run.train.accumulate_steps))
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return replan, asked


def test_advice_that_is_enough_is_told_with_what_it_came_to():
    replan, asked = following(fitting())
    plan = with_tried_cure(short_of(4, "train.accumulate_steps=2"), RUN, replan)
    assert asked == [("none", 2)]
    found, note = plan.findings
    assert found.text.startswith(
        "does not fit: 20.0 GiB of 16.0 GiB, 4.00 GiB too much; compiled with "
        "train.accumulate_steps=2 it fits, 10.0 GiB, and takes "
    )
    assert found.change == "train.accumulate_steps=2"
    assert note.text == "something else"
    assert not plan.fits


def test_what_is_not_enough_gets_more_on_top():
    more = short_of(0.01, "train.accumulate_steps=4")
    replan, asked = following(
        short_of(1, "model.remat=full train.accumulate_steps=2"), more, fitting()
    )
    plan = with_tried_cure(short_of(4, "model.remat=narrow"), RUN, replan)
    assert asked == [("narrow", 1), ("full", 2), ("full", 4)]
    assert plan.findings[0].change == "model.remat=full train.accumulate_steps=4"


def test_where_nothing_more_is_advised_it_says_what_is_missing():
    text = "does not fit: 17.0 GiB of 16.0 GiB, 1.00 GiB too much; take at least 2 times the chips"
    replan, _ = following(short_of(1, None, text))
    plan = with_tried_cure(short_of(4, "model.remat=full"), RUN, replan)
    assert plan.findings[0].text == (
        "does not fit: 20.0 GiB of 16.0 GiB, 4.00 GiB too much; compiled with model.remat=full it is "
        "still 6.2 % over, take at least 2 times the chips"
    )
    assert plan.findings[0].change is None


def test_it_ends():
    replan, asked = following(*[short_of(1, "train.accumulate_steps=2")] * MOST_TRIES)
    plan = with_tried_cure(short_of(4, "model.remat=full"), RUN, replan)
    assert len(asked) == MOST_TRIES
    assert "it is still 6.2 % over" in plan.findings[0].text


@pytest.mark.parametrize("error", [ConfigError("no"), ValueError("does not divide")])
def test_what_cannot_be_compiled_leaves_the_advice_as_it_was(error):
    plan = short_of(4, "train.accumulate_steps=2")
    replan, _ = following(error)
    assert with_tried_cure(plan, RUN, replan) is plan


def test_without_advice_nothing_is_tried():
    plan = short_of(4, None)
    assert with_tried_cure(plan, RUN, lambda _: pytest.fail("it compiled")) is plan
