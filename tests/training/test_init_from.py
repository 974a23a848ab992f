"""Fine-tuning begins with the parameters of a run or of a Hugging Face folder."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import model_section, params_of, random_batch, run_config

from llm_jax.checkpoint import begin
from llm_jax.checkpoint.load import load_model
from llm_jax.checkpoint.manager import Checkpointer, RunFiles, read_folder
from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.paths import flat
from llm_jax.data.tokenizers import raw_bytes
from llm_jax.export import hf
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.training.config import CheckpointConfig, describe, resolve
from llm_jax.training.program import build_program
from llm_jax.transforms import merged

SECTIONS = {
    "data": {"sequence_length": 16, "tokenizer": {"name": "raw_bytes"}},
    "train": {"num_steps": 4, "batch_size": 2, "compute_dtype": "float32"},
}
MODEL = model_section(vocab_size=300, tie_embeddings=True)


def program_on(run, count=1):
    mesh = make_mesh(MeshConfig(data=1, fsdp=count), jax.devices()[:count])
    return build_program(run, mesh)


def files(run, folder):
    raw_bytes.make(raw_bytes.Config()).save(folder / "tokenizer")
    return RunFiles(to_dict(run), {}, read_folder(folder / "tokenizer"))


def begun(run, count=1):
    """(parameters, what was said)."""
    said = []
    state = begin.init(run, program_on(run, count), said.append)
    return state, said


def assert_same(a, b):
    a, b = flat(jax.device_get(a)), flat(jax.device_get(b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(workdir, Hugging Face folder, parameters): steps 1 and 2 of a run, and an export of step 2."""
    folder = tmp_path_factory.mktemp("base")
    run = resolve({"model": {**MODEL, "dropout": 0.1}, **SECTIONS})
    program = program_on(run)
    checkpointer = Checkpointer(folder / "run" / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        state = program.init(jax.random.key(100 + step))
        checkpointer.save(step, state, files(run, folder))
    checkpointer.close()
    loaded = load_model(folder / "run", compute_dtype="float32")
    hf.make(say=lambda _: None).export(loaded.model, loaded.tokenizer, run, folder / "hf")
    return folder / "run", folder / "hf", jax.device_get(state.params)


def test_the_model_section_may_be_left_out_or_say_what_differs(base):
    workdir, folder, _ = base
    run = resolve({"init_from": str(workdir), **SECTIONS})
    assert run.model == dataclasses.replace(run.model, **{**MODEL, "dropout": 0.1})
    run = resolve({"init_from": f"hf:{folder}", "model": {"dropout": 0.3}, **SECTIONS})
    assert (run.model.embed_dim, run.model.dropout) == (32, 0.3)
    assert resolve(to_dict(run)) == run
    assert f"config.init_from: hf:{folder}" in describe(run)
    # A whole section needs no folder, as that of a checkpoint whose source is gone.
    assert resolve({**to_dict(run), "init_from": "hf:gone"}).model == run.model


def test_a_model_section_is_found_before_processes_meet(base, run_python):
    """jax.distributed refuses to start once a device has been touched."""
    code = f"""
import jax
from llm_jax.training.config import resolve
for init_from in {[str(base[0]), f"hf:{base[1]}"]!r}:
    resolve({{"init_from": init_from, **{SECTIONS!r}}})
assert not jax._src.xla_bridge.backends_are_initialized()
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("form", ["{run}", "{run}@2", "{run}/checkpoints", "hf:{hf}"])
def test_every_form(base, form):
    workdir, folder, params = base
    init_from = form.format(run=workdir, hf=folder)
    state, said = begun(resolve({"init_from": init_from, **SECTIONS}))
    assert said == [f"beginning with the parameters of {init_from}"]
    assert_same(state.params, params)
    assert int(state.step) == 0


def test_another_step_on_another_mesh(base):
    workdir, _, params = base
    state, _ = begun(resolve({"init_from": f"{workdir}@1", **SECTIONS}), count=2)
    query = state.params["stack"]["layers"]["attention"]["query"]
    assert query.sharding.spec == jax.P(None, "fsdp", None, None)
    assert np.any(jax.device_get(query) != params["stack"]["layers"]["attention"]["query"])
    moments = state.opt_state[1][0].mu["stack"]["layers"]["attention"]["query"]
    assert moments.sharding.spec == query.sharding.spec


def test_heads_may_be_new_and_are_named(base):
    workdir, _, params = base
    run = resolve({"init_from": str(workdir), "model": {"tie_embeddings": False}, **SECTIONS})
    state, said = begun(run)
    assert said[1] == "not in there, so random: head"
    state = jax.device_get(state)
    fresh = program_on(run).init(jax.random.key(run.train.seed)).params["head"]
    np.testing.assert_array_equal(state.params.pop("head"), fresh)
    assert_same(state.params, params)
    frozen = dataclasses.replace(run.optimizer, freeze=("head",))
    with pytest.raises(ConfigError, match=r"^head is not in config.init_from .* it is frozen"):
        begun(dataclasses.replace(run, optimizer=frozen))


def test_what_is_not_needed_is_named(base, tmp_path):
    run = resolve({"model": {**MODEL, "tie_embeddings": False}, **SECTIONS})
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    checkpointer.save(1, program_on(run).init(jax.random.key(0)), files(run, tmp_path))
    checkpointer.close()
    run = resolve({"init_from": str(tmp_path), "model": {"tie_embeddings": True}, **SECTIONS})
    assert begun(run)[1][1:] == ["in there, but not in this model: head"]


@pytest.mark.parametrize(
    ("init_from", "model", "message"),
    [
        ("{run}", {"qk_norm": True}, r"does not fit config.model: missing .*query_norm.scale"),
        ("{run}", {"mlp_dim": 128}, r"shape of stack.layers.mlp.up is \(2, 32, 64\), not \(2, 32, 1"),
        ("{run}@7", {}, "no checkpoint of step 7 .*; steps: 1, 2"),
        ("{run}s", {}, "there is no folder .*runs; forms: hf:FOLDER, WORKDIR, WORKDIR@STEP"),
        ("hf:{run}", {}, "no config.json"),
        ("", {}, "init_from = '': expected"),
        (3, {}, "init_from = 3: expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit(base, init_from, model, message):
    if isinstance(init_from, str):
        init_from = init_from.format(run=base[0])
    with pytest.raises(ConfigError, match=message) as error:
        begun(resolve({"init_from": init_from, "model": model, **SECTIONS}))
    assert "\n" not in str(error.value)


def lora_from(workdir, **lora):
    run = resolve(
        {"init_from": str(workdir), "transforms": [{"name": "lora", "rank": 2, **lora}], **SECTIONS}
    )
    program = program_on(run)
    return run, program, begin.init(run, program, lambda _: None)


def saved(folder, step, state, run):
    checkpointer = Checkpointer(folder / "checkpoints", CheckpointConfig())
    checkpointer.save(step, state, files(run, folder))
    checkpointer.wait()
    return checkpointer


def test_lora_from_a_run_saved_resumed_and_loaded(base, tmp_path):
    workdir, _, params = base
    run, program, state = lora_from(workdir)
    query = state.extra["stack"]["layers"]["attention"]["query"]["base"]
    np.testing.assert_array_equal(query, params["stack"]["layers"]["attention"]["query"])
    batches = [random_batch(2, 16, seed=seed) for seed in range(3)]
    state, _ = program.step(state, batches[0])
    checkpointer = saved(tmp_path, 1, state, run)
    resumed, _ = checkpointer.restore_latest(program.abstract_state, program.state_shardings)
    checkpointer.close()
    for batch in batches[1:]:
        state, metrics = program.step(state, batch)
        resumed, again = program.step(resumed, batch)
        assert metrics == again
    assert_same({"p": state.params, "e": state.extra}, {"p": resumed.params, "e": resumed.extra})
    saved(tmp_path, 3, state, run).close()
    assert_same(params_of(load_model(tmp_path).model), params_of(merged(program.model(state))))


def test_a_quantized_base_is_saved_in_its_bits(base, tmp_path):
    workdir, _, params = base
    run, program, state = lora_from(workdir, quantize="nf4")
    checkpointer = saved(tmp_path, 1, state, run)
    resumed, _ = checkpointer.restore_latest(program.abstract_state, program.state_shardings)
    checkpointer.close()
    assert_same(state.extra, resumed.extra)
    assert flat(resumed.extra)["stack.layers.mlp.up.base.codes"].dtype == np.uint8
    loaded = params_of(load_model(tmp_path).model)
    assert_same({"embed": loaded["embed"]}, {"embed": params["embed"]})
    for path, weight in flat(params).items():
        # Half the widest gap between levels, times the largest of a few standard deviations of 0.02.
        np.testing.assert_allclose(flat(loaded)[path], weight, atol=0.015, err_msg=path)


def test_without_a_source_it_begins_random():
    run = run_config()
    state, said = begun(run)
    assert said == []
    expected = program_on(run).init(jax.random.key(run.train.seed))
    assert_same({"params": state.params}, {"params": expected.params})
