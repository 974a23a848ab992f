"""Training steps per second of one model: ours, a hand-written pure JAX step, and torch eager.

    python -m bench.train_step                      # GPT-2 style, 6 layers, D 384, T 256, B 4, vocab 8192
    python -m bench.train_step --compile            # compile time of 12 and 48 layers
    python -m bench.train_step --config configs/gpt_tiny.py      # our step of any config

All contenders do the same work: forward, backward, clipping, AdamW, GELU MLP, learned positions,
tied head, no dropout. torch is measured when it is installed.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import measure
from llm_jax.core.config import load
from llm_jax.core.packing import next_token_batch
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import build_program


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: int = 6
    embed: int = 384
    heads: int = 6
    length: int = 256
    batch: int = 4
    vocab: int = 8192


def our_run(sizes: Sizes, compute_dtype: str, scan_unroll: int = 1) -> RunConfig:
    return resolve({
        "model": {
            "name": "gpt", "vocab_size": sizes.vocab, "embed_dim": sizes.embed,
            "num_layers": sizes.layers, "num_heads": sizes.heads, "max_length": sizes.length,
            "norm": "layernorm", "norm_bias": True, "position": "learned", "gated": False,
            "activation": "gelu_tanh", "attention_bias": True, "attention_out_bias": True,
            "mlp_bias": True, "tie_embeddings": True, "scan_unroll": scan_unroll,
        },
        "data": {
            "sources": [{"name": "text", "path": "none"}],
            "tokenizer": {"name": "raw_bytes"},
            "sequence_length": sizes.length,
        },
        "train": {"num_steps": 10**6, "batch_size": sizes.batch, "compute_dtype": compute_dtype},
        "schedule": {"name": "constant"},
    })  # fmt: skip


def random_rows(batch: int, length: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, vocab, (batch, length + 1)).astype(np.int32)


def our_step(run: RunConfig):
    """A function that runs one step of our program and waits for it."""
    program = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1]))
    rows = random_rows(run.train.batch_size, run.data.sequence_length, run.model.vocab_size)
    batch = to_global_batch(next_token_batch(rows, 0, 1), program.rules, run.train.batch_size)
    box = [program.init(jax.random.key(0))]

    def step():
        box[0], metrics = program.step(box[0], batch)
        jax.block_until_ready((box[0], metrics))

    return step


def plain_jax_step(sizes: Sizes):
    """The same model as one would write it by hand: dicts of arrays, a Python loop over layers."""
    d, n, f = sizes.embed, sizes.heads, 4 * sizes.embed
    keys = iter(jax.random.split(jax.random.key(0), 100))
    matrix = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)  # noqa: E731
    norm = lambda: {"g": jnp.ones(d), "b": jnp.zeros(d)}  # noqa: E731
    layer = lambda: {  # noqa: E731
        "n1": norm(), "n2": norm(), "qkv": matrix(d, 3 * d), "qkv_b": jnp.zeros(3 * d),
        "out": matrix(d, d), "out_b": jnp.zeros(d), "up": matrix(d, f), "up_b": jnp.zeros(f),
        "down": matrix(f, d), "down_b": jnp.zeros(d),
    }  # fmt: skip
    params = {
        "embed": matrix(sizes.vocab, d), "positions": matrix(sizes.length, d), "norm": norm(),
        "layers": [layer() for _ in range(sizes.layers)],
    }  # fmt: skip
    mask = jnp.tril(jnp.ones((sizes.length, sizes.length), bool))

    def normalize(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["g"] + p["b"]

    def block(x, p):
        b, t, _ = x.shape
        qkv = normalize(x, p["n1"]) @ p["qkv"] + p["qkv_b"]
        q, k, v = (y.reshape(b, t, n, -1).swapaxes(1, 2) for y in jnp.split(qkv, 3, -1))
        scores = jnp.where(mask, q @ k.swapaxes(2, 3) * (d // n) ** -0.5, -1e30)
        y = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(b, t, d)
        x = x + y @ p["out"] + p["out_b"]
        h = jax.nn.gelu(normalize(x, p["n2"]) @ p["up"] + p["up_b"])
        return x + h @ p["down"] + p["down_b"]

    def loss(params, rows):
        tokens, targets = rows[:, :-1], rows[:, 1:]
        x = params["embed"][tokens] + params["positions"]
        for p in params["layers"]:
            x = block(x, p)
        logits = normalize(x, params["norm"]) @ params["embed"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1)
    )

    def train(params, state, rows):
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    train = jax.jit(train, donate_argnums=(0, 1))
    rows = jnp.asarray(random_rows(sizes.batch, sizes.length, sizes.vocab))
    box = [params, optimizer.init(params)]

    def step():
        *box[:], value = train(*box, rows)
        jax.block_until_ready((box, value))

    return step


def torch_step(sizes: Sizes):
    """GPT-2 as torch users write it, eager, with scaled_dot_product_attention; None without torch."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    d, n = sizes.embed, sizes.heads

    class TorchBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (
                y.view(b, t, n, d // n).transpose(1, 2) for y in self.qkv(self.n1(x)).split(d, 2)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            h = nn.functional.gelu(self.up(self.n2(x)), approximate="tanh")
            return x + self.down(h)

    embed, positions = nn.Embedding(sizes.vocab, d), nn.Embedding(sizes.length, d)
    blocks, norm = nn.ModuleList(TorchBlock() for _ in range(sizes.layers)), nn.LayerNorm(d)
    params = [p for m in (embed, positions, blocks, norm) for p in m.parameters()]
    optimizer = torch.optim.AdamW(params, 3e-4, (0.9, 0.95), weight_decay=0.1)
    rows = torch.tensor(random_rows(sizes.batch, sizes.length, sizes.vocab)).long()
    place = torch.arange(sizes.length)

    def step():
        x = embed(rows[:, :-1]) + positions(place)
        for block in blocks:
            x = block(x)
        logits = norm(x) @ embed.weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def compare(sizes: Sizes, rounds: int) -> dict:
    contenders = {
        "llm_jax float32": our_step(our_run(sizes, "float32")),
        "llm_jax bfloat16": our_step(our_run(sizes, "bfloat16")),
        "llm_jax bfloat16, unrolled": our_step(our_run(sizes, "bfloat16", sizes.layers)),
        "hand-written JAX float32": plain_jax_step(sizes),
        "torch eager float32": torch_step(sizes),
    }
    contenders = {name: step for name, step in contenders.items() if step is not None}
    seconds = measure.interleaved(contenders, rounds)
    about, own = measure.machine(), seconds["llm_jax float32"]
    rows = [(name, 1e3 * s, sizes.batch * sizes.length / s, own / s) for name, s in seconds.items()]
    title = f"train step, {dataclasses.asdict(sizes)}"
    measure.show(title, ("step", "ms", "tokens/s", "x own float32"), rows, about)
    return {"sizes": dataclasses.asdict(sizes), "machine": about, "seconds": seconds}


def compile_times(sizes: Sizes) -> dict:
    """Seconds to compile the step by depth; a stack that is scanned does not grow."""
    seconds = {}
    for layers in (12, 48, 12, 48, 12, 48):
        run = our_run(dataclasses.replace(sizes, layers=layers), "bfloat16")
        lowered = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1])).lower()
        start = time.perf_counter()
        lowered.compile()
        seconds.setdefault(layers, []).append(time.perf_counter() - start)
    medians = {layers: float(np.median(values)) for layers, values in seconds.items()}
    rows = [(str(layers), s, s / medians[12]) for layers, s in medians.items()]
    about = measure.machine()
    measure.show("compile time by depth", ("layers", "s", "x 12 layers"), rows, about)
    return {"machine": about, "seconds": medians}


def one_config(path: str, rounds: int) -> dict:
    run = resolve(load(path))
    seconds = measure.interleaved({path: our_step(run)}, rounds)[path]
    tokens = run.train.batch_size * run.data.sequence_length
    about = measure.machine()
    rows = [(path, 1e3 * seconds, tokens / seconds)]
    measure.show("train step", ("config", "ms", "tokens/s"), rows, about)
    return {"machine": about, "seconds": seconds, "tokens_per_second": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="measure our step of this config only")
    parser.add_argument("--compile", action="store_true", help="measure compile time instead")
    parser.add_argument("--rounds", type=int, default=15)
    measure.json_flag(parser)
    flags = parser.parse_args()
    if flags.compile:
        result = compile_times(Sizes())
    elif flags.config:
        result = one_config(flags.config, flags.rounds)
    else:
        result = compare(Sizes(), flags.rounds)
    measure.write_json(flags.json, result)


if __name__ == "__main__":
    main()
