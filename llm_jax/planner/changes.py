"""Changes of a config that save memory, and what each saves, by arithmetic from the arrays at the peak.

A change is told as overrides, "model.remat=full", several with a space between them. Its savings are those
of the arrays that are alive at the peak now; where another moment takes over as the peak it saves less.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh

from llm_jax.nn.pipeline import count_microbatches
from llm_jax.nn.remat import RematPolicy
from llm_jax.planner.chips import chip_of
from llm_jax.planner.compiled import CompiledStep, MeshAxis
from llm_jax.planner.plan import LiveBuffer, Part
from llm_jax.planner.source import in_stack
from llm_jax.sharding.rules import DEFAULT_RULES, AxisRules, PipelineSchedule

# From the policy that keeps most on the device to the one that keeps least.
_POLICIES: tuple[RematPolicy, ...] = RematPolicy.__args__
# Arrays that have a row for each row of the microbatch.
_OF_TOKENS: frozenset[Part] = frozenset({"activations", "attention", "logits", "temporaries"})
_STATE: frozenset[Part] = frozenset({"parameters", "frozen", "optimizer", "gradients"})
# Arrays of the loss that have the head's vocabulary for a dimension.
_OF_HEAD: frozenset[Part] = frozenset({"logits", "gradients", "collectives"})
_LARGEST_FACTOR = 8
# Models that refuse a mesh with context.
_WHOLE_SEQUENCES = ("bert", "encoder_decoder")


@dataclasses.dataclass(frozen=True)
class Change:
    """saves: bytes per device, of each array at the peak; costs: bytes that it needs besides.

    for_parts: the parts whose arrays it is proposed for. harm: what it costs otherwise, in order only.
    """

    override: str
    saves: tuple[int, ...]
    for_parts: frozenset[Part]
    harm: int
    costs: int = 0

    @property
    def total(self) -> int:
        return sum(self.saves) - self.costs

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(part.partition("=")[0] for part in self.override.split())


def changes_for(step: CompiledStep, buffers: Sequence[LiveBuffer]) -> list[Change]:
    """What can be changed in this run, the least harmful first; changes that save nothing are left out."""
    run = _Run(step, buffers)
    found = [
        *run.shares(), *run.weights(), *run.kernels(), *run.microbatches(), *run.sequences(),
        *run.policies(), *run.vocabulary(), *run.moments(), *run.offload(),
    ]  # fmt: skip
    return sorted((c for c in found if c.total > 0), key=lambda change: change.harm)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Of one stack on a device: so many that a piece passes through in one turn, with so many tokens of a row.

    memory: tokens of a row that they attend to across, 0 without.
    """

    count: int
    length: int
    memory: int = 0


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """A microbatch in a pipeline: so many pieces of so many rows, that pass in so many turns."""

    count: int
    rows: int
    turns: int


class _Run:
    """One run's sizes on one device. rows, length: of a microbatch.

    mesh: sizes of all axes; within: of their part within a slice, which is what a config names.
    lengths: of all arrays of tokens; stacks: by the name of their module.
    """

    def __init__(self, step: CompiledStep, buffers: Sequence[LiveBuffer]):
        self.buffers = buffers
        self.sections: dict[str, Mapping[str, Any]] = collections.defaultdict(dict)
        self.sections |= {k: v for k, v in step.config.items() if isinstance(v, Mapping)}
        self.mesh = {axis.name: axis.size for axis in step.mesh}
        # GPUs and CPUs have networks too, but their hosts are no slices.
        on_tpu = chip_of(step.device_kind).kind == "tpu"
        self.within = {a.name: a.size // (_slices(a) if on_tpu else 1) for a in step.mesh}
        self.accumulate = self.sections["train"].get("accumulate_steps", 1)
        batch = next((a for a in step.arguments if a.path == "batch.tokens"), None)
        rows, self.length = batch.shard_shape if batch else (1, 1)
        self.lengths = {
            a.shard_shape[1] for a in step.arguments if a.kind == "batch" and a.shape[1:]
        }
        self.rows = max(1, rows // self.accumulate)
        self.state = sum(a.bytes for a in step.arguments if a.kind == "parameter")
        self.stages = self.mesh.get("pipeline", 1)
        self.rounds = self.sections["mesh"].get("pipeline_rounds", 1)
        self.stacks = self._stacks(step)
        self.pieces = self._in_pieces(1)
        self.zero1 = self.sections["mesh"].get("rules") == "zero1"
        self.on_accelerator = step.target != "local" or step.device_kind.lower() not in ("", "cpu")

    def microbatches(self) -> Iterator[Change]:
        """Fewer rows at once. The first step from one microbatch to several keeps a sum of gradients."""
        asked, factor = self.sections["mesh"].get("microbatches"), 2
        while factor <= _LARGEST_FACTOR and self.rows % factor == 0:
            then = self._in_pieces(factor)
            override = f"train.accumulate_steps={self.accumulate * factor}"
            if asked not in (None, then.count):
                override += f" mesh.microbatches={then.count}"
            yield Change(
                override,
                tuple(int(b.bytes * (1 - self._left(b, factor, then))) for b in self.buffers),
                _OF_TOKENS,
                harm=10 + factor,
                costs=self.state if self.accumulate == 1 else 0,
            )
            factor *= 2

    def sequences(self) -> Iterator[Change]:
        """A device that holds one row at a time takes half of it: pairs share a row."""
        fsdp, context = self.within.get("fsdp", 1), self.within.get("context", 1)
        if self.rows > 1 or fsdp % 2 or self.length % 4:  # each half in two chunks
            return
        if self.sections["model"].get("name") in _WHOLE_SEQUENCES:
            return
        yield Change(
            f"mesh.fsdp={fsdp // 2} mesh.context={2 * context} "
            f"train.accumulate_steps={2 * self.accumulate}",
            tuple(b.bytes // 2 if self._has_rows(b) else 0 for b in self.buffers),
            _OF_TOKENS,
            harm=30,
            costs=self.state if self.accumulate == 1 else 0,
        )

    def shares(self) -> Iterator[Change]:
        """Copies of the state become shares of it; under ZeRO stage 1 of the optimizer's alone."""
        data, fsdp = self.within.get("data", 1), self.within.get("fsdp", 1)
        embed = self.sections["model"].get("embed_dim")
        parts: frozenset[Part] = frozenset({"optimizer"}) if self.zero1 else _STATE
        factor = 2
        while data % factor == 0 and embed and embed % (self._shares_of_embed() * factor) == 0:
            yield Change(
                f"mesh.data={data // factor} mesh.fsdp={fsdp * factor}",
                tuple(
                    b.bytes - b.bytes // factor if self._is_state(b, parts) else 0
                    for b in self.buffers
                ),
                parts,
                harm=factor.bit_length(),
            )
            factor *= 2

    def weights(self) -> Iterator[Change]:
        """What ZeRO stage 1 keeps whole, in shares as its optimizer state."""
        parts: frozenset[Part] = frozenset({"parameters", "frozen", "gradients"})
        if self.zero1:
            yield Change(
                "mesh.rules=default",
                tuple(
                    b.bytes - b.bytes // self._shares_of_embed(b.sharding)
                    if self._is_state(b, parts)
                    else 0
                    for b in self.buffers
                ),
                parts,
                harm=self._shares_of_embed().bit_length(),
            )

    def vocabulary(self) -> Iterator[Change]:
        """The head in shares: pairs of devices split its vocabulary, and heads and MLP with it."""
        fsdp, shares = self.within.get("fsdp", 1), 2 * self.mesh.get("tensor", 1)
        tensor, model = 2 * self.within.get("tensor", 1), self.sections["model"]
        vocabulary = model.get("vocab_size")
        split = (
            vocabulary,
            model.get("num_heads"),
            model.get("num_kv_heads") or model.get("num_heads"),
            model.get("mlp_dim"),
        )
        if fsdp % 2 or not all(size and size % shares == 0 for size in split):
            return
        whole = 2 * vocabulary // shares
        yield Change(
            f"mesh.fsdp={fsdp // 2} mesh.tensor={tensor} train.accumulate_steps={2 * self.accumulate}",
            tuple(
                b.bytes // 2 if b.part in _OF_HEAD and whole in b.shape else 0 for b in self.buffers
            ),
            _OF_HEAD,
            harm=40,
            costs=self.state if self.accumulate == 1 else 0,
        )

    def moments(self) -> Iterator[Change]:
        """Half as many bits in the optimizer's first moment, and in AdamW's second."""
        optimizer = self.sections["optimizer"]
        adam = optimizer.get("name") == "adamw" and optimizer.get("beta2", 1) <= 0.99
        for key, leaf, allowed in (("momentum_dtype", "mu", True), ("variance_dtype", "nu", adam)):
            if optimizer.get(key) == "float32" and allowed:
                of = [b.part == "optimizer" and leaf in b.module.split(".") for b in self.buffers]
                halves = tuple(
                    b.bytes // 2 if mine and b.dtype == "f32" else 0
                    for b, mine in zip(self.buffers, of, strict=True)
                )
                override = f"optimizer.{key}=bfloat16"
                yield Change(override, halves, frozenset({"optimizer"}), harm=60)

    def kernels(self) -> Iterator[Change]:
        """A kernel that never holds all scores of queries and keys."""
        kernel = self.sections["train"].get("attention_kernel")
        biased = self.sections["model"].get("position") == "relative"
        if (
            biased or self.sections["objective"].get("name") == "prefix_lm"
        ):  # no other kernel will do
            return
        others = {"reference": "auto" if self.on_accelerator else "blockwise", "auto": "blockwise"}
        if kernel in others:
            yield Change(
                f"train.attention_kernel={others[kernel]}",
                tuple(b.bytes if self._is_scores(b) else 0 for b in self.buffers),
                frozenset({"attention", "activations"}),
                harm=5,
            )

    def policies(self) -> Iterator[Change]:
        """Less kept by the forward pass, computed again in the backward pass."""
        current = self.sections["model"].get("remat")
        if current in _POLICIES and self._per_token():
            first = _POLICIES.index(current) + 1
            for index, policy in enumerate(_POLICIES[first:-1], first):
                override = f"model.remat={policy}"
                saves = self._dropped(policy)
                yield Change(override, saves, frozenset({"activations"}), harm=20 + index)

    def offload(self) -> Iterator[Change]:
        """The inputs of the blocks in host memory: over a bus that is slow beside the device's own.

        Not in a pipeline, of which libtpu (0.0.42) compiles no such program.
        """
        current = self.sections["model"].get("remat")
        alone = self.on_accelerator and self.stages == 1
        if alone and current != "offload" and self._per_token():
            saves = self._dropped("offload")
            yield Change("model.remat=offload", saves, frozenset({"activations"}), harm=50)

    def _dropped(self, policy: RematPolicy) -> tuple[int, ...]:
        """Of each array the bytes that a policy does not keep, whatever else it does keep."""
        room = collections.Counter()
        for name, stack in self.stacks.items():
            for elements in self._kept(policy, stack):
                room[name, elements] += stack.count
        saves = [0] * len(self.buffers)
        # Where attention's result is as wide as the block's input, the one from attention is that.
        for index, buffer in sorted(
            enumerate(self.buffers), key=lambda item: "attention" in item[1].module.split(".")
        ):
            if buffer.part != "activations" or not in_stack(buffer.module):
                continue
            stacked = self._is_stacked(buffer)
            if self.stages > 1 and not stacked:  # what stands between the stages, not in the layers
                continue
            name = buffer.module.partition(".")[0]
            stack = self.stacks.get(name, _Layers(1, self.length))
            depth = stack.count if stacked else 1
            tokens = self.pieces.turns * self.pieces.rows * stack.length
            elements = math.prod(buffer.shape) / depth / tokens
            if room[name, elements] >= depth:
                room[name, elements] -= depth
            else:
                saves[index] = buffer.bytes
        return tuple(saves)

    def _in_pieces(self, factor: int) -> _Pieces:
        """So many times fewer rows; in as many pieces as the config asks for, where these divide them."""
        rows = self.rows // factor
        if self.stages == 1:
            return _Pieces(1, rows, 1)
        asked = self.sections["mesh"].get("microbatches")
        try:
            count = self._count(factor, asked)
        except ValueError:
            count = self._count(factor, None)
        return _Pieces(count, rows * self.stages // count, self.rounds * count + self.stages - 1)

    def _count(self, factor: int, asked: int | None) -> int:
        mesh = AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
        rules = AxisRules(mesh, pipeline=PipelineSchedule(asked, self.rounds))
        rows = self.sections["train"]["batch_size"] // (self.accumulate * factor)
        return count_microbatches(rules, self.sections["model"]["num_layers"], rows)

    def _is_stacked(self, buffer: LiveBuffer) -> bool:
        """Whether it holds something of all layers of a device; in a pipeline, of all turns."""
        of = self.stacks.get(buffer.module.partition(".")[0]) or next(iter(self.stacks.values()))
        stack = (of.count,) if self.stages == 1 else (self.pieces.turns, of.count)
        return buffer.shape[: len(stack)] == stack

    def _stacks(self, step: CompiledStep) -> dict[str, _Layers]:
        model = self.sections["model"]
        layers = model.get("num_layers", 1) // (self.stages * self.rounds)
        source = next((a for a in step.arguments if a.path == "batch.encoder_tokens"), None)
        if source is None:
            return {"stack": _Layers(layers, self.length)}
        memory, decoder = source.shard_shape[1], model.get("num_decoder_layers") or layers
        return {
            "encoder": _Layers(layers, memory),
            "decoder": _Layers(decoder, self.length, memory),
        }

    def _shares_of_embed(self, sharding: str | None = None) -> int:
        """Into how many a weight's embed dimension is cut, by axes that do not cut another of it."""
        axes = (axis for axis in DEFAULT_RULES["embed"] if axis not in (sharding or ""))
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    def _per_token(self) -> dict[str, float]:
        """Elements per token of a layer's arrays; empty where the family's sizes are not known."""
        model, tensor = self.sections["model"], self.mesh.get("tensor", 1)
        embed, heads = model.get("embed_dim"), model.get("num_heads")
        if embed is None or heads is None:
            return {}
        kv_heads = model.get("num_kv_heads") or heads
        size = model.get("head_dim") or embed // heads
        wide = (model.get("mlp_dim") or 0) / tensor
        residual = embed
        if self.sections["mesh"].get("rules") == "sequence":
            residual = embed / tensor
        return {
            "input": residual, "query": heads * size / tensor, "heads": heads / tensor,
            "keys": kv_heads * size / tensor, "out": embed, "wide": wide,
        }  # fmt: skip

    def _kept(self, policy: RematPolicy, stack: _Layers) -> list[float]:
        """Elements per token of each array of a layer that stays on the device; see nn/remat.py."""
        one = self._per_token()
        attention = [one["query"], one["heads"]]
        narrow = [one["query"], one["keys"], one["keys"], one["out"]]
        if stack.memory:
            attention += [one["query"]]
            narrow += [one["query"], one["out"]]
            narrow += [one["keys"] * stack.memory / stack.length] * 2
        wide = [one["wide"]] * (2 if self.sections["model"].get("gated") else 1)
        more: dict[str, list[float]] = {
            "full": [],
            "attention": attention,
            "narrow": attention + narrow,
            "dots": narrow + wide,
            "dots_and_attention": attention + narrow + wide,
        }
        return [] if policy == "offload" else [one["input"], *more[policy]]

    def _left(self, buffer: LiveBuffer, factor: int, then: _Pieces) -> float:
        """The share of an array that is left with so many times fewer rows, then in other pieces."""
        if not self._has_rows(buffer):
            return 1.0
        if self.stages > 1 and self._is_stacked(buffer):
            return then.turns * then.rows / (self.pieces.turns * self.pieces.rows)
        return 1 / factor

    def _has_rows(self, buffer: LiveBuffer) -> bool:
        if buffer.part not in _OF_TOKENS or buffer.logical_shape is not None:
            return False
        if self.stages > 1:
            in_pieces = (self.pieces.count, self.pieces.rows) in itertools.pairwise(buffer.shape)
            if in_pieces or self._is_stacked(buffer):
                return True
        lengths = self.lengths | {self.length}
        rows = {self.rows} if self.rows > 1 else lengths
        return not (rows | {self.rows * length for length in lengths}).isdisjoint(buffer.shape)

    def _is_state(self, buffer: LiveBuffer, parts: frozenset[Part]) -> bool:
        shape, embed = buffer.logical_shape, self.sections["model"].get("embed_dim")
        return buffer.part in parts and shape is not None and len(shape) > 1 and embed in shape

    def _is_scores(self, buffer: LiveBuffer) -> bool:
        """[.., T, S] of attention."""
        of_attention = "attention" in buffer.module.split(".")
        whole = self.length * self.mesh.get("context", 1)
        last = sorted(buffer.shape[-2:])
        return of_attention and len(buffer.shape) > 3 and last == sorted((self.length, whole))


def _slices(axis: MeshAxis) -> int:
    return math.prod(span.size for span in axis.spans if span.kind == "network")
