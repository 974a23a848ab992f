"""Tokens per second of generation, ours beside Hugging Face's `generate`, on this CPU.

GPT-2's architecture with random weights, float32, greedy, prompts of 32 tokens, 128 new tokens. Both
sides get both cores; their runs alternate, so that a busy machine slows both, and the median of three
counts. One run of each, which compiles, comes before the clock. The matmul rate of the machine stands
beside the table, so that numbers from different days can be compared.

    python -m bench.generation [--json FILE]
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.data.tokenizers.pieces import PieceTokenizer
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.models.gpt import Config, make
from llm_jax.nn.precision import Precision

VOCAB_SIZE, LAYERS, EMBED_DIM, HEADS, MAX_LENGTH = 8192, 6, 384, 6, 1024
PROMPT_LENGTH, NEW_TOKENS, REPEATS = 32, 128, 3


class NoText(PieceTokenizer):
    """8192 ids without an end, as the other side has none: every row runs to its last token."""

    name = "no_text"

    def __init__(self):
        super().__init__([b"x"] * VOCAB_SIZE, {}, bos_id=0, eos_id=-1, pad_id=0)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("prompts of the benchmark are ids")

    encode_batch = save_huggingface = encode


@dataclasses.dataclass(frozen=True)
class Result:
    """tokens_per_second: of all rows together."""

    batch_size: int
    method: str
    ours: float
    hugging_face: float

    @property
    def ratio(self) -> float:
        return self.ours / self.hugging_face


def ours() -> Callable[[np.ndarray, SamplingConfig], None]:
    config = Config(
        vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, num_layers=LAYERS, num_heads=HEADS,
        max_length=MAX_LENGTH, norm="layernorm", norm_bias=True, position="learned",
        activation="gelu_tanh", gated=False, attention_bias=True, attention_out_bias=True,
        mlp_bias=True, tie_embeddings=True,
    )  # fmt: skip
    engine = Engine(make(config, precision=Precision(), rngs=nnx.Rngs(0)), NoText())

    def run(prompts: np.ndarray, config: SamplingConfig) -> None:
        done = engine.generate(prompts.tolist(), config)
        assert all(len(completion.tokens) == NEW_TOKENS for completion in done)

    return run


def hugging_face() -> Callable[[np.ndarray, SamplingConfig], None]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(os.cpu_count())
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=MAX_LENGTH, n_embd=EMBED_DIM, n_layer=LAYERS,
        n_head=HEADS, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()

    def run(prompts: np.ndarray, config: SamplingConfig) -> None:
        ids = torch.from_numpy(prompts)
        drawn = {"do_sample": False}
        if config.temperature:
            drawn = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p,
                     "top_k": 0}  # fmt: skip
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                use_cache=True, **drawn,
            )  # fmt: skip
        assert out.shape[1] == PROMPT_LENGTH + NEW_TOKENS

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matmul_gflops() -> float:
    """The best of 20 products of [1024, 1024] in float32."""
    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    best = min(seconds(lambda: product(x).block_until_ready()) for _ in range(20))
    return 2 * 1024**3 / best / 1e9


def measure(batch_size: int, config: SamplingConfig, sides: list[Callable]) -> Result:
    prompts = np.random.default_rng(0).integers(1, VOCAB_SIZE, (batch_size, PROMPT_LENGTH))
    for side in sides:
        side(prompts, config)
    times = [[seconds(lambda s=side: s(prompts, config)) for side in sides] for _ in range(REPEATS)]
    rates = [
        batch_size * NEW_TOKENS / statistics.median(column)
        for column in zip(*times, strict=True)
    ]  # fmt: skip
    return Result(batch_size, "greedy" if config.temperature == 0 else "top_p 0.95", *rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the results there")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95 too")
    arguments = parser.parse_args()
    sides = [ours(), hugging_face()]
    load, gflops = os.getloadavg()[0], matmul_gflops()
    print(f"{os.cpu_count()} cores, matmul {gflops:.0f} GFLOP/s, load before {load:.1f}")
    print(f"{'batch':>5}  {'method':<10}  {'ours tok/s':>10}  {'HF tok/s':>10}  {'ratio':>5}")
    configs = [SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS)]
    if arguments.sampled:
        configs.append(SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=NEW_TOKENS))
    results = []
    for config in configs:
        for batch_size in (1, 16):
            result = measure(batch_size, config, sides)
            results.append(dataclasses.asdict(result) | {"ratio": result.ratio})
            print(f"{result.batch_size:>5}  {result.method:<10}  {result.ours:>10.1f}  "
                  f"{result.hugging_face:>10.1f}  {result.ratio:>5.2f}", flush=True)  # fmt: skip
    if arguments.json:
        report = {"matmul_gflops": gflops, "load_before": load, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
