"""Training steps of every family at the same width and depth: model FLOPs a second beside the GPT step's.

    python -m bench.families                     # float32 and bfloat16
    python -m bench.families --dtype bfloat16 --embed 256 --rounds 3

A family's step counts its own model FLOPs (core/flops.py), so the ratio says what its attention, head and
loss cost beside the decoder's. The steps take turns in one process.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bench import measure
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import RunConfig, resolve
from llm_jax.training.program import build_program
from llm_jax.training.speed import flops_per_token

VOCAB = 8192
T5 = {
    "position": "relative", "norm": "rmsnorm", "norm_bias": False, "norm_placement": "pre",
    "activation": "gelu_tanh", "gated": True, "attention_bias": False, "mlp_bias": False,
    "scale_embeddings": False, "tie_embeddings": False,
}  # fmt: skip


def families(embed: int, layers: int, length: int) -> dict[str, dict[str, Any]]:
    """Sections `model` and `objective` of each family."""
    heads = embed // 64
    sizes = {"vocab_size": VOCAB, "embed_dim": embed, "num_layers": layers, "num_heads": heads,
             "scan_unroll": layers}  # fmt: skip
    gpt2 = {"norm": "layernorm", "norm_bias": True, "gated": False, "activation": "gelu_tanh",
            "position": "learned", "mlp_dim": 4 * embed, "max_length": length}  # fmt: skip
    pair = {**sizes, "name": "encoder_decoder", "num_layers": layers // 2, "max_length": length,
            "scan_unroll": layers // 2}  # fmt: skip
    gated = 64 * round(embed * 8 / 3 / 64)
    experts = {"num_experts": 8, "experts_per_token": 2, "mlp_dim": gated // 2}
    return {
        "gpt": {"model": {"name": "gpt", **sizes, **gpt2}},
        "llama": {"model": {"name": "gpt", **sizes, "max_length": length, "mlp_dim": gated}},
        "moe, 2 of 8": {
            "model": {"name": "gpt", **sizes, "max_length": length, "experts": experts}
        },
        "bert": {
            "model": {"name": "bert", **sizes, "mlp_dim": 4 * embed, "num_positions": length},
            "objective": {"name": "masked_lm", "pairs": "sentence_order"},
        },
        "t5": {
            "model": {**pair, **T5, "mlp_dim": gated},
            "objective": {"name": "span_corruption"},
        },
        "transformer 2017": {"model": pair, "objective": {"name": "seq2seq"}},
    }


def run_of(sections: dict[str, Any], batch: int, length: int, dtype: str) -> RunConfig:
    return resolve(
        {
            "data": {"sequence_length": length, "tokenizer": {"name": "raw_bytes"}},
            "optimizer": {"name": "adamw"},
            "schedule": {"name": "constant"},
            "train": {"num_steps": 10**6, "batch_size": batch, "compute_dtype": dtype},
            **sections,
        }
    )


def random_batch(
    spec: Mapping[str, jax.ShapeDtypeStruct], vocab_size: int = VOCAB
) -> dict[str, np.ndarray]:
    """Values for every key that an objective may have: one document a row, every position a target."""
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if name.endswith("positions"):
            return np.broadcast_to(np.arange(shape[1], dtype=dtype), shape)
        if name.endswith("segment_ids") or dtype == np.float32:
            return np.ones(shape, dtype)
        high = vocab_size if name.endswith(("tokens", "targets")) else 2
        return rng.integers(0, high, shape).astype(dtype)

    return {name: values(name, s.shape, s.dtype) for name, s in spec.items()}


def stepper(run: RunConfig) -> tuple[Callable[[], None], float]:
    """Runs a step and waits; and its model FLOPs."""
    program = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = to_global_batch(random_batch(program.batch_spec), program.rules, run.train.batch_size)
    compiled = program.lower().compile()
    state = program.init(jax.random.key(0))

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    tokens = run.train.batch_size * run.data.sequence_length
    return step, tokens * flops_per_token(run, causal_half=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--embed", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    measure.json_flag(parser)
    flags = parser.parse_args()
    rows, found = [], []
    for dtype in flags.dtype.split(","):
        make = functools.partial(run_of, batch=flags.batch, length=flags.length, dtype=dtype)
        sections = families(flags.embed, flags.layers, flags.length)
        steps = {name: stepper(make(part)) for name, part in sections.items()}
        seconds = measure.interleaved({n: step for n, (step, _) in steps.items()}, flags.rounds)
        rates = {name: flops / seconds[name] for name, (_, flops) in steps.items()}
        for name, rate in rates.items():
            ratio = rate / rates["gpt"]
            rows.append((f"{dtype} {name}", 1e3 * seconds[name], rate / 1e9, ratio))
            found.append({"dtype": dtype, "family": name, "seconds": seconds[name], "flops_per_s": rate,
                          "of_gpt": ratio})  # fmt: skip
    about = measure.machine()
    measure.show(
        "a training step of each family", ("family", "ms", "GFLOP/s", "of gpt"), rows, about
    )
    measure.write_json(flags.json, {"steps": found, "machine": about})


if __name__ == "__main__":
    main()
