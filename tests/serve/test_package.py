"""The page's files are in the package that is installed."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"


@pytest.mark.slow
def test_the_wheel_holds_the_page(tmp_path):
    if int(installed("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 builds the wheel: pip install -U setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, tmp_path / name)
    shutil.copytree("llm_jax", tmp_path / "llm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*wheel, "-w", "out", "."], cwd=tmp_path, check=True, timeout=120)
    (built,) = (tmp_path / "out").glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    files = {str(path) for path in Path("llm_jax/serve/page").iterdir()}
    assert len(files) >= 9
    assert files <= names
