"""Planted faults: each is found and named, and a step without faults raises no alarm."""

import dataclasses

import jax.numpy as jnp
import pytest
from small_step import compile_small

from llm_jax.nn import losses, transformer
from llm_jax.objectives import causal_lm
from llm_jax.planner import lint as lint_module
from llm_jax.planner.collectives import exchanges_of
from llm_jax.planner.lint import lint
from llm_jax.sharding.rules import RULE_SETS, AxisRules, constrain

MESH = {"fsdp": 4, "tensor": 2}
LARGE_HEAD = {"length": 1024, "vocab_size": 2**14, "num_layers": 2}


@pytest.fixture(scope="module")
def sound():
    return compile_small({"pipeline": 2, "fsdp": 2, "tensor": 2}, num_layers=4)


def kinds(findings):
    return {finding.kind for finding in findings}


def test_no_alarm_without_faults(sound, monkeypatch):
    monkeypatch.setattr(lint_module, "LARGE_PARAMETER", 2**10)
    monkeypatch.setattr(lint_module, "WORTH_A_WORD", 2**10)
    assert kinds(lint(sound, None)) <= {"note"}


def test_a_replicated_embedding(monkeypatch):
    whole = {"vocab": None, "embed": None}
    monkeypatch.setitem(RULE_SETS, "default", RULE_SETS["default"] | whole)
    monkeypatch.setattr(AxisRules, "of_optimizer", lambda self: self)
    step = compile_small(MESH, vocab_size=2**18)
    found = [f for f in lint(step, None) if f.kind == "replicated"]
    assert {f.text.split()[0] for f in found} == {"params.embed", "params.head"}
    embed = next(f for f in found if "params.embed" in f.text)
    assert "float32[262144, 64] is whole over fsdp+tensor: 64.0 MiB" in embed.text
    assert 'rule "embed" -> "fsdp"' in embed.text
    assert 'rule "vocab" -> "tensor"' in embed.text
    assert embed.bytes == 3 * 2**26  # with both moments of AdamW
    assert embed.source.startswith("llm_jax/models/gpt/model.py:")


def test_zero1_replicates_on_purpose_and_logits_come_in_chunks(monkeypatch):
    step = compile_small({"fsdp": 8, "rules": "zero1"}, **LARGE_HEAD)
    monkeypatch.setattr(lint_module, "LARGE_PARAMETER", 2**10)
    assert kinds(lint(step, None)) <= {"note"}
    gathered = [e for e in exchanges_of(step) if e.kind == "all-gather" and e.role == "parameter"]
    assert gathered
    assert {e.direction for e in gathered} == {"optimizer"}


def test_a_sharding_that_forces_an_all_gather(monkeypatch):
    monkeypatch.setattr(transformer, "constrain", lambda x, *axes: constrain(x, None, None, None))
    step = compile_small(MESH)
    found = [f for f in lint(step, None) if f.kind == "resharding"]
    assert found
    assert all("fsdp" in f.text and "stack" in f.text for f in found)
    gathers = [f for f in found if "all-gather over fsdp" in f.text]
    assert gathers
    assert "[64, 128, 64]" in gathers[0].text
    assert gathers[0].bytes == 64 * 128 * 64 * 4
    assert any(f.source.startswith("llm_jax/nn/transformer.py:") for f in gathers)


def test_parameters_gathered_before_the_layer_loop(monkeypatch):
    scan = transformer.Stack._scan

    def gather_first(self, *arguments):
        up = self.layers.mlp.up
        up.set_value(constrain(up.get_value(), None, None, "mlp"))
        return scan(self, *arguments)

    monkeypatch.setattr(transformer.Stack, "_scan", gather_first)
    monkeypatch.setattr(lint_module, "WORTH_A_WORD", 2**10)
    found = [f for f in lint(compile_small(MESH), None) if f.kind == "gather"]
    assert len(found) == 1
    assert "params.stack.layers.mlp.up is gathered over fsdp for 3 layers at once" in found[0].text
    assert found[0].source
    assert found[0].bytes == 3 * 64 * 192 // 2 * 4


def test_logits_not_chunked(monkeypatch):
    def plain(precision, hidden, head, targets, weights, z_loss=0.0):
        logits = precision.einsum(head.spec, hidden, head.weights, out_dtype=jnp.float32)
        return losses.logits_loss(logits, targets, weights, z_loss)

    monkeypatch.setattr(causal_lm, "head_loss", plain)
    found = [f for f in lint(compile_small({"fsdp": 8}, **LARGE_HEAD), None) if f.kind == "logits"]
    assert len(found) == 1
    assert "[8, 1024, 16384]" in found[0].text or "[8192, 16384]" in found[0].text
    assert found[0].bytes == 4 * 8 * 1024 * 2**14
    assert found[0].source.startswith("llm_jax/")


def test_findings_of_a_step_without_a_program(sound):
    assert lint(dataclasses.replace(sound, hlo=""), None) == ()
