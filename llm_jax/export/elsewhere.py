"""Exports that compute in a process of their own, which has no llm_jax: see export/witness.py."""

import io
import os
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np

from llm_jax.core.flags import RunError
from llm_jax.core.types import Batch
from llm_jax.export import witness
from llm_jax.export.probes import Outputs


class Elsewhere:
    """A Forward of the model in a folder; the process ends with this object.

    Args:
      kind: of the witness.
      numpy_only: no package is on the path but numpy, and what lies beside it is refused.

    Raises:
      RunError: it cannot be loaded; or later, it cannot compute.
    """

    def __init__(self, kind: str, folder: Path, *, numpy_only: bool = False):
        options = ["-I", "-B", *(["-S"] if numpy_only else [])]
        packages = [str(Path(np.__file__).parents[1])] if numpy_only else []
        self._what = kind.replace("_", "'s ")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, *options, witness.__file__, kind, str(folder), *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Accelerators belong to this process.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        weakref.finalize(self, _end, self._process)
        self._read()

    def __call__(self, batch: Batch) -> Outputs:
        return self.answer(**{name: np.asarray(x, np.int32) for name, x in batch.items()})

    def answer(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        file = io.BytesIO()
        np.savez(file, **arrays)
        try:
            self._process.stdin.write(len(file.getvalue()).to_bytes(8, "little"))
            self._process.stdin.write(file.getvalue())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._read()

    def _read(self) -> dict[str, np.ndarray]:
        size = int.from_bytes(self._process.stdout.read(8), "little")
        data = self._process.stdout.read(size)
        if not size or len(data) < size:
            raise self._failure()
        return dict(np.load(io.BytesIO(data)))

    def _failure(self) -> RunError:
        code = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().decode("utf-8", "replace")
        # Not always the last line: jax writes of its traceback behind it.
        names = re.findall(r"^[A-Za-z_][\w.]*: .+$", told, re.MULTILINE)
        reason = names[-1] if names else f"exit status {code}"
        return RunError(f"the {self._what} in a process of its own fails: {reason}")


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.stdout.close()
    process.wait()
