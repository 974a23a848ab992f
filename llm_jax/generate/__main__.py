"""Completes prompts with a trained model: `python -m llm_jax.generate --workdir DIR --prompt TEXT`.

The text goes to standard output as it comes, notes go to standard error.
"""

import argparse
from pathlib import Path

from llm_jax.checkpoint.load import load_model
from llm_jax.core import flags
from llm_jax.core.config import ConfigError
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.generate.show import Printer
from llm_jax.sharding import xla_flags

NUM_ALTERNATIVES = 5


def main() -> None:
    arguments = flags.parse(parser())
    xla_flags.apply()
    config = SamplingConfig(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    loaded = load_model(arguments.workdir, arguments.step)
    engine = Engine(loaded.model, loaded.tokenizer)
    show = arguments.show_probabilities
    events = engine.stream(prompts, config, top_alternatives=NUM_ALTERNATIVES if show else 0)
    printer = Printer(prompts, loaded.tokenizer if show else None, engine.max_length)
    for event in events:
        printer(event)


def parser() -> argparse.ArgumentParser:
    p = flags.make_parser("generate", "Completes prompts with a trained model.", config=False)
    p.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                   help="may be repeated; none at all starts a document from nothing")  # fmt: skip
    p.add_argument("--prompt_file", action="append", default=[], type=Path, metavar="FILE",
                   help="a file whose whole text is one prompt; may be repeated")  # fmt: skip
    p.add_argument("--max_tokens", type=int, default=200, help="new tokens per prompt")
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy; default: 0.8")
    p.add_argument("--top_p", type=float, default=0.95,
                   help="draw from the fewest tokens that reach this probability; default: 0.95")  # fmt: skip
    p.add_argument("--top_k", type=int, help="draw from the k most probable tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--show_probabilities", action="store_true",
                   help=f"one line per token, with the {NUM_ALTERNATIVES} most probable")  # fmt: skip
    return p


def read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    """All prompts, those of the command line first; one empty prompt where there is none."""
    prompts = list(texts)
    for file in files:
        try:
            prompts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ConfigError(f"--prompt_file {file} is not UTF-8 text") from None
    return prompts or [""]


if __name__ == "__main__":
    flags.run_entry(main)
