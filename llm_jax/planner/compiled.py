"""What the compiler said about one training step, as plain data in a folder.

The compiler runs in a process of its own (compile.py); this is what it leaves behind and all that the
analyses read, so a plan can be made, cached and compared without jax, devices or libtpu.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

ArgumentKind = Literal["parameter", "optimizer", "extra", "batch", "other"]


@dataclasses.dataclass(frozen=True)
class Argument:
    """One array that the step takes.

    path: dotted, as in checkpoints: "params.stack.layers.mlp.up"; name: as HLO metadata has it,
    "state.params['stack']['layers']['mlp']['up']". shape: of the whole array; spec: the mesh axes of
    each dimension; shard_shape and bytes: of one device. dtype in numpy's names.
    """

    path: str
    name: str
    kind: ArgumentKind
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[tuple[str, ...], ...]
    shard_shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Span:
    """The part of one physical dimension that a mesh axis covers.

    kind: "link" between chips, "core" between the devices of one chip, "network" between slices or
    hosts. dimension: of the torus, 0 to 2. size: places along it; ring: whether it closes. stride: links
    from one place to the next, which so many interleaved groups share.
    """

    kind: Literal["link", "core", "network"]
    dimension: int
    size: int
    ring: bool
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """spans: the slowest along the axis first; they multiply to size, or more where hosts are cut unevenly."""

    name: str
    size: int
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class MemoryAnalysis:
    """The compiler's own totals per device, in bytes. peak is None where it does not say."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Why there is no program: it needs more bytes per device than there are. message: the compiler's."""

    needed: int
    available: int
    message: str


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One training step, compiled or found not to fit.

    target: as the user named it, e.g. "v5p:4x4x4", "local". config: the resolved run as a dict.
    num_params, tokens_per_step: of the whole model and the global batch. model_flops:
    per token, with all scores ("full") and with those a causal mask keeps ("causal"); empty where
    the family counts none. seconds: "lower", "compile". host_peak_bytes: of the compiling process.
    versions: "jax", "libtpu". hlo: the scheduled module's text, with cycles where it compiled.
    buffer_assignment, live_ranges: the compiler's dumps, "" where it wrote none. device_kind: jax's
    name of the device; device_memory: bytes of one that a program can allocate, None where the
    device does not say. measured: "peak_flops" and "bytes_per_second" of one device, timed where
    it is at hand and chips.py has no rates of its kind; else empty.
    """

    target: str
    config: Mapping[str, Any]
    mesh: tuple[MeshAxis, ...]
    arguments: tuple[Argument, ...]
    num_params: int
    tokens_per_step: int
    model_flops: Mapping[str, float]
    seconds: Mapping[str, float]
    host_peak_bytes: int
    versions: Mapping[str, str]
    memory: MemoryAnalysis | None
    out_of_memory: OutOfMemory | None
    hlo: str = dataclasses.field(repr=False)
    buffer_assignment: str = dataclasses.field(repr=False)
    live_ranges: str = dataclasses.field(repr=False)
    device_kind: str = ""
    device_memory: int | None = None
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes step.json and the texts; step.json comes last and marks the folder as whole."""
        folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self)
        for name in _TEXTS:
            (folder / f"{name}.txt").write_text(content.pop(name))
        (folder / "step.json").write_text(json.dumps(content, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "CompiledStep":
        """Raises FileNotFoundError where `save` did not finish."""
        content = json.loads((folder / "step.json").read_text())
        content["mesh"] = tuple(
            MeshAxis(a["name"], a["size"], tuple(Span(**s) for s in a["spans"]))
            for a in content["mesh"]
        )
        content["arguments"] = tuple(_argument(a) for a in content["arguments"])
        for name, kind in (("memory", MemoryAnalysis), ("out_of_memory", OutOfMemory)):
            if content[name] is not None:
                content[name] = kind(**content[name])
        texts = {name: (folder / f"{name}.txt").read_text() for name in _TEXTS}
        return cls(**content, **texts)


def is_saved(folder: Path) -> bool:
    """Whether `CompiledStep.save` finished there."""
    return (folder / "step.json").is_file()


_TEXTS = ("hlo", "buffer_assignment", "live_ranges")


def _argument(content: dict[str, Any]) -> Argument:
    content["spec"] = tuple(tuple(axes) for axes in content["spec"])
    for name in ("shape", "shard_shape"):
        content[name] = tuple(content[name])
    return Argument(**content)
