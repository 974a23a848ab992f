"""The model card of an export: README.md as the Hugging Face hub reads it, of known facts only.

Nothing is said that is not in the run: no licence, no language, no intended use. Absolute paths are cut to
their last part.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from llm_jax.checkpoint.load import LoadedModel
from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.types import Model
from llm_jax.data.config import DataConfig, shards_folder
from llm_jax.data.records import RecordIndex
from llm_jax.data.shards import ShardIndex
from llm_jax.data.sources import source_key

NAME = "README.md"
_SPLITS = {"train": "trained on", "held_out": "held out"}


def write_card(
    directory: Path,
    title: str,
    loaded: LoadedModel,
    workdir: Path | None,
    *,
    usage: str,
    library: str | None,
) -> None:
    """Writes README.md.

    Args:
      workdir: of the run, for the sizes of its data and its scores; None: the card has none.
      usage: Markdown on how to load the folder.
      library: what loads it, as the hub calls it.
    """
    run = loaded.run
    parts = [
        _front_matter(loaded.model, library),
        f"# {title}\n\n",
        _table(("", ""), _facts(loaded)),
        f"\n## How to load\n\n{usage.strip()}\n",
        "\n`certificate.json` says how what this folder computes compares with the trained model, file by "
        "file; `python -m llm_jax.export --verify FOLDER` checks it again.\n",
        "\n## Data\n\n" + _data(run.data, workdir),
    ]
    scores = _scores(workdir, loaded.step)
    if scores:
        parts.append(
            "\n## Evaluation\n\nAt this step. Figures named `TASK/...` are of the tasks that were asked; all "
            "others, `bits_per_byte/DOMAIN` too, of held-out data of the run:\n\n"
        )
        parts.append(_table(("metric", "value"), [(k, _number(v)) for k, v in scores.items()]))
    config = json.dumps(_without_paths(to_dict(run)), indent=1, ensure_ascii=False)
    parts.append(
        "\n## Training\n\nWith `python -m llm_jax.train`; the whole config, as the checkpoint has it:\n\n"
        f"```json\n{config}\n```\n"
    )
    (directory / NAME).write_text("".join(parts), encoding="utf-8")


def _front_matter(model: Model, library: str | None) -> str:
    task = "text-generation" if hasattr(model, "init_cache") else None
    task = "text2text-generation" if hasattr(model, "encode") else task
    head = {"masked_lm": "fill-mask", "pretraining": "fill-mask",
            "sequence_classification": "text-classification",
            "token_classification": "token-classification",
            "question_answering": "question-answering"}  # fmt: skip
    task = task or head.get(getattr(model.config, "head", None))
    found = {"library_name": library, "pipeline_tag": task}
    lines = [f"{key}: {value}" for key, value in found.items() if value is not None]
    return "\n".join(["---", *lines, "tags:", "- llm_jax", f"- {model.config.name}", "---", "", ""])


def _facts(loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    run, tokenizer = loaded.run, loaded.tokenizer
    arrays = jax.tree.leaves(nnx.state(loaded.model, nnx.Param))
    yield "parameters", f"{sum(x.size for x in arrays):,}"
    model = to_dict(run.model)
    names = ("embed_dim", "num_layers", "num_encoder_layers", "num_decoder_layers", "num_heads",
             "num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_length", "num_positions")  # fmt: skip
    sizes = ", ".join(f"{name} {model[name]}" for name in names if model.get(name) is not None)
    yield "model", f"{run.model.name}: {sizes}"
    if model.get("experts"):
        experts = model["experts"]
        yield "experts", f"{experts['num_experts']}, {experts['experts_per_token']} for each token"
    kind = getattr(tokenizer, "name", type(tokenizer).__name__)
    yield "tokenizer", f"{kind}, {tokenizer.vocab_size:,} ids"
    yield "objective", run.objective.name
    rows, length = run.train.batch_size, run.data.sequence_length
    yield "steps", f"{loaded.step:,}"
    yield "batch", f"{rows} rows of {length:,} tokens"
    yield "tokens seen, padding included", f"{loaded.step * rows * length:,}"
    yield "optimizer", f"{run.optimizer.name}, learning rate {run.schedule.learning_rate:g}"
    if run.init_from is not None:
        yield "started from", str(_without_paths(run.init_from))


def _data(data: DataConfig, workdir: Path | None) -> str:
    rows = []
    for source in data.sources:
        row = [f"{source.name}: {_without_paths(source.path)}", f"{source.weight:g}"]
        sizes = _sizes(data, source, workdir)
        rows.append([*row, *(sizes.get(split, "not known") for split in _SPLITS)])
    if not rows:
        return "The config names no source.\n"
    return _table(("source", "weight", *_SPLITS.values()), rows)


def _sizes(data: DataConfig, source: Any, workdir: Path | None) -> dict[str, str]:
    """By split; {} where the run's index is not there."""
    if workdir is None:
        return {}
    try:
        folder = shards_folder(data, workdir) / source_key(source)
        shards, records = ShardIndex.load(folder), RecordIndex.load(folder / "records")
    except ConfigError:
        return {}
    if shards is not None and shards.complete:
        return {
            split: f"{shards.documents(split):,} documents, {shards.text_bytes(split):,} bytes, "
            f"{shards.tokens(split):,} tokens"
            for split in _SPLITS
        }
    return {s: f"{records.sizes[s]:,} records" for s in _SPLITS} if records is not None else {}


def _scores(workdir: Path | None, step: int) -> dict[str, Any]:
    path = None if workdir is None else Path(workdir) / "evals" / f"scores_{step}.json"
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["summary"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} cannot be read as scores: take it away") from None


def _without_paths(value: Any) -> Any:
    """Absolute paths name the machine and whoever works there."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.partition(":")
    if colon and rest.startswith("/") and not rest.startswith("//"):  # hf:/home/me/folder
        return f"{prefix}:{_without_paths(rest)}"
    return Path(value).name if value.startswith(("/", "~")) else value


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = lambda row: "| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |\n"  # noqa: E731
    return cells(head) + "|" + " --- |" * len(head) + "\n" + "".join(map(cells, rows))
