import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import model_section, run_config

from llm_jax.checkpoint.claims import Claims
from llm_jax.checkpoint.manager import Checkpointer, CheckpointMismatch, RunFiles, tree_differences
from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.training.config import CheckpointConfig
from llm_jax.training.program import build_program

FILES = RunFiles({"a": 1}, {"batch": 7}, {"model.bin": b"\x00\xff", "sub/meta.json": b"{}"})


def program_on(count=1, **model):
    mesh = make_mesh(MeshConfig(data=1, fsdp=count), jax.devices()[:count])
    return build_program(run_config(model=model_section(**model)), mesh)


@pytest.fixture(scope="module")
def program():
    return program_on()


@pytest.fixture(scope="module")
def state(program):
    return program.init(jax.random.key(0))


def save(directory, state, *steps, **config):
    said = []
    checkpointer = Checkpointer(directory, CheckpointConfig(**config), say=said.append)
    for step in steps:
        checkpointer.save(step, state, FILES)
    checkpointer.wait()
    return checkpointer, said


def test_everything_comes_back_on_another_mesh(program, state, tmp_path):
    save(tmp_path / "c", state, 5)[0].close()
    other = program_on(8)
    restored, files = Checkpointer(tmp_path / "c").restore(
        5, other.abstract_state, other.state_shardings
    )
    assert files == FILES
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    pairs = zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((restored.params, restored.opt_state)),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    query = restored.params["stack"]["layers"]["attention"]["query"]
    assert len(query.sharding.device_set) == 8


def test_keep_last_and_keep_every(state, tmp_path):
    checkpointer, _ = save(tmp_path / "c", state, 1, 2, 3, 4, 5, keep_last=2, keep_every=2)
    assert checkpointer.steps() == [2, 4, 5]


def scored(workdir, **losses):
    """evals/scores.jsonl: step_N=loss."""
    lines = [json.dumps({"step": int(name[5:]), "loss": v}) for name, v in losses.items()]
    (workdir / "evals").mkdir()
    (workdir / "evals" / "scores.jsonl").write_text("\n".join(lines) + "\n")


def test_the_best_by_score_is_kept(state, tmp_path):
    scored(tmp_path, step_1=3.0, step_2=1.0, step_3=2.0, step_7=0.5)
    checkpointer, said = save(tmp_path / "c", state, 1, 2, 3, 4, 5, keep_last=1, keep_best="loss")
    assert checkpointer.steps() == [2, 5]
    assert said == []
    checkpointer, said = save(tmp_path / "d", state, 1, 2, keep_last=1, keep_best="los")
    assert checkpointer.steps() == [2]
    assert "checkpoint.keep_best 'los' is no score; there are: loss" in said


def test_accuracy_is_better_when_larger(state, tmp_path):
    records = [{"step": n, "eval/quiz/accuracy": x} for n, x in ((1, 0.5), (2, 0.7), (3, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    checkpointer, _ = save(
        tmp_path / "c", state, 1, 2, 3, 4, keep_last=1, keep_best="quiz/accuracy"
    )
    assert checkpointer.steps() == [2, 4]


def test_what_a_job_reads_is_not_removed(state, tmp_path):
    folder = tmp_path / "c"
    checkpointer, _ = save(folder, state, 1, 2, keep_last=2)
    reader = Claims(tmp_path, "job")
    with reader.take(1).held():
        checkpointer.save(3, state, FILES)
        checkpointer.wait()
        checkpointer.save(4, state, FILES)
        # What goes is claimed until it is gone, so that nobody begins to read it.
        assert reader.take(2) is None
        assert "training on" in reader.holder(2)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3, 4]
        assert (folder / "1" / "model").is_dir()
        assert not (folder / "2").exists()
        assert reader.holder(2) is None
    checkpointer.save(5, state, FILES)
    checkpointer.wait()
    assert checkpointer.steps() == [4, 5]
    assert not (folder / "1").exists()
    assert list((tmp_path / "evals" / "claims").iterdir()) == []


def test_another_model_is_refused_with_the_differences(state, tmp_path):
    checkpointer, _ = save(tmp_path / "c", state, 1)
    other = program_on(mlp_dim=128, tie_embeddings=True, qk_norm=True)
    with pytest.raises(CheckpointMismatch) as error:
        checkpointer.restore_latest(other.abstract_state, other.state_shardings)
    message = str(error.value)
    assert "missing params.stack.layers.attention.query_norm.scale (2, 8)" in message
    assert "extra params.head (32, 64)" in message
    assert "shape of params.stack.layers.mlp.up is (2, 32, 64), not (2, 32, 128)" in message
    assert "\n" not in message
    assert checkpointer.steps() == [1]


def test_a_half_written_checkpoint_is_reported_and_the_one_before_used(program, state, tmp_path):
    save(tmp_path, state, 1)[0].close()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    checkpointer, said = save(tmp_path, state)
    assert said == [
        "checkpoint of step 2 was not finished: it is removed, and the one before it is used"
    ]
    assert checkpointer.steps() == [1]
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("victim", ["model/_METADATA", "model", "run/config.json", "optimizer/d"])
def test_a_damaged_checkpoint_is_set_aside(program, state, tmp_path, victim):
    save(tmp_path, state, 1, 2)[0].close()
    path = tmp_path / "2" / victim
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpointer, said = save(tmp_path, state)
    _, files = checkpointer.restore_latest(program.abstract_state, program.state_shardings)
    assert files == FILES
    assert checkpointer.steps() == [1]
    assert len(said) == 1
    assert "cannot be read" in said[0]
    assert (tmp_path / "2.damaged").is_dir()
    checkpointer.save(2, state, FILES)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]


def test_no_checkpoint_is_no_error_but_reading_none_is(program, tmp_path):
    checkpointer, _ = save(tmp_path / "new", None)
    assert checkpointer.restore_latest(program.abstract_state, program.state_shardings) is None
    with pytest.raises(ConfigError, match="no checkpoints at"):
        Checkpointer(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_last_good_checkpoint(state, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=False
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        checkpointer, _ = save(disk / "c", state, 1, keep_last=9)
        size = shutil.disk_usage(disk).free - 4096
        (disk / "ballast").write_bytes(b"x" * size)
        message = r"step 2 could not be written .*step 1 is kept"
        with pytest.raises(RunError, match=message) as error:  # noqa: PT012  either may raise it
            checkpointer.save(2, state, FILES)
            checkpointer.wait()
        assert "\n" not in str(error.value)
        assert Checkpointer(disk / "c").steps() == [1]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_tree_differences_are_bounded():
    wanted = {str(i): jnp.zeros(1) for i in range(20)}
    lines = tree_differences(wanted, {}, limit=3)
    assert len(lines) == 4
    assert lines[-1] == "and 17 more"


def test_saving_copies_the_state_first(program, state, tmp_path):
    # The step after a save donates the very buffers that are being written.
    checkpointer, _ = save(tmp_path, state)
    own = jax.tree.map(jnp.copy, state)
    expected = jax.device_get(own.params["embed"])
    checkpointer.save(1, own, FILES)
    for leaf in jax.tree.leaves(own):
        leaf.delete()
    checkpointer.wait()
    restored, _ = checkpointer.restore(1, program.abstract_state, program.state_shardings)
    np.testing.assert_array_equal(restored.params["embed"], expected)
