"""A folder that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llm_jax.core.config import ConfigError


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Gives an empty folder to write in, which gets the name `directory` only if nothing is raised.

    Raises:
      ConfigError: there is something of that name already, and it is no empty folder, or one that cannot
        be replaced.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there and not empty: choose another folder")
    if directory.is_mount():
        raise ConfigError(
            f"{directory} is a mount point and cannot be replaced: choose a folder in it"
        )
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    missing = [parent for parent in temporary.parents if not parent.exists()]  # the innermost first
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # the finished folder is in it
                parent.rmdir()
