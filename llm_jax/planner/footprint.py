"""Memory of a training step by arithmetic: what is alive when most is.

Three moments compete. In the backward pass all that the layers keep is there, beside what one layer
works with; in the loss, the head's weights, their gradient and the logits of a chunk; at the end the
gradient of the embedding table. State and gradients in shares are there at all of them.

What a layer keeps per token, in elements of the compute dtype, follows nn/remat.py. What it works with
is counted as one of each array that the block names. Within 25 % of what libtpu allocates for the
configs of this repository (docs/planner.md); packing and padding are the compiler's.
"""

import dataclasses

from llm_jax.core.config import ConfigError
from llm_jax.nn.kernels.attention import choose
from llm_jax.nn.losses import CHUNK_BYTES, MIN_CHUNK_TOKENS
from llm_jax.nn.moe import MoeConfig
from llm_jax.planner.placement import Placement
from llm_jax.planner.plan import Memory, Part
from llm_jax.planner.stacks import StackShape
from llm_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Block:
    """Sizes of a layer on one device, elements per token. residual: where D lies in shares between
    blocks, "sequence" rules, it counts as less.

    query, keys: N * H, and K * H of keys and values each; mlp: F of each array [.., F], mlp_arrays of
    them; routed: what the experts of a token work with. statistics: float32 numbers that attention
    keeps. scores: of the plain kernel, S per head; 0 of the others. Of cross-attention: across is N * H,
    0 without any, memory the keys and values of the other stack, and scores_across S per head.
    """

    residual: float
    embed: float
    query: float
    keys: float
    mlp: float
    mlp_arrays: int
    routed: float
    statistics: float
    scores: float
    across: float = 0.0
    memory: float = 0.0
    scores_across: float = 0.0

    @classmethod
    def of(cls, run: RunConfig, placement: Placement, stack: StackShape) -> "Block":
        config = stack.transformer
        attention, mlp = config.attention, config.mlp
        tensor = placement.shares("heads")
        heads = attention.num_heads / tensor
        kernel = kernel_of(run, placement, stack)
        keys = attention.num_kv_heads / placement.shares("kv_heads") * attention.head_dim
        is_mixture = isinstance(mlp, MoeConfig)
        width = (mlp.shared_dim or 0) if is_mixture else mlp.mlp_dim
        return cls(
            residual=config.embed_dim
            * placement.shares("length")
            / placement.shares("residual_length"),
            embed=config.embed_dim,
            query=heads * attention.head_dim,
            keys=keys,
            mlp=width / placement.shares("mlp"),
            mlp_arrays=3 if mlp.gated else 2,
            routed=_routed(mlp, config.embed_dim, placement) if is_mixture else 0.0,
            statistics=heads if kernel in ("splash", "blockwise", "cudnn") else 0.0,
            scores=heads * stack.length if kernel == "reference" else 0.0,
            across=heads * attention.head_dim if stack.memory else 0.0,
            memory=2 * keys * stack.memory / stack.length,
            scores_across=heads * stack.memory,
        )

    def kept(self, policy: str, size: int) -> float:
        """Bytes per token that the forward pass keeps on the device for the backward pass.

        size: bytes of an element of the compute dtype.
        """
        # The product of the last matrix goes into the next layer's input, which is kept anyway.
        narrow = self.query + 2 * self.keys + self.embed
        if self.across:
            narrow += self.across + self.memory + self.embed
        products = narrow + self.mlp * (self.mlp_arrays - 1)
        attention = self.query * size + self.statistics * 4
        kept = {
            "offload": 0.0,
            "full": self.residual * size,
            "attention": self.residual * size + attention,
            "narrow": (self.residual + narrow) * size + attention,
            "dots": (self.residual + products) * size,
            "dots_and_attention": (self.residual + products) * size + attention,
        }
        if policy in kept:
            return kept[policy]
        everything = 3 * self.residual + products + self.query + 2 * self.keys + self.mlp
        everything += self.across + self.memory
        scores = self.scores + self.scores_across if size == 4 else 0.0  # nn/kernels/reference.py
        return (everything + self.routed + scores) * size + attention

    def at_work(self, size: int) -> float:
        """Bytes per token of a layer in its backward pass."""
        arrays = 2 * self.residual + 2 * self.embed + 2 * self.query + 2 * self.keys
        arrays += self.mlp * self.mlp_arrays + 3 * self.routed + 2 * (self.across + self.memory)
        return arrays * size + 3 * max(self.scores, self.scores_across) * 4


def kernel_of(run: RunConfig, placement: Placement, stack: StackShape) -> str:
    """The kernel of self-attention that training takes there.

    Raises:
      ConfigError: one was asked for that cannot run.
    """
    attention = stack.transformer.attention
    if stack.is_plain:
        return "reference"
    try:
        return choose(
            run.train.attention_kernel,
            placement.target.chip.kind,
            attention.spec,
            length=stack.length,
            head_dim=attention.head_dim,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            compute_dtype=run.train.compute_dtype,
            context_shares=placement.shares("length"),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _routed(mlp: MoeConfig, embed_dim: int, placement: Placement) -> float:
    """Elements per token of the rows that go to experts, with the slack of the exchange's buffers."""
    factor = 1.0
    if placement.shares("experts") > 1:
        factor = mlp.capacity_factor or mlp.round_factor
    hidden = mlp.mlp_dim / placement.shares("mlp") * (3 if mlp.gated else 2)
    return factor * mlp.experts_per_token * (2 * embed_dim + hidden)


def tokens_at_once(run: RunConfig, placement: Placement, length: int) -> float:
    """Of a microbatch on one device, with so many of a row; with a pipeline, the mean over its stages."""
    rows = placement.copies * run.train.microbatch_size / placement.shares("batch")
    return rows * length / placement.shares("length")


def element_size(run: RunConfig) -> int:
    return 2 if run.train.compute_dtype == "bfloat16" else 4


def footprint(run: RunConfig, placement: Placement) -> Memory:
    """The peak, part by part, without buffers or timeline."""
    target, size = placement.target, element_size(run)
    state = {
        "parameters": sum(weight.share for weight in placement.weights if not weight.frozen),
        "frozen": sum(weight.share for weight in placement.weights if weight.frozen),
        "optimizer": placement.optimizer_bytes,
        "batch": placement.batch_bytes,
    }
    gradients = _gradient_bytes(run, placement)
    kept = at_work = 0.0
    for stack in placement.stacks:
        block, tokens = (
            Block.of(run, placement, stack),
            tokens_at_once(run, placement, stack.length),
        )
        layers = stack.transformer.num_layers * placement.turns_per_item
        kept += tokens * layers * block.kept(run.model.remat, size)
        at_work = max(at_work, tokens * block.at_work(size))
    layer = {
        "gradients": gradients,
        "activations": kept + at_work,
        "collectives": _gathered_bytes(run, placement),
        "temporaries": _cast_bytes(placement, size),
    }
    moments = (
        layer,
        {"gradients": gradients, "activations": kept, **_loss_bytes(run, placement)},
        {"gradients": gradients, "collectives": _embedding_bytes(placement)},
    )
    parts: dict[Part, int] = {
        name: int(target.devices_per_chip * value)
        for name, value in (state | max(moments, key=lambda parts: sum(parts.values()))).items()
    }
    peak = sum(parts.values())
    return Memory(target.chip.hbm_bytes, peak, parts, (), (), "by arithmetic")


def _gradient_bytes(run: RunConfig, placement: Placement) -> float:
    """float32 as the parameters lie; twice where microbatches add up. A pipeline's stages add up whole."""
    shares = sum(weight.share * weight.trained for weight in placement.weights)
    if placement.shares("stage") > 1:
        shares += sum(4 * w.work * w.layers * w.trained for w in placement.weights if w.stacked)
    return shares * (2 if run.train.accumulate_steps > 1 else 1)


def _gathered_bytes(run: RunConfig, placement: Placement) -> float:
    """Whole weights at work: those of a layer and of the next, and a layer's gradient in float32."""
    size = element_size(run)
    layers = [w for w in placement.weights if w.stacked and w.gathered_over]
    if placement.shares("stage") > 1:
        return sum(size * weight.work * weight.layers for weight in layers)
    return sum((2 * size + 4) * weight.work for weight in layers)


def _cast_bytes(placement: Placement, size: int) -> float:
    """The shares of all layers in the compute dtype, which leave the loop over layers."""
    if size == 4:
        return 0.0
    # What a transform puts together is put together in each layer.
    layers = (w for w in placement.weights if w.stacked and w.kind != "small" and not w.frozen)
    return sum(weight.share * size / 4 for weight in layers)


def _loss_bytes(run: RunConfig, placement: Placement) -> dict[Part, float]:
    """Logits and their gradient of a chunk, as nn/head_loss.py cuts them; the head whole, twice."""
    head = placement.head
    if head is None:
        return {}
    size, embed = element_size(run), placement.stacks[-1].transformer.embed_dim
    tokens = tokens_at_once(run, placement, placement.head_length)
    vocab = head.work / embed
    chunk = min(tokens * vocab * 4, max(CHUNK_BYTES, MIN_CHUNK_TOKENS * vocab * 4))
    return {
        "logits": chunk * (1 + size / 4) + 4 * head.work * (head.trained > 0),
        "collectives": size * head.work,
        "temporaries": 2 * tokens * embed * size,
    }


def _embedding_bytes(placement: Placement) -> float:
    tables = [w for w in placement.weights if w.kind == "embedding"]
    return sum(4 * weight.work * (1 + weight.trained) for weight in tables if weight.gathered_over)
