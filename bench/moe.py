"""A mixture-of-experts layer against a dense MLP of the same active FLOPs, forward and backward.

    python -m bench.moe                         # D 384, 2048 tokens, experts 8 of 2 and 32 of 4
    python -m bench.moe --embed 1024 --mlp 2816

The dense MLP is as wide as the experts of one token together. "every expert" is what
`jax.lax.ragged_dot` does on CPU: each expert on every token.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from bench import measure
from llm_jax.core.param import normal
from llm_jax.nn.mlp import Mlp, MlpConfig
from llm_jax.nn.moe import Moe, MoeConfig, router_loss
from llm_jax.nn.precision import Precision

SHAPES = ((8, 2), (32, 4))  # experts, experts per token


def gradient_step(layer: nnx.Module, x: jax.Array):
    """A function that runs the layer forward and backward once and waits."""
    graphdef, state = nnx.split(layer)
    valid = jnp.ones(x.shape[:2], bool)

    def loss(state, x):
        layer = nnx.merge(graphdef, state)
        if isinstance(layer, Mlp):
            return jnp.sum(jnp.square(layer(x).astype(jnp.float32)))
        y, sums = layer(x, valid)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + router_loss(layer.config, sums)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(gradient(state, x))


def contenders(flags: argparse.Namespace, dtype: str) -> dict:
    platform = jax.devices()[0].platform
    x = jax.random.normal(jax.random.key(0), (flags.batch, flags.length, flags.embed)).astype(dtype)
    steps = {}
    for experts, chosen in SHAPES:
        width = flags.mlp // chosen
        make = functools.partial(
            Moe,
            flags.embed,
            MoeConfig(num_experts=experts, mlp_dim=width, experts_per_token=chosen),
            init=normal(0.02),
            out_init=normal(0.02),
            rngs=nnx.Rngs(0),
        )
        name = f"{chosen} of {experts} experts of width {width}"
        steps[name] = gradient_step(make(precision=Precision.on(platform, dtype)), x)
        if platform == "cpu" and experts == SHAPES[0][0]:
            steps[f"{name}, every expert"] = gradient_step(
                make(precision=Precision(dtype, False)), x
            )
    dense = Mlp(
        flags.embed, MlpConfig(flags.mlp), init=normal(0.02), out_init=normal(0.02),
        precision=Precision.on(platform, dtype), rngs=nnx.Rngs(0),
    )  # fmt: skip
    return {f"dense of width {flags.mlp}": gradient_step(dense, x)} | steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embed", type=int, default=384)
    parser.add_argument("--mlp", type=int, default=1536, help="active width: k times an expert's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    measure.json_flag(parser)
    flags = parser.parse_args()
    rows, result = [], {}
    for dtype in ("float32", "bfloat16"):
        seconds = measure.interleaved(contenders(flags, dtype), flags.rounds)
        dense = next(iter(seconds.values()))
        rows += [(f"{dtype}: {name}", 1e3 * s, s / dense) for name, s in seconds.items()]
        result[dtype] = seconds
    sizes = {"embed": flags.embed, "mlp": flags.mlp, "tokens": flags.batch * flags.length}
    about = measure.machine()
    measure.show(f"mixture of experts, {sizes}", ("layer", "ms", "x dense"), rows, about)
    measure.write_json(flags.json, {"sizes": sizes, "machine": about, "seconds": result})


if __name__ == "__main__":
    main()
