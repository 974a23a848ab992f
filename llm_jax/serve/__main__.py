"""Serves a model: `python -m llm_jax.serve --workdir DIR`, or `--hf FOLDER`; then open the address it prints."""

import argparse
import asyncio
import importlib.util
from pathlib import Path

from llm_jax.core import flags
from llm_jax.core.config import ConfigError
from llm_jax.sharding import xla_flags

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def main() -> None:
    arguments = flags.parse(parser())
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'serving needs {missing[0]}: pip install "llm_jax[serve]"')
    if (arguments.workdir is None) == (arguments.hf is None):
        raise ConfigError("expected one of --workdir DIR and --hf FOLDER")
    if arguments.hf is not None and arguments.step is not None:
        raise ConfigError("--step is of a run: it goes with --workdir")
    from llm_jax.serve import start

    xla_flags.apply()
    with asyncio.Runner(loop_factory=start.loop_factory()) as runner:
        runner.run(start.serve(arguments))


def parser() -> argparse.ArgumentParser:
    p = flags.make_parser(
        "serve", "Serves a model over HTTP, with a page.", config=False, workdir=False
    )
    p.add_argument("--workdir", type=Path, help="a run")
    p.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    p.add_argument("--hf", type=Path, metavar="FOLDER",
                   help="a Hugging Face folder with safetensors and tokenizer.json, instead of a run")  # fmt: skip
    p.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of --hf; a run has its own")  # fmt: skip
    p.add_argument("--name", help="what clients call the model; default: the folder's name")
    p.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    p.add_argument("--port", type=int, default=8000, help="0 takes any free one; default: 8000")
    p.add_argument("--allowed_host", action="append", default=[], metavar="NAME",
                   help="a name under which others reach this server; may be repeated")  # fmt: skip
    p.add_argument("--api_key_file", type=Path, metavar="FILE",
                   help="a file with the key that requests must bring; or set LLM_JAX_API_KEY")  # fmt: skip
    p.add_argument("--chat_template", default="auto",
                   choices=("auto", "built_in", "tokenizer", "plain", "none"),
                   help="layout of chats; default: the one the model was trained on, or none")  # fmt: skip
    p.add_argument(
        "--num_slots", type=int, default=16, help="completions that run together; default: 16"
    )
    p.add_argument("--max_queue", type=int, default=64, help="more that may wait; default: 64")
    p.add_argument(
        "--max_length", type=int, help="most tokens of prompt and completion; default: the model's"
    )
    p.add_argument(
        "--max_tokens", type=int, help="most new tokens of a completion; default: all that fit"
    )
    p.add_argument(
        "--max_body", type=int, default=1 << 20, help="bytes of a request; default: 1 MiB"
    )
    p.add_argument(
        "--timeout", type=float, default=600.0, help="seconds of a request; default: 600"
    )
    p.add_argument("--drain", type=float, default=30.0,
                   help="seconds that running requests have when the server is stopped; default: 30")  # fmt: skip
    return p


if __name__ == "__main__":
    flags.run_entry(main)
