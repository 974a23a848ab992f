"""Compiling in a process of its own: its answers, its memory of them, its end."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest

from llm_jax.core.config import ConfigError, to_dict
from llm_jax.core.flags import RunError
from llm_jax.planner import compile as planner_compile
from llm_jax.planner import worker as planner_worker
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.compile import Request, compile_many, compile_step
from llm_jax.planner.compiled import (
    Argument,
    CompiledStep,
    MemoryAnalysis,
    MeshAxis,
    OutOfMemory,
    Span,
)
from llm_jax.planner.memory import read_memory
from llm_jax.planner.worker import compile_here
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

CONFIG = to_dict(
    resolve(
        {
            "model": {
                "name": "gpt", "vocab_size": 512, "embed_dim": 512, "num_layers": 2,
                "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 512, "max_length": 128,
            },
            "data": {"sequence_length": 128, "tokenizer": {"name": "raw_bytes"}},
            "mesh": {"fsdp": -1},
            "train": {"num_steps": 10, "batch_size": 8},
        }
    )
)  # fmt: skip


def changed(**train):
    config = copy.deepcopy(CONFIG)
    config["train"].update(train)
    return config


def parameter_names(hlo):
    """Of the entry computation, in the order of the program's parameters."""
    entry = hlo[hlo.index("\nENTRY") :].partition("\n}")[0]
    found = re.findall(r'parameter\((\d+)\).*?op_name="([^"]*)"', entry)
    by_number = {int(number): name.replace("\\'", "'") for number, name in found}
    return [by_number[number] for number in sorted(by_number)]


ARGUMENT = Argument(
    "params.w", "state.params['w']", "parameter", (4, 8), "float32", (("data", "fsdp"), ()), (1, 8), 32,
)  # fmt: skip
STEP = CompiledStep(
    "v5p:2x2x1", {"train": {"batch_size": 4}}, (MeshAxis("fsdp", 4, (Span("link", 0, 4, True),)),),
    (ARGUMENT,), 32, 1024, {"full": 1.5}, {"lower": 0.5}, 7, {"jax": "1"},
    MemoryAnalysis(1, 2, 3, 4, 5, None), OutOfMemory(2, 1, "no"), "HloModule", "buffers", "ranges",
    "TPU v5", 99,
)  # fmt: skip


def test_a_step_comes_back_from_its_folder_as_it_was(tmp_path):
    STEP.save(tmp_path / "step")
    assert CompiledStep.load(tmp_path / "step") == STEP
    (tmp_path / "step" / "step.json").unlink()
    with pytest.raises(FileNotFoundError):
        CompiledStep.load(tmp_path / "step")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A step on four v5e chips, and the cache that holds it."""
    cache = tmp_path_factory.mktemp("plans")
    return compile_step(Request(CONFIG, "v5e:2x2"), cache), cache


@libtpu
def test_every_argument_is_named_as_the_program_names_it(compiled):
    step, _ = compiled
    assert [argument.name for argument in step.arguments] == parameter_names(step.hlo)
    assert sum(a.bytes for a in step.arguments) == pytest.approx(step.memory.arguments, rel=0.01)
    by_path = {argument.path: argument for argument in step.arguments}
    up = by_path["params.stack.layers.mlp.up"]
    assert (up.kind, up.shape, up.shard_shape) == ("parameter", (2, 512, 512), (2, 128, 512))
    assert up.spec == ((), ("fsdp",), ())
    assert by_path["batch.tokens"].kind == "batch"
    parameters = [a for a in step.arguments if a.kind == "parameter"]
    moments = [a for a in step.arguments if a.kind == "optimizer" and a.shape]
    assert len(moments) == 2 * len(parameters)


@libtpu
def test_a_compiled_step_holds_what_the_analyses_read(compiled):
    step, _ = compiled
    assert "estimated_cycles" in step.hlo
    assert "BufferAssignment" in step.buffer_assignment
    assert "BufferLiveRange" in step.live_ranges
    assert step.out_of_memory is None
    assert step.memory.peak > step.memory.arguments
    assert {axis.name: axis.size for axis in step.mesh if axis.size > 1} == {"fsdp": 4}
    assert step.tokens_per_step == 8 * 128
    assert step.model_flops["full"] > step.model_flops["causal"] > 6 * 2 * 4 * 512**2
    assert step.device_kind in CHIPS["v5e"].device_kinds
    assert set(step.versions) == {"jax", "jaxlib", "libtpu"}


@pytest.mark.slow
@libtpu
def test_the_memory_of_a_tpu_program_is_the_compilers_and_names_every_parameter():
    # With so many rows the compiler's peak is one of HBM: that of the small step is one of VMEM.
    step = compile_step(Request(changed(batch_size=1024), "v5e:2x2"))
    memory = read_memory(step, CHIPS["v5e"].hbm_bytes)
    assert sum(memory.parts.values()) == memory.peak
    assert memory.peak - memory.parts["unused"] == pytest.approx(step.memory.peak, rel=0.02)
    named = {f"params.{b.module}" for b in memory.buffers if b.part == "parameters"}
    assert named == {a.path for a in step.arguments if a.kind == "parameter"}


@libtpu
def test_the_same_request_starts_no_process(compiled, monkeypatch):
    step, cache = compiled
    monkeypatch.setattr(planner_compile.subprocess, "Popen", None)
    assert compile_step(Request(CONFIG, "v5e:2x2"), cache) == step
    with pytest.raises(TypeError):
        compile_step(Request(CONFIG, "v5e:2x4"), cache)


@libtpu
def test_the_same_program_is_lowered_but_not_compiled_again(compiled):
    step, cache = compiled
    again = compile_step(Request(changed(log_every=7), "v5e:2x2"), cache)
    assert again.seconds == step.seconds, "measured once"
    assert again.config["train"]["log_every"] == 7
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1


@libtpu
def test_too_little_memory_is_an_answer():
    step = compile_step(Request(changed(batch_size=2**19), "v5e:2x2"))
    assert step.memory is None
    assert step.out_of_memory.needed > 2 * step.out_of_memory.available
    assert step.out_of_memory.available == CHIPS["v5e"].hbm_bytes
    assert "\n" not in step.out_of_memory.message
    assert parameter_names(step.hlo) == [argument.name for argument in step.arguments]
    assert step.buffer_assignment
    assert step.live_ranges


@libtpu
def test_what_cannot_be_built_is_the_users_one_line():
    with pytest.raises(
        ConfigError, match=r"batch_size 6 .* does not divide over mesh fsdp"
    ) as caught:
        compile_step(Request(changed(batch_size=6), "v5e:2x2"))
    assert "\n" not in str(caught.value)


def test_targets_without_a_compiler_here(monkeypatch):
    with pytest.raises(ConfigError, match="only an estimate"):
        compile_step(Request(CONFIG, "h100-8"))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r'pip install "llm_jax\[tpu\]"'):
        compile_step(Request(CONFIG, "v5e:2x2"))


def test_the_process_at_hand_can_compile_for_its_devices(tmp_path):
    run = resolve(CONFIG)
    program = build_program(run, make_mesh(run.mesh))
    step = compile_here(program, run, "local", tmp_path / "dumps")
    assert parameter_names(step.hlo) == [argument.name for argument in step.arguments]
    assert step.buffer_assignment
    assert step.live_ranges
    assert step.out_of_memory is None
    (fsdp,) = (axis for axis in step.mesh if axis.name == "fsdp")
    assert fsdp.spans == (Span("core", 0, fsdp.size, False),)
    step.save(tmp_path / "step")
    assert CompiledStep.load(tmp_path / "step").arguments == step.arguments


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Puts a shell script in the compiler's place; it gets the folder as $4."""

    def install(script):
        file = tmp_path / "worker"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(planner_compile.sys, "executable", str(file))

    return install


LOCAL = Request(CONFIG, "local")


def test_a_crash_says_its_last_line_and_where_the_log_is(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(planner_compile.tempfile, "tempdir", str(tmp_path))
    worker("echo first; echo 'Check failed: a > b' >&2; exit 3")
    with pytest.raises(RunError, match="local failed: Check failed: a > b; log: ") as caught:
        compile_step(LOCAL)
    log = str(caught.value).rpartition("log: ")[2]
    assert Path(log).read_text() == "first\nCheck failed: a > b\n"
    worker(
        "echo 'F0727 09:12 Check failed: a == b'; echo '    @ 0x55 main'; echo 'https://x/?trace=1'"
    )
    with pytest.raises(RunError, match="local failed: F0727 09:12 Check failed: a == b; log: "):
        compile_step(LOCAL)
    worker("kill -9 $$")
    with pytest.raises(RunError, match="ran out of memory"):
        compile_step(LOCAL)


def test_stopping_kills_the_compiler_and_leaves_nothing_in_the_cache(worker, tmp_path):
    worker(f"echo $$ > {tmp_path}/pid; sleep 60")
    cache, stop = tmp_path / "cache", threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(RunError, match="stopped"):
        compile_step(LOCAL, cache, stop=stop)
    assert list(cache.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_leaving_many_early_kills_the_rest(worker, tmp_path):
    # The first to come fails at once, the others would run for a minute.
    worker(f"mkdir {tmp_path}/first && exit 1; echo $$ > {tmp_path}/$$.pid; sleep 60")
    start = time.perf_counter()
    results = compile_many([LOCAL] * 4, jobs=2)
    request, result = next(results)
    while len(list(tmp_path.glob("*.pid"))) < 2:
        time.sleep(0.02)
    results.close()
    assert (request, type(result)) == (LOCAL, RunError)
    assert time.perf_counter() - start < 30
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.stem), 0)


def test_a_failure_among_many_is_a_result(worker):
    worker("""echo '{"kind": "config", "message": "no such thing"}' > $4/answer.json""")
    results = list(compile_many([LOCAL, dataclasses.replace(LOCAL, options={"a": "b"})], jobs=2))
    assert sorted(len(request.options) for request, _ in results) == [0, 1]
    assert {type(result) for _, result in results} == {ConfigError}


def test_the_cache_keeps_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(planner_compile, "KEPT", 2)
    for age, name in enumerate(("new", "newer", "old", ".compiling-dead")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.key").write_text(name)
        then = time.time() - (1, 0, 50, 2 * planner_compile.DAY)[age]
        os.utime(tmp_path / name, (then, then))
    planner_compile._forget(tmp_path)
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {"new", "newer"}
    assert {f.name for f in tmp_path.glob("*.key")} == {"new.key", "newer.key"}


def test_what_is_left_of_an_answer_is_made_again(tmp_path):
    cache, made = tmp_path / "cache", tmp_path / "made"
    (cache / "abc").mkdir(parents=True)
    (cache / "abc" / "hlo.txt").write_text("half")
    assert planner_compile._remember(cache, None, "abc", made) is None
    STEP.save(made)
    assert planner_compile._remember(cache, "first", "abc", made) == STEP
    assert (cache / "first.key").read_text() == "abc"


def test_the_memory_of_a_machine_and_its_compiler_are_part_of_the_key(monkeypatch):
    run = resolve(CONFIG)
    program = build_program(run, make_mesh(run.mesh))
    lowered, keys = program.lower(), set()
    key = lambda: planner_worker._key(lowered, LOCAL, program.mesh)  # noqa: E731
    keys |= {key(), key()}
    assert len(keys) == 1
    monkeypatch.setattr(planner_worker, "device_memory", lambda _: 2**33)
    keys.add(key())
    monkeypatch.setattr(planner_worker.xla_flags, "device_options", lambda _: {"a": "1"})
    keys.add(key())
    assert len(keys) == 3


def test_a_compiler_for_tpus_sees_nothing_of_this_machine(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_mine=1")
    monkeypatch.setenv("LLM_JAX_XLA_FLAGS", "off")
    away = planner_compile._environment("v5p-8")
    assert away["JAX_PLATFORMS"] == "cpu"
    assert "XLA_FLAGS" not in away
    assert "LIBTPU_INIT_ARGS" not in away
    assert "LLM_JAX_XLA_FLAGS" not in away
    assert planner_compile._environment("local")["XLA_FLAGS"] == "--xla_mine=1"


def test_asking_needs_no_jax(run_python):
    code = (
        "import sys, llm_jax.planner.compile; print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert planner_compile.default_cache() == tmp_path / "llm_jax" / "plans"
    assert json.dumps(dataclasses.asdict(LOCAL)), "a request travels as JSON"


@pytest.mark.parametrize(
    ("message", "report", "over"),
    [
        ("Used 15.77G of 15.75G hbm. Exceeded hbm capacity by 19.32M.", 16_816_648_192, 20_000_000),
        ("temporaries (21.60G) exceeds available HBM (15.75G).", 23_190_269_440, 6_278_835_712),
        ("Used 15.75G of 15.75G hbm.", 16_816_648_192, 1),
    ],
)
def test_what_the_compiler_refuses_needs_more_than_there_is(tmp_path, message, report, over):
    text = f"Memory Space: default (color=0)\nTotal bytes: {report} (1GiB)\n"
    (tmp_path / "m.after_optimizations-memory-usage-report.txt").write_text(text)
    found = planner_worker._out_of_memory(Exception(f"RESOURCE_EXHAUSTED: {message}"), tmp_path)
    assert found.available == int(15.75 * 2**30)
    assert found.needed - found.available == pytest.approx(over, rel=0.1)
