"""What is known of a run's checkpoints: the scores of evaluations on the way and of jobs beside the run.

    WORKDIR/evals/scores.jsonl    a record per scored step, {"step": ..., NAME: ...}, in order

The file is made anew from scores_<step>.json of each step, which evaluation writes whole, so that any
number of jobs may add to it, on file systems that cannot append, too.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.metrics.writer import METRICS_FILE, RESERVED, encode, read_records, replace_file

_SCORES = re.compile(r"scores_(\d+)\.json").fullmatch


def scores_path(workdir: Path, step: int) -> Path:
    """Where the evaluation of a step is; that it is there says that the step has been scored."""
    return Path(workdir) / "evals" / f"scores_{step}.json"


def scored_steps(workdir: Path) -> list[int]:
    folder = Path(workdir) / "evals"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _SCORES(name)))


def collect_scores(workdir: Path) -> Path:
    """Writes scores.jsonl from the evaluations that are there."""
    path = _records(workdir)
    steps = scored_steps(workdir)
    while True:
        lines = [encode(step, _summary(scores_path(workdir, step))) for step in steps]
        replace_file(path, lines)
        # Another job may have collected, before us, what it wrote after our look.
        before, steps = steps, scored_steps(workdir)
        if steps == before:
            return path


def read_scores(workdir: Path) -> dict[int, dict[str, float | None]]:
    """Step to scores; where a job and the run itself scored one, the job's count."""
    prefix, found = "eval/", {}
    for _, record in read_records(Path(workdir) / METRICS_FILE):
        own = {key.removeprefix(prefix): v for key, v in record.items() if key.startswith(prefix)}
        if own:
            found.setdefault(record["step"], {}).update(own)
    for step, scores in read_jobs_scores(workdir).items():
        found.setdefault(step, {}).update(scores)
    return found


def read_jobs_scores(workdir: Path) -> dict[int, dict[str, float | None]]:
    """Step to scores, those of scores.jsonl alone."""
    return {
        record["step"]: {key: value for key, value in record.items() if key not in RESERVED}
        for _, record in read_records(_records(workdir))
    }


def forget_scores(workdir: Path, after: int) -> None:
    """Removes the scores of later steps, which a run that begins at `after` will train anew."""
    late = [step for step in scored_steps(workdir) if step > after]
    for step in late:
        scores_path(workdir, step).unlink(missing_ok=True)
    if late:
        collect_scores(workdir)


def _records(workdir: Path) -> Path:
    return Path(workdir) / "evals" / "scores.jsonl"


def _summary(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_bytes())["summary"]
