import pytest

from llm_jax.core.config import ConfigError
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.cost import cost_of, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("20b", 20e9), ("1.5T", 1.5e12), ("300m", 3e8), ("2e10", 2e10), ("7k", 7e3), ("12", 12.0)],
)
def test_tokens_as_people_write_them(text, tokens):
    assert parse_tokens(text) == pytest.approx(tokens)


@pytest.mark.parametrize("text", ["", "b", "20 billion", "-3b", "0", "1e400", "nan", "1_0"])
def test_other_tokens_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match="expected a positive number") as error:
        parse_tokens(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_days_hours_and_dollars_agree():
    cost = cost_of(3.6e9, 1000.0, 10, CHIPS["v5e"], price=2.0)
    assert cost.chip_hours == pytest.approx(1000.0)
    assert cost.days == pytest.approx(1000 / 10 / 24)
    assert cost.dollars == pytest.approx(2000.0)
    assert cost.price_note == "as given"


def test_list_price_says_where_it_is_from():
    chip = CHIPS["v5e"]
    cost = cost_of(1e9, 1000.0, 4, chip)
    assert cost.dollars == pytest.approx(cost.chip_hours * chip.dollars_per_chip_hour)
    assert cost.price_note == chip.price_note


def test_without_a_price_time_is_still_told():
    chip = next(chip for chip in CHIPS.values() if chip.dollars_per_chip_hour is None)
    cost = cost_of(1e9, 1000.0, 4, chip)
    assert cost.dollars is None
    assert cost.dollars_per_chip_hour is None
    assert cost.days > 0
    assert "give your own" in cost.price_note


def test_what_is_free_costs_nothing():
    assert cost_of(1e9, 1000.0, 4, CHIPS["tpu7x"], price=0.0).dollars == 0


def test_a_negative_price_is_refused():
    with pytest.raises(ConfigError, match="at least 0"):
        cost_of(1e9, 1000.0, 4, CHIPS["v5e"], price=-1.0)
