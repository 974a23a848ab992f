"""Splash attention compiled for TPUs that are not there, by libtpu, in a process of its own."""

import importlib.util

import pytest

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# By topology: the kernels of a step, one forward and two backward; a forward kernel that ran again for
# rematerialization would add one.
KERNELS = {"v5e:2x2": 3, "v5p:2x2x1": 3, "v6e:2x2": 3, "tpu7x:2x2x1": 3}

COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from llm_jax.nn.kernels.attention import AttentionSpec, attention
from llm_jax.nn.mask import Places
from llm_jax.nn.precision import Precision
from llm_jax.nn.remat import remat
from llm_jax.sharding.mesh import MeshConfig, make_mesh, make_rules
from llm_jax.sharding.rules import use_rules

config, precision = MeshConfig(context=2, tensor=2), Precision.on("tpu", "bfloat16")
for name in sys.argv[1:]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:4]
    rules = make_rules(config, make_mesh(config, devices))

    def array(axes, *shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(axes, shape))

    def loss(query, key, value, segments):
        places = Places(segments, segments)
        body = lambda q, k, v: attention(
            "splash", precision, jnp.sin(q), k, v, places, places, AttentionSpec(soft_cap=30.0)
        )
        with use_rules(rules):
            return remat(body, "attention")(query, key, value).astype("float32").sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
        array(("batch", "heads", "length", None), 1, 4, 512, 64),
        *[array(("batch", "kv_heads", "length", None), 1, 2, 512, 64)] * 2,
        array(("batch", "length"), 1, 512, dtype="int32"),
    )
    text = step.compile().as_text()
    print("kernels", name, text.count('custom_call_target="tpu_custom_call"'), flush=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_splash_compiles_for_every_generation(run_python):
    result = run_python("-c", COMPILE, *KERNELS, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("kernels")]
    assert {name: int(count) for name, count in lines} == KERNELS
