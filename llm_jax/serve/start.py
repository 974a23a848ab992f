"""From flags to a running server."""

import argparse
import asyncio
import functools
import importlib.util
from collections.abc import Callable

from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.serve.chats import make_chats
from llm_jax.serve.insight import Insight
from llm_jax.serve.load import Served, from_hf, from_run
from llm_jax.serve.page_stream import NUM_ALTERNATIVES
from llm_jax.serve.run import quiet_logs, run, take_port
from llm_jax.serve.service import Service
from llm_jax.serve.settings import ServeConfig, read_api_key
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Worker


async def serve(arguments: argparse.Namespace) -> None:
    """Loads, listens, and returns when the server was stopped."""
    quiet_logs()
    config = config_of(arguments)
    with take_port(config) as listening:
        if arguments.hf is not None:
            served = from_hf(arguments.hf, arguments.compute_dtype, arguments.name)
        else:
            served = from_run(arguments.workdir, arguments.step, arguments.name)
        await run(await make_service(served, config, arguments.chat_template), listening, _say)


def config_of(arguments: argparse.Namespace) -> ServeConfig:
    names = ("host", "port", "num_slots", "max_queue", "max_length", "max_tokens", "max_body",
             "timeout", "drain")  # fmt: skip
    return ServeConfig(
        **{name: getattr(arguments, name) for name in names},
        allowed_hosts=tuple(arguments.allowed_host),
        api_key=read_api_key(arguments.api_key_file),
    )


async def make_service(served: Served, config: ServeConfig, layout: str) -> Service:
    """Everything behind the endpoints; its worker has started."""
    chats = make_chats(layout, served.tokenizer, served.objective)
    make_engine = functools.partial(_warm_engine, served, config)
    worker = Worker(make_engine, max_queue=config.max_queue, timeout=config.timeout)
    await worker.start()
    vocabulary = Vocabulary(served.tokenizer)
    insight = Insight(served.model, vocabulary)
    if not served.about.has_encoder:
        insight.warm(served.tokenizer.bos_id)
    return Service(config, served.about, worker, vocabulary, insight, chats)


def _warm_engine(served: Served, config: ServeConfig) -> Engine:
    """An engine that has compiled what the first requests need: those of the page, and OpenAI's default."""
    engine = Engine(
        served.model, served.tokenizer, max_length=config.max_length, num_slots=config.num_slots
    )
    best = min(NUM_ALTERNATIVES, served.tokenizer.vocab_size)
    page = SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=3)
    plain = SamplingConfig(max_tokens=3)
    # Prompts of two sizes; the longer one leaves keys for others that begin with it.
    for size, sampling, alternatives in ((10, page, best), (40, plain, 0)):
        prompt = [served.tokenizer.bos_id] * min(size, engine.max_length - 1)
        engine.submit(prompt, sampling, top_alternatives=alternatives)
        while engine.has_work:
            engine.step()
    return engine


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where there is one."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def _say(line: str) -> None:
    print(line, flush=True)
