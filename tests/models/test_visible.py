"""Branches of a text in one row: `visible` hides from each what another has, on meshes that can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_model, run

from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

TEXT, BRANCHES = [5, 9, 3], ([7, 1], [2, 8, 4])
ROW = [*TEXT, *BRANCHES[0], *BRANCHES[1]]


def batch_of_branches():
    visible = np.tril(np.ones((8, 8), bool))
    visible[5:, 3:5] = False
    positions = [0, 1, 2, 3, 4, 3, 4, 5]
    return {
        "tokens": jnp.array([ROW]),
        "positions": jnp.array([positions]),
        "segment_ids": jnp.ones((1, 8), jnp.int32),
        "visible": jnp.asarray(visible[None]),
    }


def test_a_branch_sees_its_text_and_itself():
    model = make_model()
    found = run(model, batch_of_branches()).logits[0]
    for branch, places in zip(BRANCHES, (slice(3, 5), slice(5, 8)), strict=True):
        alone = run(model, {"tokens": jnp.array([[*TEXT, *branch]])}).logits[0, 3:]
        np.testing.assert_allclose(found[places], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("axis", "words"),
    [("context", "what is visible needs whole sequences"), ("pipeline", "what is visible cannot")],
)
def test_meshes_that_cannot_say_so(axis, words):
    config = MeshConfig(data=1, **{axis: 2})
    rules = make_rules(config, make_mesh(config, jax.devices()[:2]))
    with use_rules(rules), pytest.raises(ValueError, match=words):
        make_model()({name: jnp.repeat(a, 2, axis=0) for name, a in batch_of_branches().items()})
