"""Loss and gradient of a head: the chunks of `nn.losses.head_loss` beside logits for all tokens.

    python -m bench.cross_entropy [--dtype bfloat16] [--json FILE]

Memory is what the compiler reserves beyond arguments and results.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from bench import measure
from llm_jax.core.types import Head
from llm_jax.nn.losses import CHUNK_BYTES, head_loss, logits_loss
from llm_jax.nn.precision import Precision

SPEC = "btd,vd->btv"
SIZES = ((4, 256, 384, 8192), (4, 1024, 384, 50257), (2, 1024, 512, 128256))


def chunked(precision, hidden, w, targets, weights):
    return head_loss(precision, hidden, Head(w, SPEC), targets, weights).loss_sum


def one_chunk(precision, hidden, w, targets, weights):
    head, whole = Head(w, SPEC), hidden.shape[0] * hidden.shape[1] * w.shape[0] * 4
    return head_loss(precision, hidden, head, targets, weights, chunk_bytes=whole).loss_sum


def with_logits(precision, hidden, w, targets, weights):
    logits = precision.einsum(SPEC, hidden, w, out_dtype=jnp.float32)
    return logits_loss(logits, targets, weights).loss_sum


def compiled(function, precision, inputs):
    gradient = jax.value_and_grad(functools.partial(function, precision), argnums=(0, 1))
    return jax.jit(gradient).lower(*inputs).compile()


def arrays(sizes: tuple[int, int, int, int], dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    batch, length, embed, vocab = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, length, embed), dtype),
        0.02 * jax.random.normal(keys[1], (vocab, embed)),
        jax.random.randint(keys[2], (batch, length), 0, vocab),
        jnp.ones((batch, length)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    measure.json_flag(parser)
    flags = parser.parse_args()
    precision = Precision.on(jax.default_backend(), flags.dtype)
    rows, results = [], []
    for sizes in SIZES:
        inputs = arrays(sizes, precision.dtype)
        steps = {
            f.__name__: compiled(f, precision, inputs) for f in (with_logits, one_chunk, chunked)
        }
        seconds = measure.interleaved(
            {n: functools.partial(lambda s, x: jax.block_until_ready(s(*x)), s, inputs)
             for n, s in steps.items()},
            flags.rounds,
        )  # fmt: skip
        for name, step in steps.items():
            megabytes = step.memory_analysis().temp_size_in_bytes / 1e6
            ratio = seconds[name] / seconds["with_logits"]
            rows.append((" x ".join(map(str, sizes)), name, 1e3 * seconds[name], ratio, megabytes))
            results.append(
                dict(zip(("sizes", "path", "ms", "ratio", "temp_mb"), rows[-1], strict=True))
            )
    about = measure.machine()
    title = f"loss and gradient of a head, {flags.dtype}, chunks of {CHUNK_BYTES / 2**20:.0f} MiB"
    measure.show(title, ("B x T x D x V", "path", "ms", "x with_logits", "MB"), rows, about)
    measure.write_json(flags.json, {"machine": about, "rows": results})


if __name__ == "__main__":
    main()
