"""What the forward pass keeps for the backward pass, by name."""

from collections.abc import Callable
from typing import Literal

import jax

RematPolicy = Literal["none", "full", "dots", "attention"]

_POLICIES = {
    # Keep the block's input only; everything else is computed again. Least memory.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keep the results of weight matmuls, compute the cheap rest (norms, activations, scores) again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Keep the output of attention, whose recomputation is the dearest per byte.
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


def remat(body: Callable, policy: RematPolicy) -> Callable:
    """Wraps the body of a scan over layers; "none" keeps every intermediate."""
    if policy == "none":
        return body
    # Inside a scan the compiler cannot merge the recomputation with the forward pass, so the
    # barrier against that merging is only in the way.
    return jax.checkpoint(body, policy=_POLICIES[policy], prevent_cse=False)
