"""Files that are there whole or not at all: written under another name, synced, then renamed.

The other name carries the host and the process, so that two writers of one file never meet and a
leftover of a killed process can be told from a file that is being written.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

NPY_HEADER_BYTES = 128


class AtomicFile:
    """A binary file under a temporary name until `commit`."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        self.file = open(self._temporary, "wb")  # noqa: SIM115

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._temporary, self._path)

    def abandon(self) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.commit()
        else:
            self.abandon()


class NpyWriter(AtomicFile):
    """A one-dimensional .npy file that grows by `append`, for arrays that do not fit in memory."""

    def __init__(self, path: Path, dtype: np.dtype):
        super().__init__(path)
        self.length = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self._dtype).data)
        self.length += len(values)

    def commit(self) -> None:
        self.file.seek(0)
        self._write_header()
        super().commit()

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        if self.file.tell() != NPY_HEADER_BYTES:
            raise RuntimeError(f"numpy wrote a header of {self.file.tell()} bytes")


def write_json(path: Path, value: Any) -> None:
    with AtomicFile(path) as target:
        target.file.write((json.dumps(value, indent=1) + "\n").encode())


def remove_leftovers(folder: Path) -> None:
    """Removes what processes of this host that no longer run left unfinished below `folder`."""
    for path in folder.rglob(f".*.{socket.gethostname()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not _is_running(int(process)):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
