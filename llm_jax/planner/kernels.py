"""How long a Pallas kernel takes on a TPU; the compiler's own estimates leave them out.

Splash attention. Its grid goes over heads, blocks of queries and blocks of keys; a block of scores
that the mask hides costs a step without a body. The body is straight-line code, so libtpu's final
VLIW bundles, one a cycle, say what it takes (libtpu 0.0.42, dumped by `--xla_jf_dump_to`, which
writes a file `final_bundles` per kernel; T 2048, head_dim 128, causal, segments). `_BUNDLES` has
them: `scores` per 8 x 128 scores in the body, `step` per grid step around it, `edge` per 8 queries
(of dkv: keys) where a block of sums begins and ends. Where the matrix unit is slower than the
bundles it decides: each of the body's products multiplies 8 x 128 scores by head_dim, and one
narrower than the array uses it like a full one, so head_dim 128 runs the arrays of v6e and TPU7x,
256 wide, at half their rate. For a head_dim of 256 the bundles are up to 14 % more than assumed.

Other kernels may state a cost ("cost_estimate" in their backend_config): their FLOPs take the
matrix unit's rate. Grouped products of a mixture of experts (megablox `gmm` and `tgmm`, the
compiler's own `ragged-dot`) run tile by tile, and every expert but one adds up to a tile that two
of them share; all rows of their buffers count, full or not. Of what states nothing only the arrays
are known: it takes as long as HBM does.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.planner.chips import Chip
from llm_jax.planner.hlo_text import Instruction
from llm_jax.planner.plan import Kind
from llm_jax.planner.source import module_of

_VECTOR = 8 * 128  # elements of a vector register
_LANES = 128
_ROWS = 512  # of a tile of a grouped product


@dataclasses.dataclass(frozen=True)
class _Bundles:
    scores: float
    step: float
    edge: float


# By the width of the matrix unit: v5e and v5p, v6e and TPU7x.
_BUNDLES: Mapping[tuple[int, str], _Bundles] = {
    (128, "fwd"): _Bundles(4.55, 238, 10.9),
    (128, "dq"): _Bundles(5.85, 172, 2.7),
    (128, "dkv"): _Bundles(7.30, 186, 5.2),
    (256, "fwd"): _Bundles(3.35, 79, 5.5),
    (256, "dq"): _Bundles(4.02, 72, 1.3),
    (256, "dkv"): _Bundles(4.74, 161, 2.6),
}
# Models whose tokens do not see later ones; but for those in a module "encoder".
_CAUSAL = ("gpt", "encoder_decoder")
# Matrix products over each block of scores: with queries and keys, and for each result.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees by its position: none after it, and of those before it a window.

    mixed: some layers have the window and others none.
    """

    causal: bool
    window: int | None
    mixed: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Mask":
        """Of a resolved run; a model that is not known to be causal sees all."""
        model = config.get("model", {})
        causal = model.get("name") in _CAUSAL
        return cls(causal, model.get("attention_window"), model.get("global_every") is not None)

    def at(self, op_name: str, *, is_windowed: bool) -> "Mask":
        """Of the layers that an instruction belongs to. is_windowed: counts where layers are mixed."""
        window = self.window if is_windowed or not self.mixed else None
        return Mask(self.causal and "encoder" not in module_of(op_name).split("."), window)

    def blocks(self, length: int, query: int, key: int) -> int:
        """Blocks of scores with a visible one, of `length` queries and keys."""
        if not self.causal and self.window is None:
            return -(-length // query) * -(-length // key)
        count = 0
        for first in range(0, length, query):
            last = first + query - 1
            end = last if self.causal else last + (self.window or length) - 1
            end = min(end, length - 1)
            begin = max(0, first - self.window + 1) if self.window else 0
            count += end // key - begin // key + 1
        return count


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Of a run on one jax device. flops: of matrix products; seconds: None where HBM decides."""

    kind: Kind
    flops: float
    bytes: float
    seconds: float | None


def kernel_cost(
    one: Instruction, operands: Sequence[Instruction], mask: Mask, chip: Chip
) -> KernelCost:
    """Of a custom call "tpu_custom_call" or a fused attention of cuDNN.

    Args:
      operands: the instructions whose results it takes, in order.
    """
    shapes = [operand.shapes[0] for operand in operands if operand.shapes]
    moved = sum(x.bytes for op in operands for x in op.arrays if x.space == 0)
    moved += sum(array.bytes for array in one.arrays if array.space == 0)
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", one.name + one.op_name)
    if splash:
        return _splash(one, splash[1], shapes, moved, mask, chip)
    if re.match(r"(t?gmm|ragged-dot)\b", one.name):
        return _grouped(one, shapes, moved, chip)
    if "fmha" in one.target:
        rows, scored = _attended(shapes)
        products = 5 if "Backward" in one.target else 2
        window = re.search(r'"sliding_window_length":"?(\d+)', one.attributes.replace(" ", ""))
        is_windowed = window is not None and int(window[1]) > 0
        mask = mask.at(one.op_name, is_windowed=is_windowed)
        share = mask.blocks(scored, _LANES, _LANES) / (-(-scored // _LANES)) ** 2
        return KernelCost("attention", 2 * products * rows * scored * share, moved, None)
    return _stated(one, moved, chip, 1.0)


def _stated(one: Instruction, moved: float, chip: Chip, more: float) -> KernelCost:
    """By the kernel's own estimate of its FLOPs; more: how often these are done, on average."""
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.attributes)
    flops = float(found[1]) if found else 0.0
    if not flops or chip.peak_flops is None:
        return KernelCost("kernel", flops, moved, None)
    seconds = flops * more * chip.devices / chip.peak_flops
    return KernelCost("kernel", flops, moved, seconds)


def _attended(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[float, int]:
    """Elements of the queries, and keys that each of them meets; arrays are [B, T, N, H]."""
    return float(math.prod(shapes[0][1])), shapes[1][1][1]


def cores(chip: Chip) -> int:
    """TensorCores that one jax device runs a program on: 2 on v5p. Each has four matrix units."""
    arrays = chip.peak_flops / (2 * chip.mxu**2 * chip.clock_hz)
    return max(1, round(arrays / 4 / chip.devices))


def _splash(
    one: Instruction,
    part: str,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    moved: float,
    mask: Mask,
    chip: Chip,
) -> KernelCost:
    dense = [shape for dtype, shape in shapes if dtype in ("bf16", "f32") and len(shape) >= 3]
    query, key = dense[0], dense[1]
    heads, (length, head_dim), keys = math.prod(query[:-2]), query[-2:], key[-2]
    grid = next((shape for dtype, shape in shapes if len(shape) == 3), (1, 1, 1))
    block_query, block_key = _block_sizes(one, part, length, keys, grid)
    # A table of blocks is as wide as the longest row of visible ones: less than all only with a window.
    is_windowed = math.prod(grid[-2:]) < (length // block_query) * (keys // block_key)
    mask = mask.at(one.op_name, is_windowed=is_windowed)
    visited = mask.blocks(keys, block_query, block_key) * length / keys
    scores = heads * visited * block_query * block_key
    flops = 2.0 * _PRODUCTS[part] * scores * head_dim
    # Each step reads a block of keys and values, or of queries and their gradient.
    itemsize = 2 if any(dtype == "bf16" for dtype, _ in shapes) else 4
    streamed = block_query if part == "dkv" else block_key
    moved += 2 * heads * visited * streamed * head_dim * itemsize
    if chip.clock_hz is None or chip.mxu is None or chip.peak_flops is None:
        return KernelCost("attention", flops, moved, None)
    bundles = _BUNDLES[256 if chip.mxu >= 256 else 128, part]
    ended = keys if part == "dkv" else length
    per_head = bundles.step * math.prod(grid[-2:]) + bundles.edge * ended / 8 * head_dim / _LANES
    width = -(-head_dim // chip.mxu) * chip.mxu
    matrix = _PRODUCTS[part] * _VECTOR * width / (4 * chip.mxu**2)
    cycles = scores / _VECTOR * max(bundles.scores, matrix) + heads * per_head
    seconds = cycles / chip.clock_hz / _busy_cores(part, query, chip)
    return KernelCost("attention", flops, moved, seconds)


def _block_sizes(
    one: Instruction, part: str, length: int, keys: int, grid: Sequence[int]
) -> tuple[int, int]:
    """Of queries and keys, as the kernel's metadata says, else from the grid."""
    suffix = "" if part == "fwd" else f"_{part}"
    sizes = [
        re.search(rf'\bblock_{name}{suffix}\\*": (\d+)', one.attributes) for name in ("q", "kv")
    ]
    if all(sizes):
        return int(sizes[0][1]), int(sizes[1][1])
    return max(1, length // grid[-2]), max(1, keys // grid[-1])


def _busy_cores(part: str, query: Sequence[int], chip: Chip) -> float:
    """TensorCores at work: rows of a batch go to both, heads only in the forward pass."""
    independent = math.prod(query[:-2]) if part == "fwd" else math.prod(query[:-3])
    all_cores = cores(chip)
    return independent / -(-independent // all_cores)


def _grouped(
    one: Instruction, shapes: Sequence[tuple[str, tuple[int, ...]]], moved: float, chip: Chip
) -> KernelCost:
    """Rows by the experts' [E, D, F], or as a gradient to that."""
    arrays = [shape for _, shape in (*shapes, *one.shapes)]
    experts = next((shape[0] for shape in arrays if len(shape) == 3), 1)
    rows = max((shape[0] for shape in arrays if len(shape) == 2), default=0)
    tile = re.search(r'ragged_dot_tiling="(\d+)', one.attributes)
    tiles = max(1, rows // (int(tile[1]) if tile else _ROWS))
    return _stated(one, moved, chip, (tiles + experts - 1) / tiles)
