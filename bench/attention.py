"""The attention kernels of this backend side by side: forward and backward of one layer.

    python -m bench.attention                              # T 256 to 8192, float32 and bfloat16
    python -m bench.attention --lengths 4096 --window 1024 --soft-cap 50
    python -m bench.attention --lengths 2048 --blocks 128 256 512      # blockwise by block length

Every kernel gets the layout that it asks for. Rows hold four packed documents. The same number of
tokens at every length, so a column shows the cost of length alone; FLOP/s count what a causal mask
leaves of the square, which the plain reference computes whole.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bench import measure
from llm_jax.nn.kernels import attention as kernels
from llm_jax.nn.kernels import blockwise
from llm_jax.nn.mask import Places
from llm_jax.nn.precision import Precision

SCORES_LIMIT = 8e9  # bytes of float32 scores above which the reference is left out


@dataclasses.dataclass(frozen=True)
class Sizes:
    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    documents: int = 4


def packed_places(batch: int, length: int, documents: int) -> Places:
    """Rows of `documents` of equal length."""
    positions = np.arange(length, dtype=np.int32)
    each = -(-length // documents)
    row = Places(positions // each + 1, positions % each)
    return jax.tree.map(lambda x: jnp.asarray(np.tile(x, (batch, 1))), row)


def contender(sizes: Sizes, length: int, layout: kernels.Layout, dtype: str, run):
    """A function that runs forward and backward once and waits."""
    batch = max(1, sizes.tokens // length)
    places = packed_places(batch, length, sizes.documents)

    def array(seed: int, heads: int) -> jax.Array:
        x = jax.random.normal(jax.random.key(seed), (batch, length, heads, sizes.head_dim), dtype)
        return x if layout == "btnh" else jnp.swapaxes(x, 1, 2)

    arrays = array(0, sizes.heads), array(1, sizes.kv_heads), array(2, sizes.kv_heads)
    upstream = array(3, sizes.heads)

    @jax.jit
    def step(arrays, upstream):
        out, back = jax.vjp(lambda q, k, v: run(q, k, v, places, places), *arrays)
        return out, back(upstream)

    return lambda: jax.block_until_ready(step(arrays, upstream))


def contenders(sizes: Sizes, spec: kernels.AttentionSpec, length: int, dtype: str, blocks) -> dict:
    """Every kernel that runs here, by name; with `blocks`, blockwise at each of them instead."""
    platform = jax.default_backend()
    precision = Precision.on(platform, dtype)
    if blocks:
        return {
            f"block {block}": contender(
                sizes, length, "bnth", dtype,
                functools.partial(blockwise.attention, precision, spec=spec, block=block),
            )
            for block in blocks
        }  # fmt: skip
    found = {}
    for kernel in ("reference", "blockwise", "splash", "cudnn"):
        try:
            kernels.choose(
                kernel, platform, spec, length=length, head_dim=sizes.head_dim,
                num_heads=sizes.heads, num_kv_heads=sizes.kv_heads, compute_dtype=dtype,
                context_shares=1,
            )  # fmt: skip
        except ValueError:
            continue
        scores = 4 * max(sizes.tokens, length) * length * sizes.heads
        if kernel == "reference" and scores > SCORES_LIMIT:
            continue
        run = functools.partial(kernels.attention, kernel, precision, spec=spec)
        found[kernel] = contender(sizes, length, kernels.layout(kernel), dtype, run)
    return found


def flops(sizes: Sizes, length: int) -> float:
    """Products of forward (2) and backward (5) with a causal mask, each 2 FLOPs per multiply-add."""
    return 7 * 2 * max(sizes.tokens, length) * length / 2 * sizes.heads * sizes.head_dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(8, 14)])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--window", type=int)
    parser.add_argument("--soft-cap", type=float)
    parser.add_argument("--blocks", type=int, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--rounds", type=int, default=5)
    measure.json_flag(parser)
    flags = parser.parse_args()
    sizes = Sizes(tokens=flags.tokens)
    spec = kernels.AttentionSpec(window=flags.window, soft_cap=flags.soft_cap)
    rows, seconds = [], []
    for dtype in flags.dtypes:
        for length in flags.lengths:
            here = contenders(sizes, spec, length, dtype, flags.blocks)
            for name, s in measure.interleaved(here, flags.rounds).items():
                rows.append((f"{dtype} T {length}", name, 1e3 * s, flops(sizes, length) / s / 1e9))
                seconds.append({"dtype": dtype, "length": length, "kernel": name, "seconds": s})
    about = measure.machine()
    title = f"attention, forward and backward, {dataclasses.asdict(sizes)}, {spec}"
    measure.show(title, ("shape", "kernel", "ms", "GFLOP/s"), rows, about)
    content = {"sizes": dataclasses.asdict(sizes), "spec": dataclasses.asdict(spec)}
    measure.write_json(flags.json, {**content, "machine": about, "seconds": seconds})


if __name__ == "__main__":
    main()
