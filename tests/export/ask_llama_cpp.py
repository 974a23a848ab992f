"""Asks llama.cpp: `PYTHON ask_llama_cpp.py MODEL.gguf < questions > answers`, both JSON.

Run by the interpreter that has llama_cpp, which needs nothing of ours. Questions: `texts` to tokenize, `rows`
of ids to give logits for, `prompts` (ids) to go on from greedily for `count` ids. Keys and values are kept in
float32, as everything else is.
"""

import contextlib
import json
import os
import sys

import llama_cpp
import numpy as np

FLOAT32 = 0  # GGML_TYPE_F32


def main() -> None:
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(
        sys.argv[1], n_ctx=asked["length"], n_batch=asked["length"], n_ubatch=asked["length"],
        logits_all=True, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, n_threads=1,
        verbose=False,
    )  # fmt: skip
    answers = {
        "tokens": [model.tokenize(text.encode(), add_bos=False) for text in asked["texts"]],
        "with_bos": model.tokenize(b"", add_bos=True),
        "texts": [model.detokenize(row).decode(errors="replace") for row in asked["rows"]],
        "logits": [logits(model, row).tolist() for row in asked["rows"]],
        "greedy": [greedy(model, row, asked["count"]) for row in asked["prompts"]],
        "context_length": int(
            model.metadata[f"{model.metadata['general.architecture']}.context_length"]
        ),
    }
    json.dump(answers, sys.stdout)


def logits(model, row) -> np.ndarray:
    """[T, V] float32."""
    model.reset()
    model.eval(row)
    return np.array(model.scores[: len(row)])


def greedy(model, row, count) -> list[int]:
    model.reset()
    model.eval(row)
    ids = []
    for _ in range(count):
        ids.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(ids[-1:])
    return ids


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        main()
