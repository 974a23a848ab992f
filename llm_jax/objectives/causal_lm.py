"""Next-token prediction over packed documents."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.packing import next_token_batch
from llm_jax.core.types import Batch, LossOutput, Model, Tokenizer, Weighted
from llm_jax.nn.losses import token_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5); in training."""

    z_loss: float = 0.0
    name: str = "causal_lm"

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss {self.z_loss} must not be negative")


class CausalLm:
    def __init__(self, config: Config):
        self.config = config

    def row_length(self, sequence_length: int) -> int:
        """One token more than positions: each token but the first is a target."""
        return sequence_length + 1

    def transforms(self, tokenizer: Tokenizer) -> list:
        return [NextToken(tokenizer.bos_id, tokenizer.eos_id)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, sequence_length)
        dtypes = {"loss_weights": jnp.float32}
        names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
        return {n: jax.ShapeDtypeStruct(shape, dtypes.get(n, jnp.int32)) for n in names}

    def loss(self, model: Model, batch: Batch, *, key: jax.Array | None, train: bool) -> LossOutput:
        """Cross entropy in nats, summed over the weighted positions."""
        output = model(batch, train=train, key=key)
        losses = token_loss(output.logits, batch["targets"])
        weights = batch["loss_weights"]
        weight = jnp.sum(weights)
        total = lambda values: Weighted(jnp.sum(values * weights), weight)  # noqa: E731
        metrics = {
            "cross_entropy": total(losses.cross_entropy),
            "accuracy": total(losses.correct),
        }
        value = losses.cross_entropy
        if train and self.config.z_loss:
            z_loss = self.config.z_loss * jnp.square(losses.log_z)
            metrics["z_loss"] = total(z_loss)
            value = value + z_loss
        loss = total(value)
        return LossOutput(Weighted(loss.sum + output.aux_loss * weight, weight), metrics)


class NextToken(grain.transforms.Map):
    """{"rows": [B, T + 1] int32, -1 padding} to the batch of next-token prediction."""

    def __init__(self, bos_id: int, eos_id: int):
        self.bos_id, self.eos_id = bos_id, eos_id

    def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return next_token_batch(element["rows"], self.bos_id, self.eos_id)


def make(config: Config) -> CausalLm:
    return CausalLm(config)
