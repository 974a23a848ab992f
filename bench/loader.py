"""How fast batches are made, and how much memory that takes: `python bench/loader.py [--json FILE]`.

Speed is in packed tokens per second of CPU time of one core, which neighbours on the machine cannot
change, over the interpreter's standard library. `--memory 500MB` instead generates corpora of 10 MB
and of that size, prepares and reads them, and prints the peak resident memory of each.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np

from llm_jax.core.packing import next_token_batch
from llm_jax.data.config import DataConfig, resolve_data
from llm_jax.data.pipeline import make_loader
from llm_jax.data.prepare import Prepared, prepare
from llm_jax.data.progress import make_progress
from llm_jax.data.sources import open_source

_LENGTHS = (256, 1024, 4096)
_TOKENS_PER_BATCH = 16384
_UNITS = {"MB": 10**6, "GB": 10**9}


class NextToken(grain.transforms.Map):
    """The causal objective's half on the host; bench/ measures data/ alone."""

    examples = partner_rows = False

    def __init__(self, tokenizer):
        self._ids = tokenizer.bos_id, tokenizer.eos_id

    def row_length(self, sequence_length: int) -> int:
        return sequence_length + 1

    def transforms(self, tokenizer) -> list:
        return [self]

    def map(self, element):
        return next_token_batch(element["rows"], *self._ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--memory", metavar="SIZE", help="measure memory up to SIZE (500MB, 5GB)")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure_memory(*flags.measure)))
        return
    results = memory_table(_bytes(flags.memory)) if flags.memory else speed_table()
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


def speed_table() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        data = _stdlib_config()
        prepared = prepare(data, workdir, progress=make_progress())
        results = [_loader_speed(data, workdir, prepared, length) for length in _LENGTHS]
        results.append(_stream_speed(data, workdir, prepared))
    for result in results:
        print("  ".join(f"{key} {value:,}" for key, value in result.items()))
    return results


def _stdlib_config(**settings) -> DataConfig:
    tokenizer = {"name": "sentencepiece", "vocab_size": 4096, "training_bytes": 4e6}
    sources = [{"name": "text", "path": "python:stdlib"}]
    return resolve_data({"sources": sources, "tokenizer": tokenizer, "num_threads": 0} | settings)


def _loader_speed(data: DataConfig, workdir: Path, prepared: Prepared, length: int) -> dict:
    data = resolve_data(_section(data) | {"sequence_length": length})
    batch_size = _TOKENS_PER_BATCH // length
    loader = make_loader(
        data,
        workdir=workdir,
        tokenizer=prepared.tokenizer,
        objective=NextToken(prepared.tokenizer),
        batch_size=batch_size,
    )
    (index,) = prepared.indices
    tokens = np.concatenate([np.load(index.folder / s.file) for s in index.shards["train"]])
    random = np.random.default_rng(0)

    def gather():
        starts = random.integers(0, len(tokens) - length - 1, batch_size)
        return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)

    return {
        "sequence_length": length,
        "batch_size": batch_size,
        "loader": _rate(lambda: next(loader), _TOKENS_PER_BATCH),
        "numpy_gather": _rate(gather, _TOKENS_PER_BATCH),
    }


def _stream_speed(data: DataConfig, workdir: Path, prepared: Prepared) -> dict:
    """The same documents through the tokenizer alone and through the whole pipeline, in turns."""
    streamed = resolve_data(_section(data) | {"mode": "stream"})
    loader = make_loader(
        streamed,
        workdir=workdir,
        tokenizer=prepared.tokenizer,
        objective=NextToken(prepared.tokenizer),
        batch_size=16,
    )
    source = open_source(data.sources[0], workdir / "data" / "cache")
    texts = [source[i]["text"] for i in range(len(source))]
    encode = prepared.tokenizer.encode_batch
    size = sum(map(len, encode(texts)))
    for _ in range(100):  # the slots' first documents are read at once: not the steady state
        next(loader)
    alone = whole = 0.0
    batches = size // (16 * data.sequence_length)
    for _ in range(2):
        alone += _cpu_seconds(lambda: encode(texts))
        whole += _cpu_seconds(lambda: [next(loader) for _ in range(batches)])
    streamed_tokens = 2 * batches * 16 * data.sequence_length
    return {"stream": int(streamed_tokens / whole), "tokenizer_alone": int(2 * size / alone)}


def _cpu_seconds(call: Callable) -> float:
    """Of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _rate(call: Callable, tokens: int) -> int:
    """Tokens per CPU second; the first quartile of the times leaves out hiccups."""
    return int(tokens / np.quantile([_cpu_seconds(call) for _ in range(400)], 0.25))


def memory_table(largest: int) -> list[dict]:
    results = []
    for size in (10 * 10**6, largest):
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.txt"
            _generate(corpus, size)
            command = [sys.executable, __file__, "--measure", str(corpus), folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append({"corpus_bytes": size} | json.loads(output.splitlines()[-1]))
            print("  ".join(f"{key} {value:,}" for key, value in results[-1].items()), flush=True)
    return results


def measure_memory(corpus: Path, workdir: Path) -> dict:
    """Peak resident memory in MB of each stage: this process, its largest worker, the loader.

    The tokenizer is trained before the first stage, because the memory that takes is bounded by its
    own settings and would hide the rest.
    """
    tokenizer = {"name": "sentencepiece", "vocab_size": 2048, "training_bytes": 2e6}
    tokenizer["scan_bytes"] = 8e6
    # One size of document, which bounds the memory, whatever the size of the corpus.
    sources = [{"name": "text", "path": str(corpus), "document_bytes": 1 << 20}]
    section = {"sources": sources, "tokenizer": tokenizer, "num_workers": 2}
    prepare(resolve_data(section | {"mode": "stream"}), workdir)
    data = resolve_data(section)
    _forget_peak()
    start = time.monotonic()
    with _WatchedWorkers() as workers:
        prepared = prepare(data, workdir, progress=make_progress())
    seconds = time.monotonic() - start
    prepare_mb = _peak_mb("self")
    _forget_peak()
    loader = make_loader(
        data,
        workdir=workdir,
        tokenizer=prepared.tokenizer,
        objective=NextToken(prepared.tokenizer),
        batch_size=16,
    )
    while min(loader.epochs().values()) < 1:
        next(loader)
    return {
        "prepare_mb": prepare_mb,
        "worker_mb": workers.peak_mb,
        "load_mb": _peak_mb("self"),
        "prepare_seconds": round(seconds, 1),
    }


class _WatchedWorkers:
    """The highest peak of any child process while the block runs. Linux only, as all of this."""

    peak_mb = 0

    def __enter__(self):
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.05):
            for task in Path("/proc/self/task").iterdir():
                for child in (task / "children").read_text().split():
                    self.peak_mb = max(self.peak_mb, _peak_mb(child))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb(process: str) -> int:
    """Not ru_maxrss, which a child process inherits from its parent."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) // 1000 if peak else 0


def _generate(path: Path, size: int) -> None:
    """Lines of random words with the frequencies of a language, the same each time."""
    random = np.random.default_rng(0)
    words = ["".join(map(chr, random.integers(97, 123, n))) for n in random.integers(2, 10, 5000)]
    with open(path, "w") as file:
        while file.tell() < size:
            chosen = np.minimum(random.zipf(1.3, 100_000), len(words)) - 1
            chosen = chosen.reshape(-1, 10).tolist()
            file.write("".join(" ".join(words[i] for i in line) + "\n" for line in chosen))


def _section(data: DataConfig) -> dict:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


def _bytes(size: str) -> int:
    for unit, factor in _UNITS.items():
        if size.upper().endswith(unit):
            return int(float(size[: -len(unit)]) * factor)
    raise SystemExit(f"--memory {size}: expected a number and one of {', '.join(_UNITS)}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
