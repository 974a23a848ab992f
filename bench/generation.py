"""Tokens per second of generation, ours beside Hugging Face's `generate`, on this CPU.

GPT-2's architecture with random weights, float32, greedy, prompts of 32 tokens, 128 new tokens. Both
sides get both cores; their runs alternate, so that a busy machine slows both, and the median of three
counts. One run of each, which compiles, comes before the clock. The matmul rate of the machine stands
beside the table, so that numbers from different days can be compared.

A second table is of many requests at once: prompts of 16 to 256 tokens, texts of 32 to 192, every fourth of
them drawn in another way, through 16 and 32 slots, beside the same requests in batches that wait for their longest.

    python -m bench.generation [--sampled] [--json FILE]
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from bench.measure import interleaved, json_flag, machine, show, write_json
from llm_jax.data.tokenizers.pieces import PieceTokenizer
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.models.gpt import GPT, Config, make
from llm_jax.nn.precision import Precision

Generate = Callable[[np.ndarray, SamplingConfig], None]

VOCAB_SIZE, LAYERS, EMBED_DIM, HEADS, MAX_LENGTH = 8192, 6, 384, 6, 1024
PROMPT_LENGTH, NEW_TOKENS, REPEATS = 32, 128, 3
NUM_REQUESTS = 64


class NoText(PieceTokenizer):
    """8192 ids without an end, as the other side has none: every row runs to its last token."""

    name = "no_text"

    def __init__(self):
        super().__init__([b"x"] * VOCAB_SIZE, {}, bos_id=0, eos_id=-1, pad_id=0)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("prompts of the benchmark are ids")

    encode_batch = save_huggingface = encode


def make_model() -> GPT:
    config = Config(
        vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, num_layers=LAYERS, num_heads=HEADS,
        max_length=MAX_LENGTH, norm="layernorm", norm_bias=True, position="learned",
        activation="gelu_tanh", gated=False, attention_bias=True, attention_out_bias=True,
        mlp_bias=True, tie_embeddings=True,
    )  # fmt: skip
    return make(config, precision=Precision(), rngs=nnx.Rngs(0))


def make_engine(num_slots: int) -> Engine:
    # Runs are repeated: prompts must not be found in the store.
    return Engine(make_model(), NoText(), num_slots=num_slots, prefix_tokens=0)


def ours() -> Generate:
    engine = make_engine(16)

    def run(prompts: np.ndarray, config: SamplingConfig) -> None:
        done = engine.generate(prompts.tolist(), config)
        assert all(len(completion.tokens) == NEW_TOKENS for completion in done)

    return run


def hugging_face() -> Generate:
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


def measure(
    batch_size: int, config: SamplingConfig, sides: Mapping[str, Generate]
) -> dict[str, float]:
    """Tokens per second of each side, all rows together."""
    prompts = np.random.default_rng(0).integers(1, VOCAB_SIZE, (batch_size, PROMPT_LENGTH))
    contenders = {
        name: functools.partial(generate, prompts, config) for name, generate in sides.items()
    }
    medians = interleaved(contenders, REPEATS)
    return {name: batch_size * NEW_TOKENS / seconds for name, seconds in medians.items()}


def many_requests() -> list[tuple[list[int], SamplingConfig]]:
    rng = np.random.default_rng(0)
    ways = (
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    return [
        (rng.integers(1, VOCAB_SIZE, rng.integers(16, 257)).tolist(),
         SamplingConfig(**ways[n % 4], seed=n, max_tokens=int(rng.integers(32, 193))))
        for n in range(NUM_REQUESTS)
    ]  # fmt: skip


def serve(engine: Engine, requests, together: int) -> None:
    """All requests, `together` of them submitted at a time, which must end before the next come."""
    for first in range(0, len(requests), together):
        for prompt, config in requests[first : first + together]:
            engine.submit(prompt, config)
        while engine.has_work:
            engine.step()


def measure_serving() -> list[dict]:
    """New tokens per second: one queue for all, beside batches as large as there are slots."""
    requests = many_requests()
    tokens = sum(config.max_tokens for _, config in requests)
    contenders = {}
    for num_slots, together in itertools.product((16, 32), ("queue", "batches")):
        engine, most = make_engine(num_slots), len(requests) if together == "queue" else num_slots
        contenders[num_slots, together] = functools.partial(serve, engine, requests, most)
    medians = interleaved(contenders, REPEATS)
    return [
        {"slots": slots, **{t: tokens / medians[slots, t] for t in ("queue", "batches")}}
        for slots in (16, 32)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    json_flag(parser)
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95 too")
    arguments = parser.parse_args()
    about = {"load_before": os.getloadavg()[0], "cores": os.cpu_count(), **machine()}
    methods = {"greedy": SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS)}
    if arguments.sampled:
        methods["top_p 0.95"] = SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=NEW_TOKENS)
    sides = {"ours": ours(), "hugging_face": hugging_face()}
    rows = []
    for method, config in methods.items():
        for batch_size in (1, 16):
            rates = measure(batch_size, config, sides)
            ratio = rates["ours"] / rates["hugging_face"]
            rows.append({"method": method, "batch_size": batch_size, **rates, "ratio": ratio})
    columns = ("method", "batch", "ours, tokens/s", "Hugging Face, tokens/s", "ratio")
    title = "Generation, 14M parameters, float32, 32 + 128 tokens"
    show(title, columns, [list(row.values()) for row in rows], about)
    serving = measure_serving()
    title = f"{NUM_REQUESTS} requests of mixed lengths and ways of drawing, new tokens/s"
    show(title, ("slots", "one queue", "batches"), [list(row.values()) for row in serving], about)
    write_json(arguments.json, {"machine": about, "results": rows, "serving": serving})


if __name__ == "__main__":
    main()
