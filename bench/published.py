"""The planner against published runs: predicted and measured tokens per second.

`python -m bench.published` compiles, for each run, our training step with the model, batch and slice
of its recipe, and asks the planner how fast it is. The recipes are MaxText's; what they do and we
cannot is in `differs`. The program is ours, so the error is that of the planner and of the differences
between the two programs together.

`--fit` prints the efficiency of each generation that makes the geometric mean of its rows exact: the
figures of planner/roofline.py. There is one per generation; rows are never fitted one by one.
"""

import argparse
import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import measure
from llm_jax.core.config import to_dict
from llm_jax.core.flags import run_entry
from llm_jax.planner.compile import Request, compile_many, default_cache
from llm_jax.planner.make import make_plan
from llm_jax.planner.plan import Plan
from llm_jax.planner.topology import parse_target
from llm_jax.training.config import resolve

LLAMA3_8B = {"vocab_size": 128_256, "embed_dim": 4096, "num_layers": 32, "num_heads": 32,
             "num_kv_heads": 8, "mlp_dim": 14_336, "rope_theta": 500_000.0}  # fmt: skip
LLAMA3_70B = {"vocab_size": 128_256, "embed_dim": 8192, "num_layers": 80, "num_heads": 64,
              "num_kv_heads": 8, "mlp_dim": 28_672, "rope_theta": 500_000.0}  # fmt: skip
LLAMA2_70B = {"vocab_size": 32_000, "embed_dim": 8192, "num_layers": 80, "num_heads": 64,
              "num_kv_heads": 8, "mlp_dim": 28_672}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One published run. rows: sequences per chip; tokens_per_second: per chip, as published.

    source: where the figure and the recipe stand. differs: what our program does otherwise.
    """

    name: str
    target: str
    model: Mapping[str, Any]
    length: int
    rows: int
    tokens_per_second: float
    source: str
    differs: str
    remat: str
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_TIERS = "maxtext.readthedocs.io/en/latest/reference/models/tiering.html"
_TRILLIUM = "AI-Hypercomputer/tpu-recipes: training/trillium"
_IRONWOOD = "AI-Hypercomputer/tpu-recipes: training/ironwood"
RUNS = (
    Run(
        "Llama2-70B", "v5p:8x8x8", LLAMA2_70B, 4096, 2, 692,
        f"{_TIERS}; batch of 4 M tokens from MaxText/configs/v5p/llama2_70b.sh",
        "keeps attention too, which the recipe computes again", "narrow",
    ),
    Run(
        "Llama2-70B", "v5e:16x16", LLAMA2_70B, 2048, 2, 262,
        "MFU 57 % in MaxText's getting_started/Run_Llama2.md; MaxText/configs/v5e/llama2_70b.sh",
        "block inputs alone go to host memory, the recipe's q, k and v too", "offload",
    ),
    Run(
        "Llama3.1-8B", "v6e:16x16", LLAMA3_8B, 8192, 4, 7207,
        f"{_TIERS}; {_TRILLIUM}/Llama3.1-8B-MaxText/v6e-256",
        "computes q, k, v and out again, which the recipe keeps in host memory", "offload",
    ),
    Run(
        "Llama3.1-8B", "v6e:4x4", LLAMA3_8B, 8192, 3, 7243,
        f"{_TRILLIUM}/Llama3.1-8B-MaxText/v6e-16",
        "computes q, k, v and out again, which the recipe keeps in host memory", "offload",
    ),
    Run(
        "Llama3.1-70B", "v6e:16x16", LLAMA3_70B, 8192, 5, 960,
        f"{_TIERS}; {_TRILLIUM}/Llama3.1-70B-MaxText",
        "computes q, k and v again, which the recipe keeps in host memory", "offload",
    ),
    Run(
        "Llama2-70B", "v6e:16x16", LLAMA2_70B, 4096, 4, 943,
        f"{_TRILLIUM}/Llama2-70B-MaxText",
        "the recipe's rematerialization is not published", "offload",
    ),
    Run(
        "Llama3.1-70B", "tpu7x:4x4x4", LLAMA3_70B, 8192, 4, 2687,
        f"{_IRONWOOD}, README and llama3.1-70b/8k-bf16-tpu7x-4x4x4",
        "computes q, k and v again, which the recipe keeps; same bfloat16 first moment", "attention",
        {"momentum_dtype": "bfloat16"},
    ),
    Run(
        "Llama3.1-70B", "tpu7x:4x8x8", LLAMA3_70B, 8192, 4, 2671,
        f"{_IRONWOOD}, README",
        "computes q, k and v again, which the recipe keeps; same bfloat16 first moment", "attention",
        {"momentum_dtype": "bfloat16"},
    ),
)  # fmt: skip


def config_of(run: Run) -> dict[str, Any]:
    """The run as our config, resolved."""
    target = parse_target(run.target)
    config = {
        "model": {"name": "gpt", "max_length": run.length, "remat": run.remat, **run.model},
        "data": {"sequence_length": run.length, "tokenizer": {"name": "raw_bytes"}},
        "optimizer": {"name": "adamw", **run.optimizer},
        "mesh": {"data": 1, "fsdp": -1},
        "train": {"num_steps": 1000, "batch_size": run.rows * target.num_chips},
    }
    return to_dict(resolve(config))


def plans(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Plan]]:
    """Of each run, as its compilation ends."""
    requests = [Request(config_of(run), run.target) for run in runs]
    for request, step in compile_many(requests, jobs=jobs, cache=default_cache()):
        run = runs[requests.index(request)]
        if isinstance(step, Exception):
            raise step
        yield run, make_plan(step, parse_target(run.target))


def fitted(rows: Sequence[tuple[Run, Plan]]) -> dict[str, float]:
    """Published over predicted tokens per second at efficiency 1, as a geometric mean per generation."""
    logs = collections.defaultdict(list)
    for run, plan in rows:
        if plan.roofline is not None:
            raw = plan.roofline.tokens_per_second / plan.roofline.efficiency
            logs[plan.chip].append(math.log(run.tokens_per_second / raw))
    return {chip: math.exp(sum(values) / len(values)) for chip, values in logs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose target starts so, e.g. v6e")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    parser.add_argument("--fit", action="store_true", help="print the efficiencies")
    measure.json_flag(parser)
    flags = parser.parse_args()
    runs = [run for run in RUNS if run.target.startswith(flags.only)]
    rows = sorted(plans(runs, flags.jobs), key=lambda row: RUNS.index(row[0]))
    columns = ("run", "target", "T", "rows", "remat", "GiB", "published", "predicted", "error %")
    table = []
    for run, plan in rows:
        start = (run.name, run.target, run.length, run.rows, run.remat,
                 plan.memory.peak / 2**30, f"{run.tokens_per_second:,.0f}")  # fmt: skip
        time = plan.roofline
        if time is None:
            table.append((*start, "does not fit", ""))
            continue
        error = 100 * (time.tokens_per_second / run.tokens_per_second - 1)
        table.append((*start, f"{time.tokens_per_second:,.0f}", f"{error:+.1f}"))
    about = dict(rows[0][1].versions) if rows else {}
    measure.show("tokens per second and chip", columns, table, about)
    if flags.fit:
        print({chip: round(value, 3) for chip, value in fitted(rows).items()})
    content = [
        {**dataclasses.asdict(run), **dict(zip(columns, row, strict=True))}
        for (run, _), row in zip(rows, table, strict=True)
    ]
    measure.write_json(flags.json, {"machine": about, "runs": content})


if __name__ == "__main__":
    run_entry(main)
