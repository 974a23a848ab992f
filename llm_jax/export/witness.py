"""A program that answers for an export, in a process without llm_jax: `python -I -B witness.py KIND FOLDER`.

KIND is a function of this file. It reads arrays by name from standard input and answers with arrays by
name on standard output, each time as eight bytes with the size of an .npz file and that file; first, when
all is loaded, with none. Packages other than those of KIND cannot be imported.
"""

import io
import json
import os
import runpy
import sys
from pathlib import Path


class Only:
    """An import hook that refuses packages; `allowed` tells of each name whether it may be imported."""

    def __init__(self, allowed):
        self.allowed = allowed

    def find_spec(self, name, path=None, target=None):
        if not self.allowed(name.partition(".")[0]):
            raise ImportError(f"{name} must not be imported")


def numpy_alone(package):
    return package == "numpy" or package in sys.stdlib_module_names


def serve(answer):
    """Answers until standard input ends."""
    import numpy as np

    stdin = sys.stdin.buffer

    def write(arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        answers.write(len(file.getvalue()).to_bytes(8, "little") + file.getvalue())
        answers.flush()

    write({})
    while size := stdin.read(8):
        data = stdin.read(int.from_bytes(size, "little"))
        write(answer(**np.load(io.BytesIO(data))))


def bundle(folder):
    """tokens [B, T] to logits [B, T, V]: the first half at once, the rest token by token."""
    sys.meta_path.insert(0, Only(numpy_alone))
    import numpy as np

    run = runpy.run_path(str(folder / "run.py"))
    params = run["load"](folder / "model.safetensors")

    def logits(row):
        cache, half = run["empty_cache"](len(row)), (len(row) + 1) // 2
        parts = [run["forward"](params, row[:half], 0, cache)]
        parts += [run["forward"](params, [row[i]], i, cache) for i in range(half, len(row))]
        return run["logits"](params, np.concatenate(parts))

    serve(lambda tokens: {"logits": np.stack([logits(row) for row in tokens.tolist()])})


def bundle_tokenizer(folder):
    """texts, a JSON list as bytes, to ids, one of lists of ids."""
    sys.meta_path.insert(0, Only(numpy_alone))
    import numpy as np

    run = runpy.run_path(str(folder / "run.py"))
    tokenizer = run["Tokenizer"](run["load"](folder / "model.safetensors"))

    def encode(texts):
        ids = [tokenizer.encode(text) for text in json.loads(texts.tobytes())]
        return {"ids": np.frombuffer(json.dumps(ids).encode(), np.uint8)}

    serve(encode)


def stablehlo(folder):
    """What the model gives for a batch: of `forward`, and for half of each row of what generates for it."""
    sys.meta_path.insert(0, Only(lambda package: package not in ("llm_jax", "flax")))
    import numpy as np

    run = runpy.run_path(str(folder / "run.py"))
    functions = {path.stem: run["load"](path.stem) for path in folder.glob("*.stablehlo")}
    params = run["load_params"]()
    forward, prefill, encode, decode = (
        functions.get(name) for name in ("forward", "prefill", "encode", "decode")
    )

    def of_encoder(tokens):
        length = np.full(len(tokens), tokens.shape[1], np.int32)
        return forward(params, tokens, np.zeros_like(tokens), length)

    def of_decoder(tokens):
        batch, length = tokens.shape
        half = (length + 1) // 2
        pad = min(3, run["MAX_LENGTH"] - half)
        padding, cache = np.full(batch, pad, np.int32), run["empty_cache"](batch, pad + length)
        parts = [np.asarray(forward(params, tokens[:, :half]))[:, :-1]]
        padded = np.pad(tokens[:, :half], ((0, 0), (pad, 0)))
        last, cache = prefill(params, padded, padding, cache)
        parts.append(np.asarray(last)[:, None])
        for i in range(half, length):
            last, cache = decode(params, tokens[:, i], padding, np.int32(pad + i), cache)
            parts.append(np.asarray(last)[:, None])
        return {"logits": np.concatenate(parts, axis=1)}

    def of_encoder_decoder(tokens, encoder_tokens):
        batch, length = tokens.shape
        half, lengths = length // 2, np.full(batch, encoder_tokens.shape[1], np.int32)
        pad = min(2, run["MAX_LENGTH"] - encoder_tokens.shape[1])
        padded = np.pad(encoder_tokens, ((0, 0), (0, pad)))
        parts = [np.asarray(forward(params, padded, lengths, tokens))[:, :half]]
        memory, cache = encode(params, padded, lengths), run["empty_cache"](batch, length)
        for i in range(length):
            last, cache = decode(params, tokens[:, i], np.int32(i), lengths, memory, cache)
            parts += [np.asarray(last)[:, None]] if i >= half else []
        return {"logits": np.concatenate(parts, axis=1)}

    serve(of_decoder if prefill else of_encoder_decoder if encode else of_encoder)


if __name__ == "__main__":
    # What an export itself prints goes to standard error: answers have standard output for themselves.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    kind, path, *packages = sys.argv[1:]
    sys.path.extend(packages)
    {"bundle": bundle, "bundle_tokenizer": bundle_tokenizer, "stablehlo": stablehlo}[kind](
        Path(path)
    )
