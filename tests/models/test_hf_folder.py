"""Parameters of a folder onto any devices: streamed, checked, and never from pickles."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pytest
from decoder_cases import config_of, export, params_of, random_model
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError
from llm_jax.models import hf_folder, hf_tensors
from llm_jax.models.hf_folder import load, load_config, load_params
from llm_jax.models.hf_table import Family


@pytest.fixture(scope="module", params=["mixtral", "gpt2"])
def folder(request, tmp_path_factory):
    """(model, folder in many files)."""
    model = random_model(config_of(request.param))
    path = tmp_path_factory.mktemp(request.param) / "out"
    export(model, path, shard_bytes=30_000)
    assert len(list(path.glob("*.safetensors"))) > 3
    return model, path


def shardings(params, choose):
    return jax.tree.map(lambda x: choose(np.asarray(x)), params)


def by_axis(mesh, *wanted):
    """Cuts the first of these axes that is there and divides; else every device has everything."""

    def choose(x):
        for axis in wanted:
            if axis < x.ndim and x.shape[axis] % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
        return NamedSharding(mesh, PartitionSpec())

    return choose


@pytest.mark.parametrize("axes", [(1, 0), (2, 1), (0,)], ids=["second", "third", "layers"])
def test_any_shares_hold_the_same_parameters(folder, axes):
    model, path = folder
    wanted = params_of(model)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "fsdp"))
    places = shardings(wanted, by_axis(mesh, *axes))
    found = load_params(path, model.config, places)
    jax.tree.map(
        lambda x, place: x.sharding == place or pytest.fail(str(x.sharding)), found, places
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(found))


def test_one_config_of_the_folder(folder):
    model, path = folder
    assert load_config(path) == model.config


def single(model):
    return shardings(params_of(model), lambda _: SingleDeviceSharding(jax.devices()[0]))


def test_training_may_differ_and_the_model_may_not(folder):
    model, path = folder
    free = dataclasses.replace(model.config, dropout=0.3, remat="full", init_stddev=0.1)
    load_params(path, free, single(model))
    other = dataclasses.replace(model.config, norm_epsilon=0.1)
    with pytest.raises(ConfigError, match=r"norm_epsilon = 0\.1 \(it has 1e-05\)") as error:
        load_params(path, other, single(model))
    assert "\n" not in str(error.value)


def test_another_kind_of_model_is_refused(folder, monkeypatch):
    model, path = folder
    family = dataclasses.replace(hf_folder.families()["gpt"], config=int)
    monkeypatch.setattr(hf_folder, "families", lambda: {"gpt": family})
    monkeypatch.setattr(Family, "config_from_hf", lambda *_: model.config)
    with pytest.raises(ConfigError, match=r"which is model\.name = 'gpt'"):
        load_params(path, model.config, {})


def small(tmp_path, case="qwen2"):
    model = random_model(config_of(case))
    export(model, tmp_path / "out")
    return model, tmp_path / "out"


def rewrite(path, change):
    save_file(change(load_file(path / hf_tensors.SINGLE)), path / hf_tensors.SINGLE)


def with_heads(path, monkeypatch, heads, **changes):
    """The family's table with this pattern of heads."""
    family = hf_folder.families()["gpt"]
    architectures = [dataclasses.replace(a, heads=heads, **changes) for a in family.architectures]
    family = dataclasses.replace(family, architectures=tuple(architectures))
    monkeypatch.setattr(hf_folder, "families", lambda: {"gpt": family})


def test_heads_come_and_go(tmp_path, monkeypatch):
    model, path = small(tmp_path)

    def change(tensors):
        tensors["score.weight"] = tensors.pop("lm_head.weight")
        return tensors

    rewrite(path, change)
    with pytest.raises(ConfigError, match=r"missing lm_head\.weight; extra score\.weight"):
        load_params(path, model.config, single(model))
    with_heads(path, monkeypatch, r"lm_head\..*|score\..*")
    found = load_params(path, model.config, single(model))
    wanted = params_of(model)
    assert flatten_dict(wanted).keys() - flatten_dict(found).keys() == {("head",)}
    with pytest.raises(ConfigError, match=r"missing lm_head\.weight$"):
        load(path)


def test_older_names_and_copies(tmp_path, monkeypatch):
    model, path = small(tmp_path, "llama_head_dim")  # tied
    embed = "model.embed_tokens.weight"

    def change(tensors):
        tensors = {name.replace("norm.weight", "norm.gamma"): x for name, x in tensors.items()}
        tensors["lm_head.weight"] = tensors.pop(embed)
        return tensors

    rewrite(path, change)
    with pytest.raises(ConfigError, match=r"missing model\.layers\.0\.input_layernorm\.weight"):
        load(path)
    with_heads(path, monkeypatch, None, renames=((r"norm\.gamma$", "norm.weight"),))
    found, _ = load(path)
    jax.tree.map(np.testing.assert_array_equal, params_of(found), params_of(model))


def test_copies_are_compared_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tensors, "_COMPARED", 1000)
    _, path = small(tmp_path, "llama_head_dim")
    for half in (np.float32, np.float16):
        rewrite(path, lambda t: {k: x.astype(half) for k, x in t.items()})  # noqa: B023
        tied = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()}  # noqa: E731
        rewrite(path, tied)
        load(path)

    def change(tensors):
        tensors["lm_head.weight"][-1, -1] += 1
        return tensors

    rewrite(path, change)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed"):
        load(path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    _, path = small(tmp_path)
    (path / hf_tensors.SINGLE).rename(path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickles only \(pytorch_model\.bin\)") as error:
        load(path)
    assert re.search(r"save_pretrained\('NEW_FOLDER'\)", str(error.value))
    assert "\n" not in str(error.value)


def test_many_wrong_names_are_counted(tmp_path):
    _, path = small(tmp_path)
    rewrite(path, lambda t: {k: x for k, x in t.items() if "layers" not in k})
    with pytest.raises(ConfigError, match=r"missing model\.layers\.0\..* and 16 more$"):
        load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "has no weight_map"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": [1]}', "expected names and files"),
        ('{"weight_map": {"a": 1}}', "expected names and files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
    ],
)
def test_a_broken_index(tmp_path, content, words):
    _, path = small(tmp_path)
    (path / hf_tensors.INDEX).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_file_cut_short(tmp_path):
    _, path = small(tmp_path)
    whole = (path / hf_tensors.SINGLE).read_bytes()
    (path / hf_tensors.SINGLE).write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_a_config_that_is_no_section(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds list"):
        load_config(tmp_path)


MEASURE = """
import gc, re, sys
from pathlib import Path
from llm_jax.models.hf_folder import load
def resident(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
load(Path(sys.argv[1]))  # what the first time takes is the compiler's
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
model, _ = load(Path(sys.argv[1]))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_grows_by_the_model_and_one_tensor(tmp_path, run_python):
    config = dataclasses.replace(config_of("llama"), embed_dim=512, num_layers=6, mlp_dim=2048)
    model = random_model(dataclasses.replace(config, num_heads=8, num_kv_heads=8, head_dim=128))
    size = sum(x.nbytes for x in jax.tree.leaves(params_of(model)))
    largest = 512 * 2048 * 4  # as a tensor of the folder; our stacked ones are 6 times that
    export(model, tmp_path / "out")
    # Else glibc raises by itself the size from which it gives freed blocks back at once.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = run_python("-c", MEASURE, tmp_path / "out", env=allocator)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * 1024
    # As read, as cut for a device, and as written there; the rest is the allocator's.
    assert 0.9 * size <= grown < size + 3 * largest + 10e6, (grown, size, largest)
