"""A plan: all that is said about one training step on one target, and how it is made."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from llm_jax.planner.compiled import CompiledStep

# The parts of peak memory, in the order they are shown.
Part = Literal[
    "parameters", "frozen", "optimizer", "gradients", "activations", "logits", "attention",
    "collectives", "batch", "temporaries", "unused",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LiveBuffer:
    """One array that is alive at the peak. All sizes per device, in bytes.

    dtype, shape: as compiled, in HLO's names. logical_shape, sharding: of the whole array, where it is
    known (arguments and what has an argument's shape), sharding like "[fsdp, -, tensor]". module:
    "stack.layers.mlp"; source: "llm_jax/nn/mlp.py:88". change: an override that makes it smaller,
    "model.remat=full", with saves bytes; None where none is known.
    """

    part: Part
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    logical_shape: tuple[int, ...] | None
    sharding: str | None
    module: str
    source: str
    op_name: str
    instruction: str
    change: str | None = None
    saves: int | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Per chip, in bytes; parts sum to peak. A chip of two devices counts both.

    "unused" is space that the compiler's packing leaves between live arrays. timeline: (place in the
    schedule, bytes alive) where the amount changes. at: the instruction and source of the peak.
    host: pinned in the host's memory, which no part counts.
    """

    capacity: int
    peak: int
    parts: Mapping[Part, int]
    buffers: tuple[LiveBuffer, ...]
    timeline: tuple[tuple[int, int], ...]
    at: str
    host: int = 0

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


Direction = Literal["forward", "backward", "optimizer", "other"]
Kind = Literal["matmul", "attention", "kernel", "elementwise", "copy", "collective", "other"]


@dataclasses.dataclass(frozen=True)
class Op:
    """One scheduled instruction and what a run of it costs one chip.

    times: runs in a step. flops, bytes: of a run; bytes to and from HBM. seconds: of a run by itself;
    exposed: the part of it that nothing hides (equal to seconds but for overlapped collectives).
    bound: "compute", "memory", "communication NAME" with the mesh axes, or "other". by: who says how
    long it takes: "compiler" (its cycles), "roofline" (FLOPs and bytes), "kernel" or "link" (models).
    """

    name: str
    kind: Kind
    direction: Direction
    op_name: str
    source: str
    module: str
    times: int
    flops: float
    bytes: float
    seconds: float
    exposed: float
    bound: str
    by: Literal["compiler", "roofline", "kernel", "link"]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective. axes: the mesh axes it runs over, "fsdp" or "fsdp+expert".

    bytes: of the whole array, as in hlo.Collective; sent_bytes: what a device sends in a run.
    times: runs in a step; seconds: of a run, exposed: of that, unhidden. tensor: what it serves: a
    parameter's path or a module's; role: what it does there.
    """

    name: str
    kind: str
    axes: str
    bytes: int
    sent_bytes: float
    times: int
    seconds: float
    exposed: float
    tensor: str
    role: Literal["parameter", "gradient", "activation", "scalar", "other"]
    direction: Direction
    source: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of one step. bounds: seconds by what bounds them; they sum to step_seconds.

    tokens_per_second and the FLOPs are per chip. mfu: over all scores, mfu_causal: those kept by a causal
    mask; None where the family counts no model FLOPs. hardware_flops: executed, with recomputation.
    efficiency: the one factor of the generation that the model's times were divided by.
    from_compiler: the share of step_seconds that rests on the compiler's own cycles. unknown_loops: what
    the loops belong to whose turns the program does not state, which count once.
    """

    step_seconds: float
    bounds: Mapping[str, float]
    ops: tuple[Op, ...]
    exchanges: tuple[Exchange, ...]
    tokens_per_second: float
    model_flops: float | None
    hardware_flops: float
    mfu: float | None
    mfu_causal: float | None
    efficiency: float
    from_compiler: float
    unknown_loops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know or to change, in one line. change: an override; None if there is none.

    bytes: memory that it costs per chip; seconds: of a step.
    """

    kind: Literal["memory", "replicated", "gather", "resharding", "logits", "note"]
    text: str
    source: str = ""
    bytes: int = 0
    seconds: float = 0.0
    change: str | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of training on `tokens`. dollars: chip_hours times dollars_per_chip_hour; both None where no price is known.

    price_note: whose price, and of when.
    """

    tokens: float
    days: float
    chip_hours: float
    dollars: float | None
    dollars_per_chip_hour: float | None
    price_note: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """estimated: by arithmetic alone, without a compiler; then op lists and buffers are empty.

    num_chips: of the target; chip: its generation. roofline is None where there is no program to time.
    """

    target: str
    chip: str
    num_chips: int
    estimated: bool
    config: Mapping[str, Any]
    mesh: Mapping[str, int]
    num_params: int
    tokens_per_step: int
    memory: Memory
    roofline: Roofline | None
    findings: tuple[Finding, ...]
    cost: Cost | None
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    host_peak_bytes: int
    step: CompiledStep | None = dataclasses.field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        return self.memory.fits

    def to_dict(self) -> dict[str, Any]:
        """For --json: everything but the compiler's texts."""
        content = dataclasses.asdict(dataclasses.replace(self, step=None))
        del content["step"]
        return content
