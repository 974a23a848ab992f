"""Planted faults: each is found and named, and a step without faults raises no alarm."""

import dataclasses

import jax.numpy as jnp
import pytest
from small_step import compile_small

from llm_jax.nn import block, losses, transformer
from llm_jax.planner import lint as lint_module
from llm_jax.planner.collectives import Namer, exchanges_of
from llm_jax.planner.compiled import Argument, CompiledStep, MeshAxis
from llm_jax.planner.lint import lint
from llm_jax.planner.make import make_plan
from llm_jax.planner.topology import parse_target
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
    assert kinds(lint(Namer(sound), None)) <= {"note"}


def test_no_alarm_where_a_share_of_the_head_has_as_many_features_as_there_are_tokens(monkeypatch):
    for module in (losses, lint_module):  # so that an embedding table is larger than a chunk
        monkeypatch.setattr(module, "CHUNK_BYTES", 2**17)
        monkeypatch.setattr(module, "MIN_CHUNK_TOKENS", 16)
    step = compile_small(MESH, length=16, vocab_size=1024, embed_dim=256, num_layers=1)
    assert any("f32[512,256]" in line for line in step.hlo.splitlines())
    assert kinds(lint(Namer(step), None)) <= {"note"}


def test_a_replicated_embedding(monkeypatch):
    whole = {"vocab": None, "embed": None}
    monkeypatch.setitem(RULE_SETS, "default", RULE_SETS["default"] | whole)
    monkeypatch.setattr(AxisRules, "of_optimizer", lambda self: self)
    step = compile_small(MESH, vocab_size=2**18)
    found = [f for f in lint(Namer(step), None) if f.kind == "replicated"]
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
    assert kinds(lint(Namer(step), None)) <= {"note"}
    gathered = [
        e for e in exchanges_of(Namer(step)) if e.kind == "all-gather" and e.role == "parameter"
    ]
    assert gathered
    assert {e.direction for e in gathered} == {"optimizer"}


def test_a_sharding_that_forces_an_all_gather(monkeypatch):
    monkeypatch.setattr(block, "constrain", lambda x, *axes: constrain(x, None, None, None))
    step = compile_small(MESH)
    found = [f for f in lint(Namer(step), None) if f.kind == "resharding"]
    assert found
    assert all("fsdp" in f.text and "stack" in f.text for f in found)
    gathers = [f for f in found if "all-gather over fsdp" in f.text]
    assert gathers
    assert "[64, 128, 64]" in gathers[0].text
    assert gathers[0].bytes == 64 * 128 * 64 * 4
    assert any(f.source.startswith("llm_jax/nn/block.py:") for f in gathers)


def test_parameters_gathered_before_the_layer_loop(monkeypatch):
    scan = transformer.Stack._scan

    def gather_first(self, *arguments):
        up = self.layers.mlp.up
        up.set_value(constrain(up.get_value(), None, None, "mlp"))
        return scan(self, *arguments)

    monkeypatch.setattr(transformer.Stack, "_scan", gather_first)
    monkeypatch.setattr(lint_module, "WORTH_A_WORD", 2**10)
    found = [f for f in lint(Namer(compile_small(MESH)), None) if f.kind == "gather"]
    assert len(found) == 1
    assert "params.stack.layers.mlp.up is gathered over fsdp for 3 layers at once" in found[0].text
    assert found[0].source
    assert found[0].bytes == 3 * 64 * 192 // 2 * 4


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, MESH], ids=["whole", "in shares"])
def test_logits_not_chunked(mesh, monkeypatch):
    def plain(precision, hidden, head, targets, weights, z_loss, label_smoothing):
        logits = precision.einsum(head.spec, hidden, head.weights, out_dtype=jnp.float32)
        return losses.logits_loss(logits, targets, weights, z_loss)

    monkeypatch.setattr(losses, "head_loss", plain)
    tensor = mesh.get("tensor", 1)
    # Chunks of so many tokens are smaller than the logits only where a chunk has a share of the words.
    monkeypatch.setattr(lint_module, "MIN_CHUNK_TOKENS", 6000 * tensor)
    step = compile_small(mesh, **LARGE_HEAD)
    found = [f for f in lint(Namer(step), None) if f.kind == "logits"]
    assert len(found) == 1
    rows, words = 8 * tensor, 2**14 // tensor
    whole = (f"[{rows}, 1024, {words}]", f"[{rows * 1024}, {words}]")
    assert any(shape in found[0].text for shape in whole)
    assert found[0].bytes == 4 * 8 * 1024 * 2**14
    assert found[0].source.startswith("llm_jax/")


def test_findings_of_a_step_without_a_program(sound):
    plan = make_plan(dataclasses.replace(sound, hlo=""), parse_target("local"))
    assert plan.findings == ()


# One weight in shares, as a compiler that is not there would gather it and reduce its gradient.
HLO = """\
HloModule jit_step, is_scheduled=true, input_output_alias={{ {{0}}: (0, {{}}, may-alias) }}, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %added = f32[] add(%a, %b)
}}

ENTRY %main (w: f32[1024,256], x: f32[8,4096]) -> (f32[1024,256]) {{
  %w = f32[1024,256]{{1,0}} parameter(0), metadata={{op_name="state.params['w']"}}
  %x = f32[8,4096]{{1,0}} parameter(1), metadata={{op_name="batch['x']"}}
  %zero = s32[] constant(0)
{gathers}
  %gradient = f32[4096,256]{{1,0}} dot(%x, %y.0), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}, metadata={{op_name="jit(step)/transpose(jvp(mlp))/dot_general"}}
{reduction}
  %w.1 = f32[1024,256]{{1,0}} subtract(%w, %share)
  ROOT %out = (f32[1024,256]{{1,0}}) tuple(%w.1)
}}
"""
GATHER = """\
  %gathered.{0} = f32[4096,256]{{1,0}} all-gather(%w), channel_id=1{0}, replica_groups=[1,4]<=[4], dimensions={{0}}, use_global_device_ids=true, metadata={{op_name="jit(step)/jvp(mlp)/dot_general"}}
  %y.{0} = f32[8,256]{{1,0}} dot(%x, %gathered.{0}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"""
SCATTERED = """\
  %share = f32[1024,256]{1,0} reduce-scatter(%gradient), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true, to_apply=%sum"""
CUT = """\
  %reduced = f32[4096,256]{1,0} all-reduce(%gradient), channel_id=2, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%sum
  %share = f32[1024,256]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={1024,256}"""


def written(gathers: int = 1, reduction: str = SCATTERED, **model) -> CompiledStep:
    text = HLO.format(gathers="\n".join(map(GATHER.format, range(gathers))), reduction=reduction)
    arguments = (
        Argument("params.w", "state.params['w']", "parameter", (4096, 256), "float32",
                 (("fsdp",), ()), (1024, 256), 2**20),
        Argument("batch.x", "batch['x']", "batch", (32, 4096), "float32", (("fsdp",), ()),
                 (8, 4096), 2**17),
    )  # fmt: skip
    return CompiledStep(
        target="v5e:2x2", config={"model": model}, mesh=(MeshAxis("fsdp", 4, ()),),
        arguments=arguments, num_params=0, tokens_per_step=0, model_flops={}, seconds={},
        host_peak_bytes=0, versions={}, memory=None, out_of_memory=None, hlo=text,
        buffer_assignment="", live_ranges="",
    )  # fmt: skip


@pytest.mark.parametrize(("most", "model"), [(4, {}), (8, {"experts": {"num_experts": 4}})])
def test_a_parameter_gathered_more_often_than_passes_need(most, model):
    assert lint(Namer(written(most, **model)), None) == ()
    (finding,) = lint(Namer(written(most + 1, **model)), None)
    assert finding.kind == "gather"
    times = f"{most + 1} times per microbatch over fsdp"
    assert finding.text.startswith(f"params.w is gathered {times}")
    assert finding.bytes == 4096 * 256 * 4


def test_a_gradient_reduced_whole_of_which_a_share_is_kept():
    (finding,) = lint(Namer(written(reduction=CUT)), None)
    assert finding.kind == "note"
    assert "gradients of params.w are all-reduced over fsdp and cut afterwards" in finding.text
    assert "4.00 MiB per step" in finding.text
