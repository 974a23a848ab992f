"""What the forward pass keeps for the backward pass, by name.

| policy             | kept per layer                           | computed again           |
|--------------------|------------------------------------------|--------------------------|
| none               | everything                               | nothing                  |
| dots_and_attention | products with weights, attention         | norms, activations       |
| dots               | products with weights                    | attention too            |
| narrow             | products as wide as the model, attention | the wide ones of the MLP |
| attention          | the block's input, attention             | products with weights    |
| full               | the block's input                        | everything               |
| offload            | the block's input, in host memory        | everything               |

The products of a mixture of experts count as "everything else": only "none" keeps them.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

RematPolicy = Literal[
    "none", "dots_and_attention", "dots", "narrow", "attention", "full", "offload"
]

_policies = jax.checkpoint_policies


def _keeps_attention(primitive, *_, **__) -> bool:
    """The statistics of cuDNN's kernel carry no name, so the kernel itself is kept."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


_ATTENTION = _policies.save_from_both_policies(
    _policies.save_only_these_names("attention"), _keeps_attention
)
_DOTS = _policies.save_only_these_names("projection", "hidden")
_POLICIES = {
    "full": _policies.nothing_saveable,
    "dots": _DOTS,
    "dots_and_attention": _policies.save_from_both_policies(_DOTS, _ATTENTION),
    "narrow": _policies.save_from_both_policies(
        _policies.save_only_these_names("projection"), _ATTENTION
    ),
    "attention": _ATTENTION,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def name_input(x: jax.Array) -> jax.Array:
    """Marks the input of a block as what "offload" moves to the host."""
    return checkpoint_name(x, "block_input")


def remat(body: Callable, policy: RematPolicy, *, unrolled: bool = False) -> Callable:
    """Wraps the body of a scan over layers.

    Args:
      unrolled: whether layers stand outside the loop that the scan becomes.
    """
    if policy == "none":
        return body
    # Inside a loop the compiler cannot merge the recomputation with the forward pass, so the
    # barrier against that merging is only in the way; without a loop it would merge all of it.
    return jax.checkpoint(body, policy=_POLICIES[policy], prevent_cse=unrolled)
