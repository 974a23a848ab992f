import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from record_cases import kept, made
from tiny import model_section, random_batch, run

from llm_jax.core.reference import frozen_reference
from llm_jax.models import gpt


def decoder():
    return kept(made(gpt, gpt.Config(**model_section(num_layers=1))))


def test_the_reference_is_the_model_before_training():
    model, batch = decoder(), random_batch()
    first = run(model, batch).logits
    moved = jax.tree.map(lambda x: x + 0.1 * x**2, nnx.state(model, nnx.Param))
    nnx.update(model, moved)
    graphdef, state = nnx.split(model)
    assert (model.embed[...] != model.embed.first[...]).any()
    reference = frozen_reference(nnx.merge(graphdef, state))
    np.testing.assert_array_equal(run(reference, batch).logits, first)
    assert not jax.tree.leaves(nnx.state(reference, nnx.Param))


def test_a_parameter_without_its_first_value_is_named():
    model = decoder()
    model.final_norm.scale = nnx.Param(jnp.ones(32))
    with pytest.raises(ValueError, match=r"first value of final_norm\.scale is not kept"):
        frozen_reference(model)
