"""All that changes from step to step."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A plain pytree of arrays.

    step:      scalar int32, steps done.
    params:    nested dict of float32 arrays, by module path.
    extra:     nested dict of what a model keeps besides parameters: what transforms froze, ....
    opt_state: Optax's state.
    key:       the run's random key; each step folds its number into it.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    key: jax.Array
