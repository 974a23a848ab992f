"""Where an HLO instruction comes from: the source line, the module and the pass of training.

XLA carries two things through its optimizations: a stack frame, which gives the line, and the name stack
of jax (`op_name`), in which the model writes its parameters' paths by `jax.named_scope`:
"jit(step)/transpose(jvp(stack))/while/body/closed_call/layers/mlp/btd,df->btf/dot_general".
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

from llm_jax.planner.plan import Direction

# Code that others call to do their work: what called it says more.
_PLUMBING = ("core/", "sharding/", "nn/precision.py", "nn/low_precision.py",
             "nn/weight_gradient.py", "nn/kernels/shares.py", "training/program.py")  # fmt: skip
# What jax adds to the name stack, besides transformations and jitted functions.
_STRUCTURE = {
    "while", "body", "cond", "scan", "closed_call", "eval_jaxpr", "core_call", "checkpoint", "remat",
    "rematted_computation", "shard_map", "pjit", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "custom_partitioning", "pallas_call", "branch", "named_call", "xla_call",
}  # fmt: skip
_TRANSFORMATION = re.compile(r"(?:transpose|jvp|vmap|vjp|linearize)\((.*)\)")
# Names that attention kernels of libraries give themselves.
_KERNEL = re.compile(r"splash|flash|mha_")
# Modules that hold layers.
_STACKS = ("stack", "encoder", "decoder")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Frame:
    """file: from the folder that holds the package, "llm_jax/nn/mlp.py", or as recorded if elsewhere."""

    file: str
    line: int
    function: str
    in_package: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class Sources:
    """The tables of source lines at the head of an HLO text; a text without them knows no place."""

    def __init__(self, text: str):
        self._files, self._functions = _names(text, "FileNames"), _names(text, "FunctionNames")
        self._locations = _records(text, "FileLocations")
        self._frames = _records(text, "StackFrames")
        # XLA prints a parent's number plus one, so that the root's parent, 0, is 1.
        parents = [frame["parent_frame_id"] for frame in self._frames.values()]
        self._shift = min(parents, default=0)

    def stack(self, frame_id: int | None) -> Iterator[Frame]:
        """From the innermost frame outwards."""
        while frame_id in self._frames:
            frame = self._frames[frame_id]
            location = self._locations.get(frame["file_location_id"])
            if location is not None:
                file, inside = _package_path(self._files.get(location["file_name_id"], "?"))
                function = self._functions.get(location["function_name_id"], "")
                yield Frame(file, location["line"], function, inside)
            outer = frame["parent_frame_id"] - self._shift
            # A parent comes before its children; anything else would go round in circles.
            frame_id = outer if outer < frame_id else None

    def frame(self, frame_id: int | None) -> Frame | None:
        """The innermost frame in the package that is no plumbing, else in the package, else of all."""
        frames = list(self.stack(frame_id))
        inside = [frame for frame in frames if frame.in_package]
        telling = [frame for frame in inside if not _is_plumbing(frame.file)]
        return next(iter(telling or inside or frames), None)

    def of(self, frame_id: int | None) -> str:
        """The place of `frame`, "llm_jax/nn/mlp.py:88", or "" where nothing is known."""
        frame = self.frame(frame_id)
        return "" if frame is None else frame.place

    def of_attributes(self, attributes: str) -> str:
        """`of`, for the attributes of an instruction."""
        return self.of(frame_id(attributes))


def frame_id(attributes: str) -> int | None:
    """The stack frame that an instruction's metadata names."""
    found = re.search(r"\bstack_frame_id=(\d+)", attributes)
    return int(found[1]) if found else None


def module_of(op_name: str) -> str:
    """The module, "stack.layers.mlp", or "loss", "optimizer"; "" where the name has none.

    The name of an argument gives the path of its parameter: "params['embed']" is "embed". Where the
    compiler merged instructions, what their modules have in common, or the first if that is nothing.
    """
    keys = re.findall(r"\[\\?'([^'\\]*)\\?'\]", op_name)
    if keys:
        return ".".join(keys)
    paths = [_scopes(name) for name in _alternatives(op_name)]
    paths = [path for path in paths if path]
    if not paths:
        return ""
    same = (set(level) for level in zip(*paths, strict=False))
    depth = sum(1 for _ in itertools.takewhile(lambda names: len(names) == 1, same))
    return ".".join(paths[0][: depth or None])


def in_stack(module: str) -> bool:
    """Whether a module, as `module_of` names it, is a stack of layers or in one."""
    return module.partition(".")[0] in _STACKS


def direction_of(op_name: str) -> Direction:
    """The pass of training; what is computed again for the backward pass belongs to it."""
    name = next(_alternatives(op_name))
    if "transpose(" in name or "rematted_computation" in name:
        return "backward"
    if "jvp(" in name:
        return "forward"
    return "optimizer" if "optimizer" in name.split("/") else "other"


def _alternatives(op_name: str) -> Iterator[str]:
    """The names that a merged one stands for: "a/(b/c:d/e)" or "a/b;a/d"."""
    for name in op_name.split(";"):
        head, opened, tail = _cut_merged(name)
        if not opened:
            yield name
            continue
        for one in tail.removesuffix(")").split(":"):
            yield head + one


def _cut_merged(name: str) -> tuple[str, bool, str]:
    if name.startswith("("):
        return "", True, name[1:]
    head, opened, tail = name.partition("/(")
    return head + "/", bool(opened), tail


def _scopes(name: str) -> list[str]:
    """The named scopes, outermost first. The last piece of a name is the primitive's."""
    path: list[str] = []
    for piece in name.split("/")[:-1]:
        while found := _TRANSFORMATION.fullmatch(piece):
            piece = found[1]
        if piece in _STRUCTURE or _KERNEL.search(piece) or not _IDENTIFIER.fullmatch(piece):
            continue
        if piece in path:  # jax repeats the outer scopes inside a checkpoint
            del path[path.index(piece) :]
        path.append(piece)
    return path


def _package_path(file: str) -> tuple[str, bool]:
    _, found, after = file.replace("\\", "/").rpartition("/llm_jax/")
    if not found or "site-packages/" in after:
        return file, False
    return f"llm_jax/{after}", True


def _is_plumbing(file: str) -> bool:
    return file.removeprefix("llm_jax/").startswith(_PLUMBING)


def _table(text: str, title: str) -> str:
    """The lines under a title, up to the next empty line."""
    found = re.search(rf"^{title}\n((?:\d.*\n)*)", text, re.M)
    return found[1] if found else ""


def _names(text: str, title: str) -> dict[int, str]:
    return {
        int(key): name for key, name in re.findall(r'^(\d+) "(.*)"$', _table(text, title), re.M)
    }


def _records(text: str, title: str) -> dict[int, dict[str, int]]:
    return {
        int(key): {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", fields)}
        for key, fields in re.findall(r"^(\d+) \{(.*)\}$", _table(text, title), re.M)
    }
