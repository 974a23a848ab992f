"""The mixture of experts compiles for TPU chips that are not here, as two stages of a pipeline."""

import importlib.util
import json

import pytest

SCRIPT = r"""
import json, re
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from llm_jax.core.param import normal
from llm_jax.nn.moe import Moe, MoeConfig, router_loss
from llm_jax.nn.precision import Precision
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import logical_axes, shardings_for, use_rules

D, F, B, T = 256, 512, 8, 512
config = MoeConfig(num_experts=16, mlp_dim=F)
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
mesh_config = MeshConfig(pipeline=2, expert=4)
rules = make_rules(mesh_config, make_mesh(mesh_config, topology.devices))
graphdef, state = nnx.split(nnx.eval_shape(lambda: Moe(
    D, config, init=normal(1.0), out_init=normal(1.0), precision=Precision.on("tpu", "bfloat16"),
    rngs=nnx.Rngs(0))))

def loss(state, x):
    y, sums = nnx.merge(graphdef, state)(x, jnp.ones(x.shape[:2], bool))
    return jnp.sum(jnp.square(y.astype(jnp.float32))) + router_loss(config, sums)

def total(state, x):
    return jnp.sum(jax.vmap(loss, spmd_axis_name="pipeline")(state, x))

def stacked(axes, shape, dtype):
    sharding = inside.sharding((None, *axes), (2, *shape))
    sharding = jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec("pipeline", *sharding.spec[1:]))
    return jax.ShapeDtypeStruct((2, *shape), dtype, sharding=sharding)

inside = rules.within_pipeline()
state = jax.tree.map(
    lambda v: v.replace(stacked(v.axes, v.shape, v.dtype)), state,
    is_leaf=lambda v: isinstance(v, nnx.Variable))
x = stacked(("batch", "length", None), (B, T, D), jnp.bfloat16)
with use_rules(inside):
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(state, x).compile()
text = compiled.as_text()
rows = 1.5 * B * T * 2 / 4  # the buffers of one chip
print(json.dumps({
    "exchanges": len(re.findall(r" ragged-all-to-all", text)),
    "gathered": [s for s in re.findall(r" = (\S+) all-gather", text) if "bf16" in s],
    "work": compiled.cost_analysis()["flops"] / (9 * 2 * rows * D * F),
}))
"""
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_tpu_within_a_pipeline(run_python):
    run = run_python("-c", SCRIPT, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    # There and back, forward and backward; in the loops of further rounds the same and a replay.
    assert result["exchanges"] >= 8
    assert result["gathered"] == []  # no token goes to a chip that does not need it
    # Once as usual and once in the loops of further rounds; every expert on every row would be 4x.
    assert result["work"] < 3
