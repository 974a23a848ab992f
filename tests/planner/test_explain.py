"""Runs that die out of memory, or ask first: what they say and how they end."""

import os
import re

import jax
import pytest
import tiny

from llm_jax import train
from llm_jax.core.flags import RunError
from llm_jax.planner import explain
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.program import build_program

GIB = 2**30
# Of virtual memory: more than jax takes to start, less than the step below.
LIMIT = 12 * GIB
TRAIN = [
    "-m", "llm_jax.train", "--config", "configs/gpt_tiny.py",
    "--config.data.tokenizer.vocab_size=300", "--config.model.vocab_size=300",
    "--config.model.num_layers=1", "--config.model.embed_dim=64", "--config.data.sequence_length=64",
    "--config.train.num_steps=2", "--config.schedule.warmup_steps=1", "--config.optimizer.name=adamw",
    "--config.eval.final_bytes=1000", "--config.eval.sample_tokens=1",
]  # fmt: skip
TWO_DEVICES = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
GPU_SAYS = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.3GiB.\nBFC: ..."


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.py").write_text(f"def f{i}(value):\n    return value + {i}\n" * 20)
    return folder


@pytest.mark.slow
def test_a_step_that_does_not_fit(run_python, texts, tmp_path):
    """Under `ulimit -v`, as batch systems set it, so that no machine is large enough."""
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT})); "
        "sys.argv = sys.argv[1:]; runpy.run_module('llm_jax.train', run_name='__main__')"
    )
    result = run_python("-c", code, "train", *TRAIN[2:], "--workdir", tmp_path / "w", "--data", texts,
                        "--config.train.batch_size=16384")  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    *explanation, last = result.stderr.strip().splitlines()
    assert last.startswith("error: out of device memory: allocating "), last
    assert "train.accumulate_steps=2" in last
    assert "while" not in last  # metrics are first read when a checkpoint is to be saved
    text = "\n".join(explanation)
    for said in (
        "does not fit: needs",
        "of 12.00 per chip",
        "largest arrays at the peak",
        "nn/mlp.py:",
    ):
        assert said in text


def test_a_state_that_does_not_fit_is_never_made(run_python, texts, tmp_path):
    result = run_python(*TRAIN, "--workdir", tmp_path / "w", "--data", texts,
                        "--config.model.mlp_dim=40000000000")  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: out of device memory: the state takes 8"), last
    assert "config.mesh.fsdp" in last
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_step_is_explained_before_it_runs(run_python, texts, tmp_path):
    result = run_python(*TRAIN, "--workdir", tmp_path / "w", "--data", texts, "--explain_step",
                        "--config.mesh.fsdp=2", "--config.train.log_every=1",
                        env={"XLA_FLAGS": TWO_DEVICES})  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, step, after = result.stdout.partition("step 1")
    for title in ("Memory per chip at the peak", "Time of a step", "collectives", "over fsdp",
                  "rates measured on this machine"):  # fmt: skip
        assert title in " ".join(before.split()), title
    assert step
    assert "step 2" in after


@pytest.fixture(scope="module")
def run():
    return tiny.run_config()


def evaluate(text):
    """As the loop's `evaluate` would fail."""
    raise jax.errors.JaxRuntimeError(text)


def test_a_step_that_fits_is_not_blamed(run, capfd):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        evaluate(GPU_SAYS)
    message = str(explain.out_of_memory(caught.value, run))
    assert message.startswith(
        "out of device memory: while trying to allocate 12.3GiB, while evaluating; a training step "
        "by itself fits: "
    )
    assert message.count("\n") == 0
    assert "largest arrays at the peak" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RunError("the compiler failed: no memory"), "the compiler failed: no memory"),
        (KeyError("fusion.12"), "KeyError: 'fusion.12'"),
        (ValueError(), "ValueError: ValueError"),
    ],
)
def test_a_compiler_that_cannot_say(run, monkeypatch, failure, said):
    def fail(*_):
        raise failure

    monkeypatch.setattr(explain, "plan_here", fail)
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes."
    )
    assert str(explain.out_of_memory(error, run)) == (
        f"out of device memory: allocating 3.00 GiB (the compiler could not say why: {said})"
    )


@pytest.mark.parametrize(
    "text",
    ["INTERNAL: the device has fallen off the bus", "RESOURCE_EXHAUSTED: too many streams"],
)
def test_other_errors_stay_what_they_are(text, run, monkeypatch, tmp_path):
    error = jax.errors.JaxRuntimeError(text)
    assert explain.out_of_memory(error, run) is None

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr("sys.argv", ["train", *TRAIN[2:], "--workdir", str(tmp_path / "w")])
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        train.main()
    assert caught.value is error


def test_a_state_that_fits_passes(run, monkeypatch):
    program = build_program(run, make_mesh(run.mesh))
    explain.check_state(program)
    monkeypatch.setattr(explain, "device_memory", lambda _: 1000)
    with pytest.raises(RunError, match="of a device"):
        explain.check_state(program)
    monkeypatch.setattr(explain, "device_memory", lambda _: None)  # devices that do not say
    explain.check_state(program)
