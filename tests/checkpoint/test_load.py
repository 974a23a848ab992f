"""load_model and the export entry, on a checkpoint that a Program wrote."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from llm_jax.checkpoint.load import load_model
from llm_jax.checkpoint.manager import Checkpointer, RunFiles, read_folder
from llm_jax.core.config import ConfigError, to_dict
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import __main__ as export_entry
from llm_jax.export import hf
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.training.config import CheckpointConfig, resolve
from llm_jax.training.program import build_program

STEPS = (2, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(workdir, run, parameters of each step)."""
    workdir = tmp_path_factory.mktemp("run")
    run = resolve(
        {
            "model": {
                "name": "gpt", "vocab_size": 300, "embed_dim": 32, "num_layers": 2, "num_heads": 4,
                "num_kv_heads": 2, "qk_norm": True, "max_length": 32,
            },
            "data": {
                "sources": [{"name": "text", "path": "unread.txt"}],
                "tokenizer": {"name": "raw_bytes"},
                "sequence_length": 16,
            },
            "train": {"num_steps": 5, "batch_size": 2},
        }
    )  # fmt: skip
    program = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1]))
    raw_bytes.make(raw_bytes.Config()).save(workdir / "tokenizer")
    files = RunFiles(to_dict(run), {}, read_folder(workdir / "tokenizer"))
    checkpointer = Checkpointer(workdir / "checkpoints", CheckpointConfig())
    params = {}
    for step in STEPS:
        state = program.init(jax.random.key(step))
        state = dataclasses.replace(state, step=state.step + step)
        params[step] = jax.tree.map(np.asarray, state.params)
        checkpointer.save(step, state, files)
    checkpointer.wait()
    checkpointer.close()
    return workdir, run, params


def params_of(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_step_loads_with_its_config_and_tokenizer(saved):
    workdir, run, params = saved
    loaded = load_model(workdir)
    assert loaded.step == 5
    assert loaded.run == run
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"
    assert loaded.model.precision.compute_dtype == "bfloat16"
    assert_same(params_of(loaded.model), params[5])
    logits = loaded.model({"tokens": np.zeros((1, 8), np.int32)}).logits
    assert logits.shape == (1, 8, 300)


def test_a_step_a_mesh_and_a_dtype_can_be_chosen(saved):
    workdir, _, params = saved
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:1])
    loaded = load_model(workdir / "checkpoints", 2, mesh=mesh, compute_dtype="float32")
    assert loaded.step == 2
    assert loaded.model.precision.compute_dtype == "float32"
    assert loaded.model.embed[...].sharding.mesh == mesh
    assert_same(params_of(loaded.model), params[2])


def test_a_step_that_is_not_there_lists_those_that_are(saved):
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 .*steps: 2, 5"):
        load_model(saved[0], 3)


def test_folders_without_checkpoints_say_so(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoints at"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoints at"):
        load_model(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no finished checkpoint in"):
        load_model(tmp_path)


def test_the_export_entry_writes_what_was_saved(saved, tmp_path, monkeypatch, capsys):
    workdir, _, params = saved
    arguments = ["export", "--workdir", workdir, "--out", tmp_path / "out", "--step", 2]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    export_entry.main()
    assert "verified" in capsys.readouterr().out
    model, config = hf.load(tmp_path / "out")
    assert config.qk_norm
    assert_same(params_of(model), params[2])


def test_the_export_entry_names_the_formats(saved, tmp_path, monkeypatch):
    arguments = ["export", "--workdir", saved[0], "--out", tmp_path / "out", "--format", "hff"]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    with pytest.raises(ConfigError, match="no 'hff'; did you mean 'hf'"):
        export_entry.main()
