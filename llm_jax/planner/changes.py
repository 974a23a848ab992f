"""Changes of a config that save memory, and what each saves, by arithmetic from the arrays at the peak.

A change is told as overrides, "model.remat=full", several with a space between them. Its savings are those
of the arrays that are alive at the peak now; where another moment takes over as the peak it saves less.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax.nn.remat import RematPolicy
from llm_jax.planner.compiled import CompiledStep
from llm_jax.planner.plan import LiveBuffer, Part

# From the policy that keeps most on the device to the one that keeps least.
_POLICIES: tuple[RematPolicy, ...] = RematPolicy.__args__
# Arrays that have a row for each row of the microbatch.
_OF_TOKENS: frozenset[Part] = frozenset({"activations", "attention", "logits", "temporaries"})
_STATE: frozenset[Part] = frozenset({"parameters", "optimizer", "gradients"})
# Arrays of the loss that have the head's vocabulary for a dimension.
_OF_HEAD: frozenset[Part] = frozenset({"logits", "gradients", "collectives"})
_LARGEST_FACTOR = 8


@dataclasses.dataclass(frozen=True)
class Change:
    """saves: bytes per device, of each array at the peak; costs: bytes that it needs besides.

    for_parts: the parts whose arrays it is proposed for. harm: what it costs otherwise, in order only.
    """

    override: str
    saves: tuple[int, ...]
    costs: int
    for_parts: frozenset[Part]
    harm: int

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
        *run.shares(), *run.kernels(), *run.microbatches(), *run.sequences(), *run.policies(),
        *run.vocabulary(), *run.moments(), *run.offload(),
    ]  # fmt: skip
    return sorted((c for c in found if c.total > 0), key=lambda change: change.harm)


class _Run:
    """One run's sizes on one device. rows, length: of a microbatch."""

    def __init__(self, step: CompiledStep, buffers: Sequence[LiveBuffer]):
        self.buffers = buffers
        self.sections: dict[str, Mapping[str, Any]] = collections.defaultdict(dict)
        self.sections |= {k: v for k, v in step.config.items() if isinstance(v, Mapping)}
        self.mesh = {axis.name: axis.size for axis in step.mesh}
        self.accumulate = self.sections["train"].get("accumulate_steps", 1)
        batch = next((a for a in step.arguments if a.path == "batch.tokens"), None)
        rows, self.length = batch.shard_shape if batch else (1, 1)
        self.rows = max(1, rows // self.accumulate)
        self.state = sum(a.bytes for a in step.arguments if a.kind == "parameter")
        dcn = self.sections["mesh"].get("dcn") or {}
        self.one_slice = all(size in (1, -1) for size in dcn.values())
        self.on_accelerator = step.target != "local" or step.device_kind.lower() not in ("", "cpu")

    def change(
        self, override: str, saves: Sequence[int], parts: frozenset[Part], harm: int, costs: int = 0
    ) -> Change:
        return Change(override, tuple(saves), costs, parts, harm)

    def microbatches(self) -> Iterator[Change]:
        """Fewer rows at once. The first step from one microbatch to several keeps a sum of gradients."""
        factor = 2
        while factor <= _LARGEST_FACTOR and self.rows % factor == 0:
            yield self.change(
                f"train.accumulate_steps={self.accumulate * factor}",
                [b.bytes - b.bytes // factor if self._has_rows(b) else 0 for b in self.buffers],
                _OF_TOKENS,
                harm=10 + factor,
                costs=self.state if self.accumulate == 1 else 0,
            )
            factor *= 2

    def sequences(self) -> Iterator[Change]:
        """A device that holds one row at a time takes half of it: pairs share a row."""
        fsdp, context = self.mesh.get("fsdp", 1), self.mesh.get("context", 1)
        whole = self.length * context
        if self.rows > 1 or fsdp % 2 or whole % (4 * context) or not self.one_slice:
            return
        yield self.change(
            f"mesh.fsdp={fsdp // 2} mesh.context={2 * context} "
            f"train.accumulate_steps={2 * self.accumulate}",
            [b.bytes // 2 if self._has_rows(b) else 0 for b in self.buffers],
            _OF_TOKENS,
            harm=30,
            costs=self.state if self.accumulate == 1 else 0,
        )

    def shares(self) -> Iterator[Change]:
        """Copies of the state become shares of it."""
        data, fsdp = self.mesh.get("data", 1), self.mesh.get("fsdp", 1)
        embed = self.sections["model"].get("embed_dim")
        factor = 2
        while self.one_slice and data % factor == 0 and embed and embed % (fsdp * factor) == 0:
            yield self.change(
                f"mesh.data={data // factor} mesh.fsdp={fsdp * factor}",
                [
                    b.bytes - b.bytes // factor if self._is_state(b, embed) else 0
                    for b in self.buffers
                ],
                _STATE,
                harm=factor.bit_length(),
            )
            factor *= 2

    def vocabulary(self) -> Iterator[Change]:
        """The head in shares: pairs of devices split its vocabulary, and heads and MLP with it."""
        fsdp, tensor = self.mesh.get("fsdp", 1), 2 * self.mesh.get("tensor", 1)
        model = self.sections["model"]
        vocabulary = model.get("vocab_size")
        split = (
            vocabulary,
            model.get("num_heads"),
            model.get("num_kv_heads"),
            model.get("mlp_dim"),
        )
        if fsdp % 2 or not self.one_slice or not all(size and size % tensor == 0 for size in split):
            return
        whole = 2 * vocabulary // tensor
        yield self.change(
            f"mesh.fsdp={fsdp // 2} mesh.tensor={tensor} train.accumulate_steps={2 * self.accumulate}",
            [b.bytes // 2 if b.part in _OF_HEAD and whole in b.shape else 0 for b in self.buffers],
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
                halves = (
                    b.bytes // 2 if mine and b.dtype == "f32" else 0
                    for b, mine in zip(self.buffers, of, strict=True)
                )
                override = f"optimizer.{key}=bfloat16"
                yield self.change(override, list(halves), frozenset({"optimizer"}), harm=60)

    def kernels(self) -> Iterator[Change]:
        """A kernel that never holds all scores of queries and keys."""
        kernel = self.sections["train"].get("attention_kernel")
        others = {"reference": "auto" if self.on_accelerator else "blockwise", "auto": "blockwise"}
        if kernel in others:
            yield self.change(
                f"train.attention_kernel={others[kernel]}",
                [b.bytes if self._is_scores(b) else 0 for b in self.buffers],
                frozenset({"attention", "activations"}),
                harm=5,
            )

    def policies(self) -> Iterator[Change]:
        """Less kept by the forward pass, computed again in the backward pass."""
        current = self.sections["model"].get("remat")
        if current in _POLICIES and self._per_token() and self.mesh.get("pipeline", 1) == 1:
            first = _POLICIES.index(current) + 1
            for index, policy in enumerate(_POLICIES[first:-1], first):
                override = f"model.remat={policy}"
                saves = self._dropped(policy)
                yield self.change(override, saves, frozenset({"activations"}), harm=20 + index)

    def offload(self) -> Iterator[Change]:
        """The inputs of the blocks in host memory: over a bus that is slow beside the device's own."""
        current = self.sections["model"].get("remat")
        if self.on_accelerator and current != "offload" and self._per_token():
            saves = self._dropped("offload")
            yield self.change("model.remat=offload", saves, frozenset({"activations"}), harm=50)

    def _dropped(self, policy: RematPolicy) -> list[int]:
        """Of each array the bytes that a policy does not keep, whatever else it does keep."""
        layers, tokens = self.sections["model"].get("num_layers", 1), self.rows * self.length
        room = collections.Counter()
        for elements in self._kept(policy):
            room[elements] += layers
        saves = [0] * len(self.buffers)
        # Where attention's result is as wide as the block's input, the one from attention is that.
        for index, buffer in sorted(
            enumerate(self.buffers), key=lambda item: "attention" in item[1].module.split(".")
        ):
            if buffer.part != "activations" or not buffer.module.startswith("stack"):
                continue
            depth = layers if buffer.shape and buffer.shape[0] == layers else 1
            elements = math.prod(buffer.shape) / depth / tokens
            if room[elements] >= depth:
                room[elements] -= depth
            else:
                saves[index] = buffer.bytes
        return saves

    def _per_token(self) -> dict[str, float]:
        """Elements per token of a layer's arrays; empty where the family's sizes are not known."""
        model, tensor = self.sections["model"], self.mesh.get("tensor", 1)
        needed = ("embed_dim", "num_heads", "num_kv_heads", "head_dim")
        if any(model.get(name) is None for name in needed):
            return {}
        embed, heads, kv_heads, size = (model[name] for name in needed)
        wide = (model.get("mlp_dim") or 0) / tensor
        residual = embed
        if self.sections["mesh"].get("rules") == "sequence":
            residual = embed / tensor
        return {
            "input": residual, "query": heads * size / tensor, "heads": heads / tensor,
            "keys": kv_heads * size / tensor, "out": embed, "wide": wide,
        }  # fmt: skip

    def _kept(self, policy: RematPolicy) -> list[float]:
        """Elements per token of each array of a layer that stays on the device; see nn/remat.py."""
        one = self._per_token()
        attention = [one["query"], one["heads"]]
        narrow = [one["query"], one["keys"], one["keys"], one["out"]]
        wide = [one["wide"]] * (2 if self.sections["model"].get("gated") else 1)
        more: dict[str, list[float]] = {
            "full": [],
            "attention": attention,
            "narrow": attention + narrow,
            "dots": narrow + wide,
            "dots_and_attention": attention + narrow + wide,
        }
        return [] if policy == "offload" else [one["input"], *more[policy]]

    def _has_rows(self, buffer: LiveBuffer) -> bool:
        if buffer.part not in _OF_TOKENS or buffer.logical_shape is not None:
            return False
        tokens = self.rows * self.length
        rows = self.rows if self.rows > 1 else self.length
        return rows in buffer.shape or tokens in buffer.shape

    def _is_state(self, buffer: LiveBuffer, embed: int) -> bool:
        shape = buffer.logical_shape
        return buffer.part in _STATE and shape is not None and len(shape) > 1 and embed in shape

    def _is_scores(self, buffer: LiveBuffer) -> bool:
        """[.., T, S] of attention."""
        of_attention = "attention" in buffer.module.split(".")
        whole = self.length * self.mesh.get("context", 1)
        last = sorted(buffer.shape[-2:])
        return of_attention and len(buffer.shape) > 3 and last == sorted((self.length, whole))
