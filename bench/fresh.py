"""A job of a benchmark in a process of its own: fresh memory, fresh flags, and its failure is a line."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def run(module: str, job: Any, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `python -m MODULE --one JOB` prints as its last line, which is JSON.

    Args:
      job: a dataclass of plain values; it arrives as JSON.
      environment: variables for it; those of this process win.

    Returns:
      That JSON object, or {"error": line} where the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "--one", json.dumps(dataclasses.asdict(job))],
        capture_output=True, text=True, env={**(environment or {}), **os.environ}, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
    return {"error": (named or lines or [f"exit status {done.returncode}"])[-1][:300]}
