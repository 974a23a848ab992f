"""How fast an export is written, beside a raw write of the same bytes, and what memory it takes.

python -m bench.export [--layers 12 --embed 1024] [--folder DIR] [--json FILE]

Raw: the bytes of the export's own files, from memory, in blocks of 16 MB, with an fsync at the end of each, in
turns with the exports. "write" stops where the files are on the disk, "export" also reads them back and
compares. Memory has a process of its own for each format: the peak over the model alone, and the largest
tensor of a file beside it. A Llama with random weights; no certificate, whose time is that of a few forward
passes.
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench import fresh, measure
from llm_jax.core.config import component, parse, to_dict
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf
from llm_jax.export.safetensors_file import Item, write_folder
from llm_jax.models import gpt
from llm_jax.nn.precision import Precision
from llm_jax.training.config import RunConfig, resolve

ROUNDS = 5
BLOCK = 2**24
FORMATS = {
    "hf": {"name": "hf"},
    "quantized int8": {"name": "quantized", "kind": "int8"},
    "quantized int4": {"name": "quantized", "kind": "int4"},
    "gguf f16": {"name": "gguf", "dtype": "f16"},
    "gguf q8_0": {"name": "gguf", "dtype": "q8_0"},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One format's memory."""

    format: str
    layers: int
    embed: int
    folder: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.json_flag(parser)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed", type=int, default=1024)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: for temporary files"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(_memory(Job(**json.loads(arguments.one)))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = _speed(arguments, Path(folder))
        memory = {
            name: fresh.run(
                "bench.export",
                Job(name, arguments.layers, arguments.embed, folder),
                {"JAX_PLATFORMS": "cpu"},
            )
            for name in FORMATS
        }
    about = measure.machine()
    measure.show(
        "an export, and a raw write of the same bytes",
        ("", "MB", "MB/s", "raw MB/s", "share of raw"),
        [(name, r["MB"], r["MB_per_s"], r["raw_MB_per_s"], r["share"]) for name, r in rows.items()],
        about,
    )
    failed = {name: m["error"] for name, m in memory.items() if "error" in m}
    measure.show(
        "memory beyond the model's own",
        ("", "model MB", "peak MB", "largest tensor MB"),
        [
            (name, m["model_MB"], m["peak_MB"], m["tensor_MB"])
            for name, m in memory.items()
            if name not in failed
        ],
        failed,
    )
    measure.write_json(arguments.json, {"machine": about, "speed": rows, "memory": memory})


def _speed(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    model, run = _model(arguments.layers, arguments.embed)
    items = _items(model, run)
    contenders = {"hf write": lambda out: _write(items, out)}
    for name, options in FORMATS.items():
        label = "hf export" if name == "hf" else name
        contenders[label] = lambda out, options=options: _export(options, model, run, out)
    rows = {}
    for name, contender in contenders.items():
        contender(folder / "once")
        sizes = [path.stat().st_size for path in (folder / "once").iterdir()]
        turns = {
            "export": lambda contender=contender: contender(folder / "out"),
            "raw": lambda sizes=sizes: _raw(sizes, folder / "raw"),
        }
        seconds = measure.interleaved(turns, ROUNDS)
        size = sum(sizes) / 1e6
        rows[name] = {
            "MB": size,
            "MB_per_s": size / seconds["export"],
            "raw_MB_per_s": size / seconds["raw"],
            "share": seconds["raw"] / seconds["export"],
        }
        shutil.rmtree(folder / "once")
    return rows


def _model(layers: int, embed: int) -> tuple[gpt.GPT, RunConfig]:
    """Made on the device: numpy's numbers would be freed whenever jax gets to it."""
    config = gpt.Config(
        vocab_size=32768, embed_dim=embed, num_layers=layers, num_heads=embed // 64, num_kv_heads=embed // 128,
    )  # fmt: skip
    abstract = nnx.eval_shape(lambda: gpt.make(config, precision=Precision(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    fill = lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    run = resolve({
        "model": to_dict(config),
        "data": {
            "sources": [{"name": "text", "path": "none"}],
            "tokenizer": {"name": "raw_bytes"},
            "sequence_length": 16,
        },
        "train": {"num_steps": 1, "batch_size": 1},
    })  # fmt: skip
    return nnx.merge(graphdef, jax.block_until_ready(jax.tree.map(fill, state))), run


def _items(model: gpt.GPT, run: RunConfig) -> list[Item]:
    params = hf.params_of(model)
    return hf.items_of(hf.plan_of(hf.family_of(run.model.name), run.model, params), params)


def _write(items: list[Item], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_folder(out, items, hf.Config().shard_bytes)


def _export(options: dict[str, Any], model: gpt.GPT, run: RunConfig, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    module = component("export", options["name"])
    exporter = module.make(parse(module.Config, options), say=lambda text: None)
    exporter.export(model, raw_bytes.make(raw_bytes.Config()), run, out)


def _raw(sizes: list[int], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    block = memoryview(np.ones(BLOCK, np.uint8))
    for number, size in enumerate(sizes):
        with (out / str(number)).open("wb") as file:
            for start in range(0, size, BLOCK):
                file.write(block[: min(BLOCK, size - start)])
            file.flush()
            os.fsync(file.fileno())


def _memory(job: Job) -> dict[str, float]:
    """In a process of its own: the peak of an export after one of a small model has loaded all code."""
    out = Path(job.folder) / "memory"
    small, run = _model(1, 128)
    _export(FORMATS[job.format], small, run, out)
    model, run = _model(job.layers, job.embed)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _export(FORMATS[job.format], model, run, out)
    peak = _resident("VmHWM")
    gc.collect()
    before = min(before, _resident("VmRSS"))  # what was freed late does not hide what was taken
    items = _items(model, run)
    return {
        "model_MB": sum(item.num_bytes for item in items) / 1e6,
        "peak_MB": (peak - before) / 1e6,
        "tensor_MB": max(item.num_bytes for item in items) / 1e6,
    }


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
    main()
