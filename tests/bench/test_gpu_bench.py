"""The benchmark of one GPU must run where only jax, flax, optax, numpy and orbax are installed."""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")

BLOCKER = """
import importlib.abc, sys
BLOCKED = {blocked!r}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(names) -> set[str]:
    """These distributions and all that they need."""
    found, wanted = set(), [normal(name) for name in names]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        wanted += [normal(re.match(r"[\w.\-]+", n)[0]) for n in needs if "extra ==" not in n]
    return found


def blocked_modules() -> set[str]:
    allowed = with_dependencies(INSTALLED) | {"llm-jax"}
    owners = importlib.metadata.packages_distributions()
    return {top for top, dists in owners.items() if not allowed & {normal(d) for d in dists}}


@pytest.mark.slow
def test_a_step_is_measured_with_nothing_else_installed(run_python, tmp_path):
    blocked = blocked_modules()
    assert {"grain", "ml_collections", "sentencepiece", "pytest"} <= blocked
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    report = tmp_path / "report.json"
    done = run_python(
        "-m", "bench.gpu", "--tiny", "--batch", 2, "--length", 128, "--remat", "none",
        "--kernel", "auto,splash", "--rounds", 1, "--json", report,
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured, refused = json.loads(report.read_text())["steps"]
    assert "error" not in measured, measured["error"]
    before, after = measured["losses"]
    assert after < before < 2 * np.log(320)
    assert measured["tokens_per_second"] > 0
    assert measured["mfu"] is None, "nobody publishes the peak of this CPU"
    assert measured["mfu_of_matmul"] > 0
    assert measured["parameters"] > 2 * 320 * 64
    assert "needs a TPU" in refused["error"]
    assert "needs a TPU" in done.stdout
