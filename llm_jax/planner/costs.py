"""What an instruction of a scheduled HLO module costs: FLOPs of its matrix products, bytes of HBM.

Counted as by metrics.throughput: a multiply-add is 2 FLOPs, and only matrix products have any;
what norms, activations and the optimizer compute is bound by memory. Shapes are those of one
device, so are the costs. The TPU compiler writes each product as a `convolution`, batched ones
with a window that meets one place of the input for each of the output, so only pairs that meet are
counted.

Bytes are those of operands and results in HBM. What lies in VMEM (a layout with `S(1)`) was paid
for by the copy that brought it there. Of an array that a fusion only slices, indexes or updates in
place the touched part counts.
"""

import functools
import math
import re
from collections.abc import Sequence

from llm_jax.planner.hlo_text import Computations, Instruction, root

# Views of their operands, or values that never reach memory.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "opt-barrier", "after-all",
         "partition-id", "replica-id", "add-dependency", "domain"}  # fmt: skip
_VIEWS = {"bitcast", "get-tuple-element", "reshape", "convert"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")


class Costs:
    """Of the instructions of one module."""

    def __init__(self, computations: Computations):
        self._computations = computations
        self._names = {
            name: {one.name: one for one in instructions}
            for name, instructions in computations.items()
        }
        self._flops: dict[str, float] = {}

    def operand(self, where: str, one: Instruction, index: int) -> Instruction | None:
        """The instruction of computation `where` that gives an operand."""
        names = one.operand_names
        return self._names[where].get(names[index]) if index < len(names) else None

    def flops(self, where: str, one: Instruction) -> float:
        """Of the matrix products that one run of an instruction of `where` makes."""
        if one.opcode == "convolution":
            return self._convolution(where, one)
        if one.opcode == "dot":
            return self._dot(where, one, "lhs_contracting_dims={([\\d,]*)}")
        if one.opcode == "custom-call" and one.target.startswith(_GEMMS):
            return self._dot(where, one, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
        if one.opcode == "fusion":
            return sum(map(self._inside, one.called("calls")))
        return 0.0

    def _inside(self, name: str) -> float:
        if name not in self._flops:
            inner = self._computations.get(name, [])
            self._flops[name] = sum(self.flops(name, one) for one in inner)
        return self._flops[name]

    def _dot(self, where: str, one: Instruction, pattern: str) -> float:
        left = self.operand(where, one, 0)
        found = re.search(pattern, one.attributes)
        if left is None or found is None:
            return 0.0
        shape = left.shapes[0][1]
        contracted = math.prod(shape[int(axis)] for axis in re.findall(r"\d+", found[1]))
        return 2.0 * math.prod(one.shapes[0][1]) * contracted

    def _convolution(self, where: str, one: Instruction) -> float:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
        left, right = (self.operand(where, one, index) for index in (0, 1))
        if labels is None or left is None or right is None:
            return 0.0
        sizes = [
            dict(zip(letters, operand.shapes[0][1], strict=True))
            for letters, operand in zip(labels.groups(), (left, right, one), strict=True)
        ]
        inputs, kernel, outputs = sizes
        pairs = 1
        for index, axis in enumerate(sorted(a for a in outputs if a.isdigit())):
            sizes_along = (inputs[axis], kernel[axis], outputs[axis])
            pairs *= _window_pairs(one.attributes, index, *sizes_along)
        return 2.0 * outputs["b"] * outputs["f"] * kernel["i"] * pairs

    def bytes(self, where: str, one: Instruction) -> float:
        """To and from HBM in one run of an instruction of `where`."""
        if one.opcode in _FREE:
            return 0.0
        names = [name for name in one.operand_names if name in self._names[where]]
        operands = [self._names[where][name] for name in names]
        outside = [_in_hbm(operand) for operand in operands]
        if one.opcode == "fusion":
            (target,) = one.called("calls")
            read = [
                min(self._touched(target, index, whole), whole)
                for index, whole in enumerate(outside)
            ]
            return sum(read) + self._written(target, one)
        touched = _touched_by(one, operands, one.operand_names[:1])
        if touched is not None:
            part = touched if outside[0] else 0.0
            if one.opcode in _SLICES:
                return part + _in_hbm(one)
            # A scatter adds to what is there, so it reads it first.
            return part + outside[-1] + (part if one.opcode == "scatter" else 0.0)
        return sum(outside) + _in_hbm(one)

    def _touched(self, target: str, index: int, whole: float) -> float:
        """Bytes that a fused computation reads of its parameter number `index`."""
        inner = self._computations.get(target, [])
        given = next(
            (p for p in inner if p.opcode == "parameter" and p.operands == str(index)), None
        )
        if given is None or not whole:
            return whole
        return self._read(target, given.name, whole)

    def _read(self, target: str, name: str, whole: float) -> float:
        total = 0.0
        for user in self._users(target).get(name, ()):
            if user.opcode in _VIEWS and not user.is_root:
                total += self._read(target, user.name, whole)
            elif user.opcode == "fusion":
                (called,) = user.called("calls")
                places = [i for i, given in enumerate(user.operand_names) if given == name]
                total += max(self._touched(called, place, whole) for place in places)
            else:
                operands = [self._names[target].get(given) for given in user.operand_names]
                part = _touched_by(user, operands, (name,))
                if part is not None and user.opcode == "dynamic-update-slice":
                    part = 0.0  # what it replaces is not read
                total += whole if part is None else part
        return min(total, whole)

    def _written(self, target: str, one: Instruction) -> float:
        """Bytes of a fusion's results that reach HBM; of an update in place, the update."""
        last = root(self._computations[target])
        names = last.operand_names if last.opcode == "tuple" else (last.name,)
        total = 0.0
        for array, name in zip(one.arrays, names, strict=False):
            if array.space == 0:
                total += min(self._updated(target, name, array.bytes), array.bytes)
        return total

    def _updated(self, target: str, name: str, whole: float) -> float:
        made = self._names[target].get(name)
        while made is not None and made.opcode == "bitcast":
            made = self._names[target].get(made.operand_names[0])
        if made is None:
            return whole
        if made.opcode == "fusion":
            (called,) = made.called("calls")
            return self._updated(called, root(self._computations[called]).name, whole)
        if made.opcode in ("dynamic-update-slice", "scatter"):
            operands = [self._names[target].get(given) for given in made.operand_names]
            part = _touched_by(made, operands, made.operand_names[:1])
            return whole if part is None else part
        return whole

    @functools.cache  # noqa: B019 - lives as long as the module it is about
    def _users(self, name: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for one in self._computations.get(name, []):
            for operand in dict.fromkeys(one.operand_names):
                users.setdefault(operand, []).append(one)
        return users


def _touched_by(
    one: Instruction, operands: Sequence[Instruction | None], names: Sequence[str]
) -> float | None:
    """Bytes of its first operand that an instruction reads or writes; None where it needs all.

    Only where `names` are that first operand.
    """
    if not one.operand_names or tuple(names) != one.operand_names[:1]:
        return None
    if one.opcode in _SLICES:
        return float(one.bytes)
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(one.opcode)
    if update is None or len(operands) <= update or operands[update] is None:
        return None
    return float(operands[update].bytes)


def _in_hbm(one: Instruction) -> float:
    return sum(array.bytes for array in one.arrays if array.space == 0)


def _window_pairs(attributes: str, index: int, inputs: int, kernel: int, outputs: int) -> int:
    """`_pairs` along one dimension of a convolution's window."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    along = lambda name, default: fields[name].split("x")[index] if name in fields else default  # noqa: E731
    number = lambda name: int(along(name, "1"))  # noqa: E731
    low = int(along("pad", "0_0").partition("_")[0])
    return _pairs(
        inputs, kernel, outputs, number("stride"), low, number("lhs_dilate"), number("rhs_dilate")
    )


@functools.cache
def _pairs(
    inputs: int, kernel: int, outputs: int, stride: int, low: int, left: int, right: int
) -> int:
    """Places of the kernel and of the output that meet a place of the input.

    low: padding before the input; left, right: dilation of the input and of the kernel.
    """
    if left == right == stride == 1 and kernel * outputs > 1:
        # Output o meets the places k with 0 <= o + k - low < inputs.
        small, large = sorted((kernel, outputs))
        return sum(
            max(0, min(small, inputs + low - place) - max(0, low - place)) for place in range(large)
        )
    return sum(
        0 <= at < (inputs - 1) * left + 1 and at % left == 0
        for o in range(outputs)
        for k in range(kernel)
        for at in (o * stride + k * right - low,)
    )
