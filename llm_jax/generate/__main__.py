"""Completes prompts with a trained model: `python -m llm_jax.generate --workdir DIR --prompt TEXT`.

An encoder-decoder answers the prompt instead. The text goes to standard output as it comes, notes go to standard error.
"""

import argparse
import sys
from pathlib import Path

from llm_jax.checkpoint.load import load_model
from llm_jax.core import flags
from llm_jax.core.config import ConfigError
from llm_jax.generate.beam import BeamConfig, Hypothesis
from llm_jax.generate.engine import Engine
from llm_jax.generate.sampler import SamplingConfig
from llm_jax.generate.show import Printer
from llm_jax.sharding import xla_flags

NUM_ALTERNATIVES = 5


def main() -> None:
    arguments = flags.parse(parser())
    check_beams(arguments)
    xla_flags.apply()
    config = SamplingConfig(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    loaded = load_model(arguments.workdir, arguments.step)
    engine = Engine(loaded.model, loaded.tokenizer)
    if arguments.num_beams is not None:
        # As texts that are drawn, those of beams end where the model does.
        room = min(engine.room(engine.prompt_tokens(prompt)) for prompt in prompts)
        max_tokens = max(1, min(arguments.max_tokens, room))
        penalty = 1.0 if arguments.length_penalty is None else arguments.length_penalty
        beams = BeamConfig(arguments.num_beams, penalty, max_tokens=max_tokens)
        print_best(prompts, engine.beam_search(prompts, beams))
        return
    show = arguments.show_probabilities
    events = engine.stream(prompts, config, top_alternatives=NUM_ALTERNATIVES if show else 0)
    # What an encoder reads is not the beginning of what the decoder writes.
    shown = [f"{prompt}\t" for prompt in prompts] if engine.has_encoder else prompts
    printer = Printer(shown, loaded.tokenizer if show else None, engine.max_length)
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
    p.add_argument("--min_p", type=float,
                   help="draw from the tokens at least so probable, in shares of the first")  # fmt: skip
    p.add_argument("--repetition_penalty", type=float, default=1.0,
                   help="above 1: tokens of prompt and text become less probable; default: 1")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_beams", type=int,
                   help="search for the most probable text with so many beams, instead of drawing one")  # fmt: skip
    p.add_argument("--length_penalty", type=float,
                   help="of beams: above 0 favours longer texts; default: 1")  # fmt: skip
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


def check_beams(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that would have no effect."""
    if arguments.num_beams is None and arguments.length_penalty is not None:
        raise ConfigError("--length_penalty is of beams: set --num_beams, too")
    if arguments.num_beams is not None and arguments.show_probabilities:
        raise ConfigError(
            "--show_probabilities shows tokens as they are drawn: leave out --num_beams"
        )


def print_best(prompts: list[str], found: list[list[Hypothesis]]) -> None:
    """The best text of each prompt; where there are several prompts, behind the prompt."""
    for prompt, hypotheses in zip(prompts, found, strict=True):
        best = hypotheses[0]
        print(f"{prompt}\t{best.text}" if len(prompts) > 1 else best.text)
        print(f"score {best.score:.3f}", file=sys.stderr)


if __name__ == "__main__":
    flags.run_entry(main)
