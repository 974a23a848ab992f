"""A program that answers for an export, in a process without llm_jax: `python -I -B witness.py KIND FOLDER`.

KIND is a function of this file's end. It reads arrays from standard input and writes an array for each to
standard output, each as eight bytes with the size of a .npy file and that file; first, when all is
loaded, an empty array. Packages other than those of KIND cannot be imported.
"""

import io
import json
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

    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer

    def write(array):
        file = io.BytesIO()
        np.save(file, array)
        stdout.write(len(file.getvalue()).to_bytes(8, "little") + file.getvalue())
        stdout.flush()

    write(np.zeros(0))
    while size := stdin.read(8):
        write(answer(np.load(io.BytesIO(stdin.read(int.from_bytes(size, "little"))))))


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

    serve(lambda tokens: np.stack([logits(row) for row in tokens.tolist()]))


def bundle_tokenizer(folder):
    """A JSON list of texts, as its bytes, to one of lists of ids."""
    sys.meta_path.insert(0, Only(numpy_alone))
    import numpy as np

    run = runpy.run_path(str(folder / "run.py"))
    tokenizer = run["Tokenizer"](run["load"](folder / "model.safetensors"))

    def encode(data):
        ids = [tokenizer.encode(text) for text in json.loads(data.tobytes())]
        return np.frombuffer(json.dumps(ids).encode(), np.uint8)

    serve(encode)


def stablehlo(folder):
    """tokens [B, T] to logits [B, T, V]: of `forward`, then `prefill` behind some padding, then `decode`."""
    sys.meta_path.insert(0, Only(lambda package: package not in ("llm_jax", "flax")))
    import numpy as np

    run = runpy.run_path(str(folder / "run.py"))
    forward, prefill, decode = map(run["load"], ("forward", "prefill", "decode"))
    params = run["load_params"]()

    def logits(tokens):
        batch, length = tokens.shape
        half, pad = (length + 1) // 2, 3
        padding = np.full(batch, pad, np.int32)
        cache = run["empty_cache"](batch, pad + length)
        parts = [np.asarray(forward(params, tokens[:, :half]))[:, :-1]]
        padded = np.pad(tokens[:, :half], ((0, 0), (pad, 0)))
        last, cache = prefill(params, padded, padding, cache)
        parts.append(np.asarray(last)[:, None])
        for i in range(half, length):
            last, cache = decode(params, tokens[:, i], padding, np.int32(pad + i), cache)
            parts.append(np.asarray(last)[:, None])
        return np.concatenate(parts, axis=1)

    serve(logits)


if __name__ == "__main__":
    kind, path, *packages = sys.argv[1:]
    sys.path.extend(packages)
    {"bundle": bundle, "bundle_tokenizer": bundle_tokenizer, "stablehlo": stablehlo}[kind](
        Path(path)
    )
