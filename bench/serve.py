"""32 streams over HTTP beside the same engine without a server, on this machine.

Both sides complete the same number of prompts, 32 at a time, with the model of bench/generation.py: the
server for 32 clients that each send the next request when one is answered, the engine for one list of
prompts. Their runs alternate, so that a busy machine slows both, and the ratio is that of medians. Server
and clients share the machine's cores with the model, as they do nowhere else: the clients read bytes and
nothing more.

    python -m bench.serve [--sampled] [--logprobs N] [--json FILE]
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from bench.generation import VOCAB_SIZE, NoText, make_model
from bench.measure import interleaved, json_flag, machine, show, write_json
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig

STREAMS, REQUESTS_EACH, PROMPT_LENGTH, NEW_TOKENS, ROUNDS = 32, 3, 32, 128, 5
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


class Tokens(NoText):
    """Ids that differ in their text, so that what the server writes is as long as real text."""

    def __init__(self):
        super().__init__()
        self._piece_bytes = [f" w{i}".encode() for i in range(VOCAB_SIZE)]


@dataclasses.dataclass
class Latencies:
    """Seconds, of all requests of a round: to the first token, and between what came later."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)


def serve() -> None:
    """The server's process: the model of the benchmark in place of a checkpoint's."""
    from llm_jax.serve.load import About, Served
    from llm_jax.serve.run import run, take_port
    from llm_jax.serve.settings import ServeConfig
    from llm_jax.serve.start import loop_factory, make_service

    async def main() -> None:
        config = ServeConfig(port=0, num_slots=STREAMS)
        served = Served(make_model(), Tokens(), About("bench", 0, 0), None)
        with take_port(config) as listening:
            service = await make_service(served, config, "none")
            await run(service, listening, lambda line: print(line, flush=True))

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


def offline(prompts: Callable[[], list[list[int]]], sampling: dict) -> Callable[[], None]:
    engine = Engine(make_model(), Tokens(), num_slots=STREAMS)
    config = SamplingConfig(**sampling, max_tokens=NEW_TOKENS)

    def run() -> None:
        done = engine.generate(prompts(), config)
        assert all(len(completion.tokens) == NEW_TOKENS for completion in done)

    return run


def served(
    port: int, prompts: Callable[[], list[list[int]]], fields: dict, rounds: list[Latencies]
) -> Callable[[], None]:
    async def client(bodies: list[bytes]) -> None:
        latencies = rounds[-1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        for body in bodies:
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            last = time.perf_counter()
            writer.write(head.encode() + body)
            await reader.readuntil(b"\r\n\r\n")
            tail, first = b"", True
            while not tail.endswith(b"0\r\n\r\n"):
                part = await reader.read(1 << 16)
                now = time.perf_counter()
                (latencies.first if first else latencies.between).append(now - last)
                tail, last, first = (tail + part)[-400:], now, False
            (count,) = re.findall(rb'"completion_tokens":(\d+)', tail)
            assert int(count) == NEW_TOKENS, tail
        writer.close()

    async def all_clients() -> None:
        rounds.append(Latencies())
        bodies = [
            json.dumps(
                {"prompt": prompt, "max_tokens": NEW_TOKENS, "stream": True,
                 "stream_options": {"include_usage": True}, **fields}
            ).encode()
            for prompt in prompts()
        ]  # fmt: skip
        await asyncio.gather(*(client(bodies[i::STREAMS]) for i in range(STREAMS)))

    return lambda: asyncio.run(all_clients())


def start_server() -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.serve", "--serve"], stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline().rsplit(":", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    json_flag(parser)
    parser.add_argument(
        "--sampled", action="store_true", help="temperature 0.8, top_p 0.95 instead of greedy"
    )
    parser.add_argument("--logprobs", type=int, help="ask the server for so many alternatives")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    about = {"load_before": os.getloadavg()[0], "cores": os.cpu_count(), **machine()}
    seeds = itertools.count()  # no prompt twice: keys of earlier ones are kept

    def prompts() -> list[list[int]]:
        rng = np.random.default_rng(next(seeds))
        shape = (STREAMS * REQUESTS_EACH, PROMPT_LENGTH)
        return rng.integers(1, VOCAB_SIZE, shape).tolist()

    sampling = SAMPLED if arguments.sampled else {"temperature": 0.0}
    fields = (
        sampling if arguments.logprobs is None else {**sampling, "logprobs": arguments.logprobs}
    )
    rounds: list[Latencies] = []
    process, port = start_server()
    try:
        contenders = {
            "offline": offline(prompts, sampling),
            "served": served(port, prompts, fields, rounds),
        }
        medians = interleaved(contenders, ROUNDS)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    tokens = STREAMS * REQUESTS_EACH * NEW_TOKENS
    rates = {name: tokens / seconds for name, seconds in medians.items()}
    counted = rounds[1:]  # the first one compiles
    first = np.percentile([x for r in counted for x in r.first], (50, 99)) * 1e3
    between = np.percentile([x for r in counted for x in r.between], (50, 99)) * 1e3
    row = {
        "offline": rates["offline"], "served": rates["served"], "ratio": rates["served"] / rates["offline"],
        "first_p50_ms": first[0], "first_p99_ms": first[1], "between_p50_ms": between[0], "between_p99_ms": between[1],
    }  # fmt: skip
    method = "top_p 0.95" if arguments.sampled else "greedy"
    columns = ("method", "engine, tokens/s", "served, tokens/s", "ratio", "first token p50, ms", "p99", "between p50, ms", "p99")  # fmt: skip
    title = f"{STREAMS} streams, 14M parameters, float32, {PROMPT_LENGTH} + {NEW_TOKENS} tokens"
    show(title, columns, [[method, *row.values()]], about)
    write_json(arguments.json, {"machine": about, "method": method, **row})


if __name__ == "__main__":
    main()
