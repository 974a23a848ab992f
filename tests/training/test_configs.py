"""Every file of configs/: it says what it is for, trains when shrunk, and builds for a pod."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from bench.families import random_batch
from llm_jax.core.config import load, to_dict
from llm_jax.sharding.mesh import MeshConfig, make_mesh
from llm_jax.sharding.place import to_global_batch
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program

CONFIGS = sorted((Path("configs")).glob("*.py"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
LENGTH, VOCAB = 32, 512
TINY = {
    "vocab_size": VOCAB, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "num_decoder_layers": 2, "head_dim": 8, "mlp_dim": 64, "max_length": 64, "num_positions": 66,
    "attention_window": 8, "scan_unroll": 1, "remat": "none", "init_stddev": 0.02,
    "norm_epsilon": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
TINY_EXPERTS = {"num_experts": 4, "experts_per_token": 2, "mlp_dim": 16}


@every_config
def test_it_says_what_it_is_for(path):
    for line in ("Purpose:", "Hardware:", "Expect:", "Command:"):
        assert re.search(rf"^{line}", path.read_text(), re.MULTILINE)


def shrunk(path):
    """The config with small sizes, all kinds of layers and losses kept: several become the same."""
    sections = to_dict(resolve(load(str(path))))
    model = sections["model"]
    model |= {k: v for k, v in TINY.items() if model.get(k) is not None}
    if model.get("experts"):
        model["experts"] |= TINY_EXPERTS
    model["num_layers"] *= (model.get("global_every") or 2) // 2
    sections["data"] |= {
        "sequence_length": LENGTH,
        "tokenizer": {"name": "raw_bytes"},
        "sources": [],
    }
    if sections["objective"].get("target_length"):
        sections["objective"]["target_length"] = LENGTH
    sections["schedule"] = {"name": "constant"}
    model["dropout"] = 0.0
    sections["train"] = {"num_steps": 2, "batch_size": 4}
    if sections["optimizer"]["name"] == "adamw":
        part = ("name", "freeze", "layer_decay")
        sections["optimizer"] = {k: sections["optimizer"][k] for k in part}
    del sections["eval"], sections["checkpoint"], sections["mesh"], sections["init_from"]
    return resolve(sections)


@functools.cache
def losses(run):
    program = build_program(run, make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = to_global_batch(
        random_batch(program.batch_spec, VOCAB), program.rules, run.train.batch_size
    )
    state = program.init(jax.random.key(0))
    found = []
    for _ in range(2):
        state, metrics = program.step(state, batch)
        found.append(float(metrics["loss"]))
    return found


# Shrunk, these are near another: Mixtral, BERT of pairs, T5.
ALIKE = ("moe_tiny", "qwen3_moe_30b_a3b", "minilm_fortunes", "translate_t5")
SHRUNK = [pytest.param(p, marks=pytest.mark.slow if p.stem in ALIKE else ()) for p in CONFIGS]


@pytest.mark.parametrize("path", SHRUNK, ids=[p.stem for p in CONFIGS])
def test_it_trains_two_steps_when_shrunk(path):
    """Those that differ in size alone are one program."""
    first, second = losses(shrunk(path))
    assert np.isfinite([first, second]).all()
    assert second < first  # on the same batch, without dropout


def test_all_build_for_256_devices_in_shares_and_in_parallel(run_python):
    code = """
import os, pathlib
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"
from llm_jax.core.config import load, set_override
from llm_jax.sharding.mesh import make_mesh
from llm_jax.training.config import resolve
from llm_jax.training.program import build_program
mesh = ["mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=4", "train.batch_size=256", "train.accumulate_steps=1"]
for path in sorted(pathlib.Path("configs").glob("*.py")):
    config = load(str(path), mesh)
    config.model.vocab_size = -(-config.model.vocab_size // 8) * 8
    run = resolve(config)
    program = build_program(run, make_mesh(run.mesh))
    split = [s.spec for s in jax.tree.leaves(program.state_shardings.params)]
    print(path.stem, program.num_params, any("fsdp" in str(s) for s in split), any("tensor" in str(s) for s in split))
""".replace("import os,", "import jax, os,")
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [path.stem for path in CONFIGS]
    assert all(row[2:] == ["True", "True"] for row in rows), result.stdout
    assert all(int(row[1]) > 1e6 for row in rows)
