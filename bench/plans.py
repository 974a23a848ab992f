"""The table of docs/planner.md: configs of three sizes, planned for four generations of TPU.

`python -m bench.plans` prints it as Markdown; compiled steps are kept in the planner's cache, so the
second time takes seconds. `--only gpt_1b` leaves out the rest.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import measure
from llm_jax.core.config import load
from llm_jax.core.flags import run_entry
from llm_jax.data.progress import make_progress
from llm_jax.planner import words
from llm_jax.planner.compile import default_cache
from llm_jax.planner.cost import parse_tokens
from llm_jax.planner.targets import plan_targets
from llm_jax.training.config import resolve

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# config: slices, tokens of its schedule.
CASES = {
    "gpt_1b": (("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4"), "26b"),
    "llama3_8b": (("v5e:16x16", "v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4"), "1t"),
    "llama3_70b": (("v5e:16x16", "v5p:4x8x8", "v6e:16x16", "tpu7x:4x8x8"), "1t"),
}
# Where the config as it is does not fit, what the planner advised; 256 chips of tpu7x are 512 devices,
# which want a row each.
OVERRIDES = {
    ("llama3_70b", "v5e:16x16"): (
        "model.remat=offload",
        "mesh.fsdp=128",
        "mesh.tensor=2",
        "train.accumulate_steps=8",
    ),
    ("llama3_70b", "tpu7x:4x8x8"): ("train.accumulate_steps=2",),
}
COLUMNS = (
    "config", "tokens", "target", "mesh", "remat", "micro", "fits", "peak GiB", "step", "tok/s/chip",
    "MFU", "bound", "days", "dollars",
)  # fmt: skip


def rows_of(config: str, jobs: int) -> tuple[list[dict[str, str]], list[dict]]:
    """One row of text per target, and its plan's figures."""
    targets, tokens = CASES[config]
    plans = []
    for overrides, group in itertools.groupby(targets, lambda t: OVERRIDES.get((config, t), ())):
        run = resolve(load(str(CONFIGS / f"{config}.py"), overrides))
        answers = plan_targets(
            run, tuple(group), jobs=jobs, cache=default_cache(), progress=make_progress(),
            tokens=parse_tokens(tokens),
        )  # fmt: skip
        for name, error in answers.failures.items():
            print(f"{config} on {name}: {error}", file=sys.stderr)
        plans += answers.plans
    about = {"config": config, "tokens": tokens}
    rows = [about | row for row in words.ranking(plans)]
    figures = [
        {"config": config, "seconds": dict(p.seconds), "fits": p.fits, "peak": p.memory.peak,
         "target": p.target, "step": p.roofline and p.roofline.step_seconds,
         "host_peak": p.host_peak_bytes}
        for p in plans
    ]  # fmt: skip
    return rows, figures


def table_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in rows)]
    head, *lines = ["|" + "|".join(f" {cell} " for cell in line) + "|" for line in cells]
    return [head, "|" + "---|" * len(COLUMNS), *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, help="one config")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    measure.json_flag(parser)
    flags = parser.parse_args()
    rows, figures = [], []
    for config in [flags.only] if flags.only else CASES:
        more, plans = rows_of(config, flags.jobs)
        rows, figures = rows + more, figures + plans
    for line in table_of(rows):
        print(line)
    measure.write_json(flags.json, {"plans": figures})


if __name__ == "__main__":
    run_entry(main)
