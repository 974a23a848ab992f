"""What fills a device's memory at the worst moment, by part and array by array.

The compiler lays a program out as fixed allocations (arguments, results, constants) and one heap. The peak
is all of it: what the device must have. The moment of the peak is when the arrays in the heap cover most
of it; the rest of the heap, holes that the packing leaves at that moment, is "unused", so that the parts
sum to the peak. The compiler's own `peak_memory_in_bytes` is the peak without the holes, or, if that is
more, the arguments and what lies in another memory: on the chip in small programs, or offloaded to the
host. Neither counts here.

An array in the heap belongs to the first part whose rule holds. A parameter's shape is that of its share,
of the whole, or anything between, of all layers or of one, in any order of the dimensions.

1. logits: a dimension of the vocabulary's size, or of a share of it, outside the stack of layers (where
   as many tokens or features as words are no logits), and no parameter's shape; where the shapes agree
   by chance, the einsum in the name or, without one, the scope "loss" or "head" decides.
2. gradients: a parameter's shape, made by the backward pass, the optimizer or the loss (which makes the
   head's gradient in the forward pass), in float32, or by the product or the reduction that gives it.
3. collectives: what an all-gather or another collective gave.
4. activations: made by the forward pass and needed by the backward pass; what a loop over layers collects.
5. attention: other arrays of a module named attention.
6. temporaries: the rest, such as activations that are computed again, and casts of parameters.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from llm_jax.planner.buffers import Allocation, Layout, Value, parse_layout
from llm_jax.planner.compiled import Argument, CompiledStep
from llm_jax.planner.makers import Maker, Makers
from llm_jax.planner.plan import LiveBuffer, Memory, Part
from llm_jax.planner.source import direction_of, in_stack

_PARTS: tuple[Part, ...] = Part.__args__
_OF_KIND: Mapping[str, Part] = {
    "parameter": "parameters",
    "extra": "frozen",
    "optimizer": "optimizer",
    "batch": "batch",
    "other": "optimizer",
}
_REDUCTIONS = ("reduce-scatter", "all-reduce")


def read_memory(step: CompiledStep, capacity: int, devices_per_chip: int = 1) -> Memory:
    """Peak memory of a compiled step, or of one that was found not to fit.

    Where the compiler left no buffer assignment, its totals: arguments by kind, the rest "temporaries".

    Args:
      capacity: bytes of a chip that a program can allocate.
    """
    if not step.buffer_assignment:
        return _from_totals(step, capacity, devices_per_chip)
    layout = parse_layout(step.buffer_assignment, step.live_ranges)
    program = _Program(step, layout)
    used = layout.used()
    time, most = max(used, key=lambda point: point[1], default=(0, 0))
    buffers = [b for a in layout.fixed for b in program.fixed_buffers(a)]
    buffers += program.heap_buffers(time)
    parts = dict.fromkeys(_PARTS, 0)
    for buffer in buffers:
        parts[buffer.part] += buffer.bytes
    fixed = sum(a.size for a in layout.fixed)
    # Tables of tuples and other small things that are no arrays.
    parts["temporaries"] += fixed + most - sum(parts.values())
    parts["unused"] = layout.total - fixed - most
    peak = layout.total
    if step.out_of_memory is not None:
        # What the compiler counts besides, a few KB; and it has less than the chip's memory to give.
        peak = max(peak, step.out_of_memory.needed)
        parts["temporaries"] += peak - layout.total
        capacity = min(capacity, step.out_of_memory.available * devices_per_chip)
    name = layout.schedule[time] if time < len(layout.schedule) else ""
    return Memory(
        capacity=capacity,
        peak=peak * devices_per_chip,
        parts={part: size * devices_per_chip for part, size in parts.items()},
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
        timeline=tuple((place, (fixed + size) * devices_per_chip) for place, size in used),
        at=f"{name} {program.makers.source(name)}".strip(),
        host=layout.host * devices_per_chip,
    )


def vocabulary_sizes(step: CompiledStep) -> frozenset[int]:
    """The whole vocabulary and a device's share of it; none of a model without words."""
    vocabulary = step.config.get("model", {}).get("vocab_size")
    if not vocabulary:
        return frozenset()
    tensor = next((axis.size for axis in step.mesh if axis.name == "tensor"), 1)
    return frozenset({vocabulary, -(-vocabulary // tensor)})


def head_shapes(step: CompiledStep) -> frozenset[tuple[int, ...]]:
    """Shapes, in order of size, of parameters over the vocabulary: of all of it, and of a device's share."""
    sizes = vocabulary_sizes(step)
    whole = max(sizes, default=None)
    return frozenset(
        _plain((*(size for size in argument.shape if size != whole), share))
        for argument in step.arguments
        if argument.kind in ("parameter", "extra") and whole in argument.shape
        for share in sizes
    )


def sharding_text(spec: Sequence[Sequence[str]]) -> str:
    """The mesh axes of each dimension, as in "[fsdp, -, data+tensor]"."""
    return f"[{', '.join('+'.join(axes) or '-' for axes in spec)}]"


class _Program:
    """Arrays of one program and the parts that they belong to."""

    def __init__(self, step: CompiledStep, layout: Layout):
        self.makers, self._layout = Makers(step.hlo), layout
        self._shapes = _Shapes(step)
        by_name = {argument.name: argument for argument in step.arguments}
        self._arguments = {
            number: by_name.get(one.op_name.replace("\\", ""))
            for number, one in self.makers.parameters().items()
        }
        instructions = map(self.makers.instruction, layout.schedule)
        self._backward = [
            time
            for time, one in enumerate(instructions)
            if one is not None and direction_of(one.op_name) == "backward"
        ]

    def fixed_buffers(self, allocation: Allocation) -> list[LiveBuffer]:
        """The argument, constant or result of an allocation, which may hold several one after another."""
        value = next((v for v in allocation.values if v.dtype != "tuple"), None)
        if value is None:
            return []
        argument = self._arguments.get(allocation.parameter)
        if argument is not None:
            return [_argument_buffer(argument, value, allocation.size)]
        maker = self.makers.of(value.name, value.index)
        buffer = self._buffer("temporaries", value, maker, allocation.size)
        return [buffer]

    def heap_buffers(self, time: int) -> list[LiveBuffer]:
        """The arrays alive at a time; of those that share memory one, each with the bytes it adds."""
        alive = sorted(
            (v for v in self._layout.alive(time) if v.dtype != "tuple"),
            key=lambda v: (-v.size, v.offset, -v.start),
        )
        covered: list[tuple[int, int]] = []
        buffers = []
        for value in alive:
            size = _cover(covered, value.offset, value.offset + value.size)
            if size:
                maker = self.makers.of(value.name, value.index)
                buffers.append(self._buffer(self._part(value, maker), value, maker, size))
        return buffers

    def _part(self, value: Value, maker: Maker) -> Part:
        module = maker.module.split(".")
        product = _einsum_output(maker.op_name)
        of_tokens = product is not None and not set(product).isdisjoint("bts")
        of_parameter = maker.parameter is not None or bool(self._shapes.like(value.shape))
        is_weight = of_parameter and not of_tokens
        has_words = self._shapes.has_vocabulary(value.shape) and not in_stack(maker.module)
        if has_words and maker.parameter is None:
            by_chance = is_weight and product is None and self._shapes.is_whole_head(value.shape)
            scope = module[0] in ("loss", "head") and not maker.collective
            if not is_weight or (by_chance and scope and not self._is_carried(value)):
                return "logits"
        if is_weight and self._is_gradient(value, maker, product is not None):
            return "gradients"
        if maker.collective and (is_weight or not maker.multiplies):
            return "collectives"
        if is_weight:
            return "temporaries"
        if self._is_kept(value, maker):
            return "activations"
        return "attention" if "attention" in module else "temporaries"

    def _is_gradient(self, value: Value, maker: Maker, is_product: bool) -> bool:
        if maker.parameter is not None or (maker.direction == "forward" and maker.module != "loss"):
            return False
        reduced = maker.collective in _REDUCTIONS
        return value.dtype == "f32" or reduced or (is_product and maker.collective is None)

    def _is_kept(self, value: Value, maker: Maker) -> bool:
        """Made by the forward pass for the backward pass."""
        if maker.direction != "forward":
            return False
        return maker.stacked or any(value.start < t <= value.end for t in self._backward)

    def _is_carried(self, value: Value) -> bool:
        """Whether a loop hands it on: a sum that grows, not an array for one turn."""
        one = self.makers.instruction(value.name)
        return one is not None and one.opcode in ("while", "parameter")

    def _buffer(self, part: Part, value: Value, maker: Maker, size: int) -> LiveBuffer:
        like = self._like(part, value, maker)
        shapes = {(a.shape, a.spec) for a in like}
        shape, spec = shapes.pop() if len(shapes) == 1 else (None, None)
        module = _common([_path(a) for a in like]) or maker.module
        # Collectives are joined across modules, and their metadata then tells of another one.
        strays = like and not f"{module}.".startswith(f"{maker.module}.")
        return LiveBuffer(
            part=part,
            bytes=size,
            dtype=value.dtype,
            shape=value.shape,
            logical_shape=shape,
            sharding=None if spec is None else sharding_text(spec),
            module=module,
            source="" if strays else maker.source,
            op_name=maker.op_name,
            instruction=value.name,
        )

    def _like(self, part: Part, value: Value, maker: Maker) -> list[Argument]:
        """The parameters that an array may belong to; none for what is no parameter's."""
        if self._arguments.get(maker.parameter) is not None:
            return [self._arguments[maker.parameter]]
        if part in ("gradients", "collectives"):
            return self._shapes.like(value.shape, maker.module)
        return self._shapes.named(maker.module)


class _Shapes:
    """Which arrays have the shape of a parameter, and which hold the vocabulary."""

    def __init__(self, step: CompiledStep):
        period = step.config.get("model", {}).get("global_every") or 1
        trained = _trained_layers(step.arguments)
        sizes = {axis.name: axis.size for axis in step.mesh}
        self._shares: dict[tuple[int, ...], list[tuple[tuple[int, ...], Argument]]] = {}
        self._vocabulary, self._heads = vocabulary_sizes(step), head_shapes(step)
        self._named: dict[str, Argument] = {}
        for argument in step.arguments:
            if argument.kind not in ("parameter", "extra"):
                continue
            self._named[_path(argument)] = argument
            for shape in _shares(argument, sizes, period, trained.get(_path(argument))):
                self._shares.setdefault(_plain(shape), []).append((_squeezed(shape), argument))

    def like(self, shape: tuple[int, ...], module: str = "") -> list[Argument]:
        """Parameters with arrays of this shape: in a module, if any are; in this order, if any are."""
        found = self._shares.get(_plain(shape), [])
        near = [
            (order, a) for order, a in found if f"{_path(a)}.".startswith(f"{module}.") and module
        ]
        found = near or found
        ordered = [(order, a) for order, a in found if order == _squeezed(shape)]
        return list({a.path: a for _, a in ordered or found}.values())

    def named(self, path: str) -> list[Argument]:
        return [self._named[path]] if path in self._named else []

    def has_vocabulary(self, shape: tuple[int, ...]) -> bool:
        return len(_plain(shape)) > 1 and not self._vocabulary.isdisjoint(shape)

    def is_whole_head(self, shape: tuple[int, ...]) -> bool:
        """Whether it could as well be the logits of as many tokens as the model has features."""
        return _plain(shape) in self._heads


def _path(argument: Argument) -> str:
    return argument.path.removeprefix("params.").removeprefix("extra.")


def _common(paths: Sequence[str]) -> str:
    """The path that all begin with, in whole names; of two stacks alike "*.layers.mlp"."""
    levels = list(zip(*(path.split(".") for path in paths), strict=False))
    is_same = lambda names: len(set(names)) == 1  # noqa: E731
    same = [names[0] for names in itertools.takewhile(is_same, levels)]
    if levels and not same:
        same = ["*", *(names[0] for names in itertools.takewhile(is_same, levels[1:]))]
    return ".".join(same) if same != ["*"] else ""


def _trained_layers(arguments: Sequence[Argument]) -> dict[str, int]:
    """How many layers of each stacked parameter are trained, by what the optimizer keeps of it."""
    stacked = {_path(a): a for a in arguments if a.kind == "parameter" and ".layers." in a.path}
    kept = [a for a in arguments if a.kind == "optimizer"]
    return {
        path: moment.shape[0]
        for path, one in stacked.items()
        for moment in kept
        if moment.path.endswith(f".{path}") and moment.shape[1:] == one.shape[1:] != ()
    }


def _shares(
    argument: Argument, sizes: Mapping[str, int], period: int, trained: int | None
) -> Iterable[tuple[int, ...]]:
    """Shapes that an array of a parameter takes while it is gathered or reduced; no vectors.

    period: of layers in one turn of their loop; trained: how many are, None for all.
    """
    choices = []
    for size, axes in zip(argument.shape, argument.spec, strict=True):
        parts = {1}
        for axis in axes:
            parts |= {part * sizes.get(axis, 1) for part in parts}
        choices.append({size // part for part in parts})
    for shape in itertools.product(*choices):
        found = [shape]
        if ".layers." in argument.path:
            layers, *one = shape
            found += [one, *((n, *one) for n in {trained} - {None, layers})]
            if period > 1:
                found += [(period, *one), (layers // period, period, *one)]
        yield from (tuple(s) for s in found if len(_plain(s)) > 1)


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _plain(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _einsum_output(op_name: str) -> str | None:
    """The labels of the result where the primitive belongs to an einsum."""
    found = re.search(r"->([.a-z]+)/[^/]*$", op_name)
    return found[1] if found else None


def _cover(covered: list[tuple[int, int]], begin: int, end: int) -> int:
    """Adds [begin, end) to disjoint pairs; the bytes that are new."""
    new, rest = end - begin, []
    low, high = begin, end
    for pair in covered:
        if pair[1] < begin or pair[0] > end:
            rest.append(pair)
            continue
        new -= max(0, min(end, pair[1]) - max(begin, pair[0]))
        low, high = min(low, pair[0]), max(high, pair[1])
    covered[:] = [*rest, (low, high)]
    return new


def _argument_buffer(argument: Argument, value: Value | None, size: int) -> LiveBuffer:
    return LiveBuffer(
        part=_OF_KIND[argument.kind],
        bytes=size,
        dtype=argument.dtype if value is None else value.dtype,
        shape=argument.shard_shape if value is None else value.shape,
        logical_shape=argument.shape,
        sharding=sharding_text(argument.spec),
        module=_path(argument),
        source="",
        op_name=argument.name,
        instruction="" if value is None else value.name,
    )


def _from_totals(step: CompiledStep, capacity: int, devices_per_chip: int) -> Memory:
    buffers = [_argument_buffer(a, None, a.bytes) for a in step.arguments]
    arguments = sum(buffer.bytes for buffer in buffers)
    if step.out_of_memory is not None:
        total = step.out_of_memory.needed
    elif step.memory is not None:
        m = step.memory
        total = m.arguments + m.outputs - m.aliased + m.temporaries
    else:
        total = arguments
    parts = dict.fromkeys(_PARTS, 0)
    for buffer in buffers:
        parts[buffer.part] += buffer.bytes
    parts["temporaries"] = max(0, total - arguments)
    total = max(total, arguments) * devices_per_chip
    if step.out_of_memory is not None:
        capacity = min(capacity, step.out_of_memory.available * devices_per_chip)
    return Memory(
        capacity=capacity,
        peak=total,
        parts={part: size * devices_per_chip for part, size in parts.items()},
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
        timeline=((0, total),),
        at="",
    )
