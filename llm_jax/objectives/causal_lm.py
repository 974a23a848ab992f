"""Next-token prediction over packed documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.packing import next_token_batch
from llm_jax.core.types import Batch, LossOutput, Model, Tokenizer, Weighted
from llm_jax.nn.losses import output_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5).

    It counts in training only, as do the losses of a mixture's routers.
    """

    z_loss: float = 0.0
    name: str = "causal_lm"

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss {self.z_loss} must not be negative")


class CausalLm:
    examples = False
    partner_rows = False
    evaluators = ("perplexity",)

    def __init__(self, config: Config):
        self.config = config

    def row_length(self, sequence_length: int) -> int:
        """One token more than positions: each token but the first is a target."""
        return sequence_length + 1

    def transforms(self, tokenizer: Tokenizer) -> list:
        return [next_token(tokenizer.bos_id, tokenizer.eos_id)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, sequence_length)
        dtypes = {"loss_weights": jnp.float32}
        names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
        return {n: jax.ShapeDtypeStruct(shape, dtypes.get(n, jnp.int32)) for n in names}

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """Cross entropy in nats, summed over the weighted positions."""
        output = model(batch, train=train, key=key)
        targets, weights = batch["targets"], batch["loss_weights"]
        z_loss = self.config.z_loss if train else 0.0
        with jax.named_scope("loss"):
            sums = output_loss(model, output, targets, weights, z_loss)
        weight = jnp.sum(weights)
        metrics = {
            "cross_entropy": Weighted(sums.cross_entropy_sum, weight),
            "accuracy": Weighted(sums.correct_sum, weight),
        }
        if z_loss:
            metrics["z_loss"] = Weighted(sums.z_loss_sum, weight)
        return LossOutput.of(output, sums.loss_sum, weight, metrics, train=train)


def next_token(bos_id: int, eos_id: int):
    """The Grain transformation of {"rows": [B, T + 1] int32, -1 padding} to next-token batches."""
    import grain  # not at the top: a training step needs no loader, and runs where Grain is not

    class NextToken(grain.transforms.Map):
        def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return next_token_batch(element["rows"], bos_id, eos_id)

    return NextToken()


def make(config: Config) -> CausalLm:
    return CausalLm(config)
