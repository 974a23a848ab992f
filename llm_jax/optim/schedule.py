"""Learning rate by step: warm-up, then cosine, linear, constant, inverse square root, or stable and decay."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """learning_rate: the peak, reached after `warmup_steps`.

    name: "inverse_sqrt" falls as 1 / sqrt(step) from there on (Vaswani et al. 2017, section 5.3; T5).
    decay_steps: length of the decay at the end, for "wsd" only (Hu et al. 2024, MiniCPM).
    final_fraction: where the decay ends, as a share of the peak.
    """

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps {self.warmup_steps} must not be negative")
        if self.learning_rate <= 0:
            raise ValueError(f"schedule.learning_rate {self.learning_rate} must be positive")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction {self.final_fraction} must lie in [0, 1]")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"schedule.decay_steps {self.decay_steps} must be at least 1")
        if self.name == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "schedule.warmup_steps 0 with schedule.name = 'inverse_sqrt': the rate falls from its "
                "value there, so it needs at least 1"
            )
        if (self.name == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"schedule.decay_steps = {self.decay_steps} with schedule.name = {self.name!r}: "
                "'wsd' needs it, the others decay until the last step"
            )


def make_schedule(config: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate, for a run of `num_steps`.

    Raises:
      ValueError: warm-up and decay are longer than the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay = config.decay_steps or 0
    if config.warmup_steps + decay > num_steps:
        raise ValueError(
            f"schedule.warmup_steps {config.warmup_steps} + decay_steps {decay} exceed "
            f"train.num_steps {num_steps}"
        )
    rest = max(num_steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "inverse_sqrt": lambda: _inverse_sqrt(peak, config.warmup_steps),
        "wsd": lambda: optax.linear_schedule(peak, final, decay, rest - decay),
    }[config.name]()
    if not config.warmup_steps:
        return after
    # From one step's worth rather than from zero: the first step must not be wasted.
    first = peak / (config.warmup_steps + 1)
    warmup = optax.linear_schedule(first, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _inverse_sqrt(peak: float, warmup_steps: int) -> optax.Schedule:
    """Of the steps after the warm-up."""
    return lambda step: peak * jnp.sqrt(warmup_steps / (warmup_steps + step))
