"""A folder is there whole or not at all, and nothing else is left behind."""

from pathlib import Path

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.export.folder import new_folder


def test_folders_on_the_way_go_again_where_something_fails(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "there" / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with new_folder(tmp_path / "there" / "a" / "b") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["there", "a", "b", "x"]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with (
        pytest.raises(ConfigError, match="disk is a mount point and cannot be replaced"),
        new_folder(tmp_path / "disk"),
    ):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "disk"]
    with new_folder(tmp_path / "disk" / "out"):
        pass
    assert (tmp_path / "disk" / "out").is_dir()
