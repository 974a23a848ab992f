"""What training on so many tokens costs: days, chip-hours, dollars.

A list price, as of the date that its note carries; what a contract, a reservation or a spot machine
costs is the user's to give. Steps only: no evaluation, no checkpoints, no restarts.
"""

import math
import re

from llm_jax.core.config import ConfigError
from llm_jax.planner.chips import Chip
from llm_jax.planner.plan import Cost

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_tokens(text: str) -> float:
    """`20b`, `1.5t`, `300m`, `2e10` to a number of tokens.

    Raises:
      ConfigError: not a positive number with one of these units.
    """
    found = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?|\.\d+)([kmbt]?)", text.strip().lower())
    tokens = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < tokens < math.inf:
        raise ConfigError(
            f"tokens {text!r}: expected a positive number such as 300m, 20b, 1.5t or 2e10"
        )
    return tokens


def check_price(price: float | None) -> None:
    """ConfigError for dollars per chip-hour that cannot be paid; None is the list price."""
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"price {price}: expected dollars per chip-hour, at least 0")


def cost_of(
    tokens: float,
    tokens_per_second_per_chip: float,
    num_chips: int,
    chip: Chip,
    price: float | None = None,
) -> Cost:
    """The cost of `tokens` on `num_chips`; no dollars where no price is known, as the note says.

    Args:
      price: dollars for a chip for an hour; None for the list price of the generation.

    Raises:
      ConfigError: a negative price.
    """
    check_price(price)
    hourly = price if price is not None else chip.dollars_per_chip_hour
    chip_hours = tokens / tokens_per_second_per_chip / 3600
    return Cost(
        tokens=tokens,
        days=chip_hours / num_chips / 24,
        chip_hours=chip_hours,
        dollars=None if hourly is None else chip_hours * hourly,
        dollars_per_chip_hour=hourly,
        price_note=chip.price_note if price is None else "as given",
    )
