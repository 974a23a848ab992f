"""Differences of two runs and their intervals, against what is known of them."""

import io

import numpy as np
import pytest
from rich.console import Console

from llm_jax.core.config import ConfigError
from llm_jax.evals.compare import compare, differences
from llm_jax.evals.evaluation import Evaluation
from llm_jax.evals.findings import Items
from llm_jax.metrics.scores import collect_scores


def evaluation(step=1, /, items=None, **summary):
    items = items or {}
    return Evaluation(step, summary | {n: i.mean for n, i in items.items()}, items=items)


def right(values, names=None):
    names = names or [f"q{i}" for i in range(len(values))]
    return Items(tuple(names), tuple(map(float, values)), (1.0,) * len(values))


def test_the_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    a, b = rng.random(400) < 0.5, rng.random(400) < 0.6
    (found,) = differences(evaluation(items={"acc": right(a)}), evaluation(items={"acc": right(b)}))
    gaps = b.astype(float) - a
    assert found.items == 400
    assert found.change.value == pytest.approx(gaps.mean())
    spread = 1.96 * gaps.std() / 20
    assert found.change.low == pytest.approx(gaps.mean() - spread, abs=0.006)
    assert found.change.high == pytest.approx(gaps.mean() + spread, abs=0.006)
    assert found.a.low < a.mean() < found.a.high


def test_what_is_paired_is_told_from_what_is_not():
    """A little better on every item: certain, however much the items differ among themselves."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 50)
    a, b = right(hard), right(hard + 0.1)
    (found,) = differences(evaluation(items={"x": a}), evaluation(items={"x": b}))
    assert found.change.low == pytest.approx(0.1)
    assert found.is_clear
    assert found.a.high - found.a.low > 4
    (same,) = differences(evaluation(items={"x": a}), evaluation(items={"x": a}))
    assert not same.is_clear


def test_items_are_paired_by_name_and_weighted():
    a = Items(("x", "y", "only a"), (8.0, 4.0, 1.0), (4.0, 1.0, 1.0))
    b = Items(("only b", "y", "x"), (1.0, 2.0, 4.0), (1.0, 1.0, 4.0))
    (found,) = differences(evaluation(items={"bits": a}), evaluation(items={"bits": b}))
    assert (found.items, found.a.value, found.b.value) == (2, 12 / 5, 6 / 5)
    assert (found.change.low, found.change.high) == pytest.approx((-2, -1))
    assert differences(evaluation(items={"bits": a}), evaluation(items={"nats": b})) == []


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(1)
    for name, level, steps in (("a", 0.4, (5, 10)), ("b", 0.8, (10,))):
        for step in steps:
            items = {"quiz/accuracy": right(rng.random(200) < level)}
            evaluation(step, items, bleu=30.0 * level, tokens=7).save(tmp_path / name)
        collect_scores(tmp_path / name)
    return tmp_path


def printed(a, b):
    out = io.StringIO()
    page = compare(str(a), str(b), Console(file=out, width=160))
    return out.getvalue(), page.read_text()


def test_table_and_page(runs):
    table, page = printed(runs / "a", runs / "b")
    assert "quiz/accuracy" in table
    assert "[" in table
    assert "+12" in table  # bleu, which has no items
    assert "1 figure, of which 1 differs" in page
    assert 'class="row clear"' in page
    assert "Over steps" in page
    assert "http" not in page.replace("http-equiv", "")
    other, _ = printed(f"{runs / 'a'}@5", runs / "a")
    assert "a@5" in other


def test_what_cannot_be_compared(runs, tmp_path):
    evaluation(1, bias=1.0).save(runs / "c")
    for a, b, said in [
        (runs / "nowhere", runs / "a", "has no scores: python -m llm_jax.evaluate --workdir"),
        (f"{runs / 'a'}@7", runs / "b", "no scores of step 7; there are: 5, 10"),
        (runs / "a", runs / "c", "have no score in common"),
    ]:
        with pytest.raises(ConfigError, match=said) as error:
            printed(a, b)
        assert "\n" not in str(error.value)
    (runs / "c" / "evals" / "scores_1.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no evaluation"):
        printed(runs / "a", runs / "c")
