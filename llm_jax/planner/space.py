"""What a search may change: the mesh, its rules, what is kept for the backward pass, accumulation.

The global batch, the model and the optimizer stay, so every choice trains the same thing. Overrides name
every key of the mesh, so that they mean the same on any base config.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax.nn.remat import RematPolicy
from llm_jax.planner.chips import CHIPS
from llm_jax.planner.stacks import run_stacks
from llm_jax.planner.topology import Target, shapes
from llm_jax.sharding.mesh import AXES, MeshConfig, SliceAxes
from llm_jax.training.config import RunConfig

Overrides = Mapping[str, Any]

REMAT: tuple[RematPolicy, ...] = typing.get_args(RematPolicy)
# The most shares that are worth a look: of heads within fast links, of rows, of stages.
_MOST = {"tensor": 8, "context": 8, "pipeline": 8}
# Sequences shorter than this are not worth cutting, but where there are too few rows.
_LONG = 4096
_MOST_STEPS = 64


def meshes(run: RunConfig, target: Target) -> Iterator[MeshConfig]:
    """The run's own mesh, where it multiplies to the target's devices, and others that do.

    Whether the run divides over them is not asked, but what its model never shares is left whole. Of the others at most two of tensor, context and
    pipeline at once: three are for larger pods than people have.
    """
    slices = target.num_slices if target.kind == "tpu" else 1
    devices = target.num_chips * target.devices_per_chip // slices
    own = _own(run.mesh, devices, slices)
    if own is not None:
        yield own
    yield from (mesh for mesh in _regular(run, devices, slices) if mesh != own)


def _own(mesh: MeshConfig, devices: int, slices: int) -> MeshConfig | None:
    """A run's mesh with every size told; devices: of a slice."""
    try:
        across = SliceAxes(**mesh.slices(slices))
        return dataclasses.replace(mesh, **mesh.shape(devices * slices, slices), dcn=across)
    except ValueError:  # for other devices than these
        return None


def _regular(run: RunConfig, devices: int, slices: int) -> Iterator[MeshConfig]:
    experts = getattr(run.model, "experts", None)
    whole_stacks = any(stack.needs_one_stage for stack in run_stacks(run))
    layers = 1 if whole_stacks else getattr(run.model, "num_layers", 1)
    for pipeline in _sizes("pipeline", devices, layers):
        for tensor in _sizes("tensor", devices // pipeline):
            for context in _contexts(run, devices // pipeline // tensor):
                if pipeline > 1 and tensor > 1 and context > 1:
                    continue
                left = devices // pipeline // tensor // context
                for expert in _divisors(left) if experts else (1,):
                    if experts and experts.num_experts % expert:
                        continue
                    sizes = {"pipeline": pipeline, "expert": expert, "context": context,
                             "tensor": tensor}  # fmt: skip
                    ways = ("data", "fsdp") if whole_stacks else ("data", "fsdp", "pipeline")
                    yield from _shared(run, sizes, left // expert, slices, ways)


def _shared(
    run: RunConfig, sizes: dict[str, int], left: int, slices: int, ways: Sequence[str]
) -> Iterator[MeshConfig]:
    """Copies and shares over what is left, the rules that act, and the ways across slices."""
    for fsdp in _divisors(left):
        rules = ["default"]
        if fsdp * sizes["expert"] * sizes["context"] > 1:
            rules.append("zero1")
        if sizes["tensor"] > 1:
            rules.append("sequence")
        for name in rules:
            for across in ways if slices > 1 else ("data",):
                pipelined = sizes["pipeline"] > 1 or (across == "pipeline" and slices > 1)
                yield MeshConfig(
                    **sizes,
                    data=left // fsdp,
                    fsdp=fsdp,
                    rules=name,
                    dcn=SliceAxes(**{across: slices}),
                    microbatches=run.mesh.microbatches if pipelined else None,
                    pipeline_rounds=run.mesh.pipeline_rounds if pipelined else 1,
                )


def _sizes(axis: str, devices: int, multiple: int = 0) -> list[int]:
    return [n for n in _divisors(devices) if n <= _MOST[axis] and multiple % n == 0]


def _contexts(run: RunConfig, devices: int) -> list[int]:
    length = run.data.sequence_length
    worth = length >= _LONG or run.train.batch_size < devices
    worth = worth and not any(stack.needs_whole_sequences for stack in run_stacks(run))
    return [n for n in _sizes("context", devices) if n == 1 or worth]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def accumulations(run: RunConfig) -> list[int]:
    """Powers of two that divide the global batch, and the config's own."""
    sizes = {2**n for n in range(_MOST_STEPS.bit_length())} | {run.train.accumulate_steps}
    return sorted(n for n in sizes if run.train.batch_size % n == 0)


def policies(mesh: MeshConfig) -> tuple[RematPolicy, ...]:
    """What the forward pass may keep. libtpu 0.0.42 fails on pipelines that keep it in the host's memory."""
    pipelined = mesh.pipeline * mesh.dcn.pipeline > 1
    return tuple(policy for policy in REMAT if policy != "offload" or not pipelined)


def with_choice(run: RunConfig, mesh: MeshConfig, remat: str, accumulate_steps: int) -> RunConfig:
    return dataclasses.replace(
        run,
        mesh=mesh,
        model=dataclasses.replace(run.model, remat=remat),
        train=dataclasses.replace(run.train, accumulate_steps=accumulate_steps),
    )


def overrides_of(run: RunConfig) -> dict[str, Any]:
    """The keys that a search sets, as a run has them."""
    mesh = run.mesh
    values: dict[str, Any] = {f"mesh.{axis}": getattr(mesh, axis) for axis in AXES}
    values["mesh.dcn"] = None  # of the base config, if it has any
    values |= {
        f"mesh.dcn.{axis}": size for axis, size in dataclasses.asdict(mesh.dcn).items() if size != 1
    }
    for field in ("rules", "microbatches", "pipeline_rounds"):
        values[f"mesh.{field}"] = getattr(mesh, field)
    values["model.remat"] = run.model.remat
    values["train.accumulate_steps"] = run.train.accumulate_steps
    return values


def summary_of(run: RunConfig) -> str:
    """`fsdp 64, remat full, accumulate 2`: what stands out of a choice."""
    words = [f"{axis} {getattr(run.mesh, axis)}" for axis in AXES if getattr(run.mesh, axis) > 1]
    words += [
        f"{axis} x{size} across slices"
        for axis, size in dataclasses.asdict(run.mesh.dcn).items()
        if size > 1
    ]
    if run.mesh.rules != "default":
        words.append(run.mesh.rules)
    words.append(f"remat {run.model.remat}")
    if run.train.accumulate_steps > 1:
        words.append(f"accumulate {run.train.accumulate_steps}")
    return ", ".join(words)


def default_targets(max_chips: int) -> list[str]:
    """TPU slices of every generation whose chips are a power of two, at most `max_chips`."""
    names = []
    for chip in CHIPS.values():
        if chip.kind == "tpu":
            sizes = {x * y * z for x, y, z in shapes(chip)}
            names += [
                f"{chip.name}-{size}"
                for size in sorted(sizes)
                if size <= max_chips and size & (size - 1) == 0
            ]
    return names
