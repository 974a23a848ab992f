import jax
import numpy as np
import pytest
from flax import nnx
from tiny import make_model, params_of, random_batch, run, run_config

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.paths import flat
from llm_jax.core.reference import frozen_reference
from llm_jax.optim.make import is_decayed
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.rules import LogicalAxes
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
from llm_jax.transforms import drawn, merged, reference, transformed
from llm_jax.transforms.mixout import Config

QUERY = "stack.layers.attention.query"


def mixed(probability=0.5):
    model = transformed(nnx.clone(make_model()), [Config(probability)], nnx.Rngs(0))
    query = model.stack.layers.attention.query
    query.current[...] = query.current[...] + 1.0
    return model


def test_elements_are_the_first_values_or_moved_on():
    model = mixed()
    first = np.asarray(model.stack.layers.attention.query.first[...])
    value = np.asarray(flat(params_of(drawn(model, jax.random.key(0))))[QUERY])
    is_first = value == first
    assert 0.4 < is_first.mean() < 0.6
    np.testing.assert_allclose(value[~is_first], first[~is_first] + 2.0, atol=1e-5)
    other = np.asarray(flat(params_of(drawn(mixed(), jax.random.key(1))))[QUERY])
    assert np.any(other != value)


def test_evaluation_and_export_see_what_is_trained():
    model, batch = mixed(), random_batch(2)
    plain = merged(model)
    assert flat(params_of(plain)).keys() == flat(params_of(make_model())).keys()
    np.testing.assert_array_equal(run(model, batch).logits, run(plain, batch).logits)


def test_it_trains_from_the_first_values_which_stay():
    start = transformed(nnx.clone(make_model()), [Config()], nnx.Rngs(0))
    values = flat(params_of(drawn(start, jax.random.key(0))))
    np.testing.assert_array_equal(values[QUERY], start.stack.layers.attention.query[...])
    config = resolve({**to_dict(run_config()), "transforms": [{"name": "mixout"}]})
    program = build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state, _ = program.step(program.init(jax.random.key(0)), random_batch())
    before = program.init(jax.random.key(0))
    query = flat(state.params)[f"{QUERY}.current"]
    np.testing.assert_array_equal(
        flat(state.extra)[f"{QUERY}.first"], flat(before.params)[f"{QUERY}.current"]
    )
    assert np.any(query != flat(state.extra)[f"{QUERY}.first"])


def test_a_kept_reference():
    start = make_model()
    model = transformed(nnx.clone(start), [reference.Config()], nnx.Rngs(0))
    model.embed.current[...] = model.embed.current[...] + 1.0
    batch = random_batch(2)
    np.testing.assert_array_equal(
        run(frozen_reference(model), batch).logits, run(start, batch).logits
    )
    assert np.any(params_of(merged(model))["embed"] != start.embed[...])
    scale = (jax.tree_util.DictKey("norm.scale.current"),)
    assert not is_decayed(scale, LogicalAxes(("layers", "features")))


def test_errors():
    with pytest.raises(ConfigError, match=r"transforms.mixout.targets 'x.\*' matches no parameter"):
        transformed(nnx.clone(make_model()), [Config(targets=("x.*",))], nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"probability 1.0 must lie in \(0, 1\)"):
        Config(1.0)
