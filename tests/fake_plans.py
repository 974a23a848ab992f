"""Plans as the analyses make them, without a compiler: a 1.4 B model on 64 chips, and one too large."""

import dataclasses

from llm_jax.planner.plan import (
    Cost,
    Exchange,
    Finding,
    LiveBuffer,
    Memory,
    Op,
    Plan,
    Roofline,
)

GIB, MIB = 2**30, 2**20
MLP = "jit(step)/transpose(jvp(stack))/while/body/layers/mlp/btd,df->btf/dot_general"
MESH = {"pipeline": 1, "data": 1, "fsdp": 64, "expert": 1, "context": 1, "tensor": 1}


def plan(**changes) -> Plan:
    """gpt_1b on v5p:4x4x4, with `changes`."""
    made = Plan(
        target="v5p:4x4x4",
        chip="v5p",
        num_chips=64,
        estimated=False,
        config={
            "model": {"name": "gpt", "num_layers": 24, "remat": "attention", "vocab_size": 32768},
            "train": {"batch_size": 512, "accumulate_steps": 1},
            "mesh": {"data": 1, "fsdp": -1, "rules": "default"},
        },
        mesh=MESH,
        num_params=1_367_443_456,
        tokens_per_step=2**20,
        memory=memory(),
        roofline=roofline(),
        findings=(
            Finding("replicated", "params.embed is whole on every chip", "llm_jax/models/gpt/model.py:71",
                    256 * MIB, 0.004, "mesh.rules=zero1"),
            Finding("note", "gradients are summed with all-reduce"),
        ),
        cost=Cost(20e9, 2.1, 3226.0, 13_549.0, 4.2, "list price of us-east5 as of 2026-11"),
        versions={"jax": "0.10.2", "libtpu": "0.0.42.1"},
        seconds={"lower": 0.26, "compile": 16.8},
        host_peak_bytes=1_643_298_816,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def too_large() -> Plan:
    """A step that the compiler refused: no times, a peak beyond the capacity."""
    change = Finding(
        "memory", "5.9 GiB more than there is", bytes=6 * GIB, change="train.accumulate_steps=2"
    )
    full = dataclasses.replace(memory(), capacity=int(15.75 * GIB), peak=int(21.6 * GIB))
    parts = {**full.parts, "activations": full.parts["activations"] + full.peak - memory().peak}
    return plan(
        target="v5e:4x4",
        chip="v5e",
        num_chips=16,
        mesh={**MESH, "fsdp": 16},
        memory=dataclasses.replace(full, parts=parts),
        roofline=None,
        cost=None,
        findings=(change,),
    )


def estimate() -> Plan:
    bare = dataclasses.replace(roofline(), ops=(), exchanges=())
    return plan(
        target="h100-8",
        chip="h100",
        num_chips=8,
        estimated=True,
        memory=dataclasses.replace(memory(), buffers=(), timeline=(), at=""),
        roofline=bare,
        findings=(),
        mesh={**MESH, "fsdp": 8},
        versions={},
        seconds={},
        host_peak_bytes=0,
    )


def memory() -> Memory:
    parts = {
        "parameters": 82 * MIB, "optimizer": 163 * MIB, "gradients": 326 * MIB,
        "activations": 2700 * MIB, "logits": 900 * MIB, "attention": 210 * MIB,
        "collectives": 160 * MIB, "batch": 1 * MIB, "temporaries": 330 * MIB, "unused": 24 * MIB,
    }  # fmt: skip
    peak = sum(parts.values())
    rising = [(i, 300 * MIB + i * (peak - 300 * MIB) // 60) for i in range(0, 61)]
    falling = [(60 + i, peak - i * (peak - 300 * MIB) // 80) for i in range(1, 80)]
    return Memory(
        capacity=int(95.73 * GIB),
        peak=peak,
        parts=parts,
        buffers=tuple(buffer(i) for i in range(12)),
        timeline=tuple(rising + falling),
        at="fusion.212, backward of stack.layers.mlp, llm_jax/nn/mlp.py:88",
    )


def buffer(index: int) -> LiveBuffer:
    kinds = (
        ("activations", "bf16", (24, 8, 2048, 2048), None, None, "stack.layers", "nn/transformer.py:210",
         "model.remat=full"),
        ("logits", "f32", (2, 2048, 32768), None, None, "loss", "nn/losses.py:61", None),
        ("parameters", "f32", (24, 2048, 88), (24, 2048, 5632), "[-, -, fsdp]",
         "params.stack.layers.mlp.up", "nn/mlp.py:52", None),
    )  # fmt: skip
    part, dtype, shape, logical, sharding, module, source, change = kinds[index % 3]
    count = 1536 * MIB >> index
    return LiveBuffer(part, count, dtype, shape, logical, sharding, module, f"llm_jax/{source}", MLP,
                      f"fusion.{index}", change, count // 2 if change else None)  # fmt: skip


def roofline() -> Roofline:
    ops = (
        op("fusion.1", "matmul", "forward", 24, 2.9e12, 1.2e9, 6.9e-3, "compute"),
        op("fusion.2", "matmul", "backward", 24, 5.8e12, 2.6e9, 13.6e-3, "compute"),
        op("splash.3", "attention", "backward", 24, 0.6e12, 0.3e9, 2.4e-3, "compute", by="kernel"),
        op("fusion.4", "elementwise", "backward", 24, 2e9, 2.1e9, 0.8e-3, "memory"),
        op("fusion.5", "elementwise", "optimizer", 1, 1e9, 0.6e9, 0.3e-3, "memory", by="roofline"),
        op("ag.6", "collective", "forward", 24, 0, 0.2e9, 0.6e-3, "communication fsdp", by="link"),
        op(
            "ar.7",
            "collective",
            "backward",
            1,
            0,
            1e6,
            0.2e-3,
            "communication data+fsdp",
            by="link",
        ),
        op("copy.8", "copy", "other", 4, 0, 0, 1e-4, "other"),
    )
    bounds: dict[str, float] = {}
    for one in ops:
        bounds[one.bound] = bounds.get(one.bound, 0.0) + one.exposed * one.times
    seconds = sum(bounds.values())
    return Roofline(
        step_seconds=seconds,
        bounds=bounds,
        ops=ops,
        exchanges=exchanges(),
        tokens_per_second=2**20 / 64 / seconds,
        model_flops=9.0e9,
        hardware_flops=2.2e14,
        mfu=0.552,
        mfu_causal=0.515,
        efficiency=0.93,
        from_compiler=0.84,
    )


def op(name, kind, direction, times, flops, count, seconds, bound, by="compiler") -> Op:
    return Op(name, kind, direction, MLP, "llm_jax/nn/mlp.py:88", "stack.layers.mlp", times, flops,
              count, seconds, seconds, bound, by)  # fmt: skip


def exchanges() -> tuple[Exchange, ...]:
    gather = Exchange("ag.6", "all-gather", "fsdp", 46 * MIB, 45.3e6, 24, 0.6e-3, 0.6e-3,
                      "params.stack.layers.mlp.up", "parameter", "forward", "llm_jax/nn/mlp.py:52", MLP)  # fmt: skip
    reduce = dataclasses.replace(gather, name="rs.7", kind="reduce-scatter", role="gradient",
                                 direction="backward", exposed=0.1e-3)  # fmt: skip
    many = [
        dataclasses.replace(gather, name=f"ag.{i}", exposed=0.0, tensor=f"params.stack.layers.{i}")
        for i in range(12)
    ]
    return (gather, reduce, *many)
