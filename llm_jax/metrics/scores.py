"""What is known of a run's checkpoints: the scores of evaluations on the way and of jobs beside the run.

    WORKDIR/evals/scores.jsonl    a record per scored step, {"step": ..., NAME: ...}, in order

The file is made anew from scores_<step>.json of each step, which evaluation writes whole, so that any
number of jobs may add to it, on file systems that cannot append, too.
"""

import collections
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.core.config import ConfigError
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
    """Step to scores, by jobs or by the run itself on its way.

    The two may have looked at other amounts of data, so a figure is of one kind for all steps: of jobs where
    they have scored several steps by it, or the run none.
    """
    prefix, of_run = "eval/", {}
    for _, record in read_records(Path(workdir) / METRICS_FILE):
        own = {key.removeprefix(prefix): v for key, v in record.items() if key.startswith(prefix)}
        if own:
            of_run.setdefault(record["step"], {}).update(own)
    of_jobs = read_jobs_scores(workdir)
    counts = collections.Counter(name for scores in of_jobs.values() for name in scores)
    names_of_run = {name for scores in of_run.values() for name in scores}
    by_jobs = {name for name, count in counts.items() if count > 1 or name not in names_of_run}
    found: dict[int, dict[str, float | None]] = {}
    for step in sorted({*of_run, *of_jobs}):
        scores = {n: v for n, v in of_run.get(step, {}).items() if n not in by_jobs}
        scores |= {n: v for n, v in of_jobs.get(step, {}).items() if n in by_jobs}
        if scores:
            found[step] = scores
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
    try:
        return json.loads(path.read_bytes())["summary"]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path} is no evaluation: remove it, and its step is scored anew"
        ) from None
