"""How fast objectives make their batches on one core, against what reads them.

    python -m bench.objectives [--rounds 50] [--json FILE]

Rows are the interpreter's standard library in 4096 pieces, packed as the loader packs them. Tokens are
positions that the model reads (of the encoder, where there is one). What a batch takes besides the
transforms is in bench/loader.py.
"""

import argparse
import sysconfig
from pathlib import Path

import numpy as np

from bench import measure
from llm_jax.core.types import Objective, Tokenizer
from llm_jax.data.tokenizers import make_tokenizer, sentencepiece
from llm_jax.objectives import causal_lm, masked_lm, prefix_lm, span_corruption

LENGTHS = (128, 512, 2048)
TOKENS_PER_BATCH = 16384
PIECES, SENTINELS = 4096, 520
ENOUGH = 5  # times what the device reads


def objectives() -> dict[str, Objective]:
    masked = lambda **c: masked_lm.make(masked_lm.Config(**c))  # noqa: E731
    spans = lambda **c: span_corruption.make(span_corruption.Config(**c))  # noqa: E731
    return {
        "causal_lm": causal_lm.make(causal_lm.Config()),
        "prefix_lm": prefix_lm.make(prefix_lm.Config()),
        "masked_lm": masked(),
        "masked_lm, whole words": masked(whole_word=True),
        "masked_lm, next_sentence": masked(pairs="next_sentence"),
        "masked_lm, sentence_order": masked(pairs="sentence_order"),
        "span_corruption": spans(),
        "span_corruption, UL2": spans(denoisers=span_corruption.UL2),
    }


def corpus() -> tuple[Tokenizer, np.ndarray]:
    """A tokenizer with all the special tokens, and the library's documents in one array."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    extra = ["[MASK]", "[NLU]", "[NLG]", "[S2S]", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    config = sentencepiece.Config(
        vocab_size=PIECES + len(extra), training_bytes=4_000_000, extra_tokens=tuple(extra)
    )
    tokenizer = make_tokenizer(config, lambda: texts)
    ids = [[tokenizer.bos_id, *x, tokenizer.eos_id] for x in tokenizer.encode_batch(texts)]
    return tokenizer, np.concatenate([np.array(x, np.int32) for x in ids])


def rows(tokens: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return tokens[starts[:, None] + np.arange(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    measure.json_flag(parser)
    flags = parser.parse_args()
    tokenizer, tokens = corpus()
    table, results = [], []
    for length in LENGTHS:
        contenders, count = {}, TOKENS_PER_BATCH // length
        for name, objective in objectives().items():
            width = objective.row_length(length)
            element = {"rows": rows(tokens, width, count, 0), "row_ids": np.arange(count)}
            if objective.partner_rows:
                element["partners"] = rows(tokens, width, count, 1)
            (transform,) = objective.transforms(tokenizer)
            contenders[name] = lambda t=transform, e=element: t.map(dict(e))
        seconds = measure.interleaved(contenders, flags.rounds)
        for name, each in seconds.items():
            rate = TOKENS_PER_BATCH / each
            table.append([name, length, rate / 1e6, rate / length, rate / ENOUGH / 1e6])
            results.append({"objective": name, "length": length, "tokens_per_second": round(rate)})
    columns = [
        "transforms", "positions", "million tokens/s", "rows/s", f"1/{ENOUGH}: device, million/s"
    ]  # fmt: skip
    measure.show("One core", columns, table, measure.machine())
    measure.write_json(flags.json, {"machine": measure.machine(), "results": results})


if __name__ == "__main__":
    main()
