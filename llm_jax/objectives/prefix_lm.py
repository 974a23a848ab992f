"""The prefix language model of a decoder: a document's first part is read both ways, the rest predicted.

Raffel et al. 2019, section 3.2.1 (the mask of Dong et al. 2019, UniLM). Each document of a packed row is
cut at a random place. `prefix` marks the part before it: a query sees a key of its own document that
does not lie after it or that is marked. The marked tokens hence see all of each other and nothing else,
and what is in sight is no target.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.packing import next_token_batch
from llm_jax.core.randomness import RowRandom, scaled
from llm_jax.core.types import Tokenizer
from llm_jax.objectives.causal_lm import CausalLm


@dataclasses.dataclass(frozen=True)
class Config:
    """z_loss: weight of log(Z)^2, in training only (PaLM, section 5)."""

    name: str = "prefix_lm"
    z_loss: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss {self.z_loss} must not be negative")


class PrefixLm(CausalLm):
    """Rows and loss are those of next-token prediction.

    Generation reads a prompt causally, not as a prefix (generate/engine.py).
    """

    config: Config
    evaluators = ("held_out",)

    def transforms(self, tokenizer: Tokenizer) -> list:
        return [_transform(self.config, tokenizer.bos_id, tokenizer.eos_id)]

    def batch_spec(self, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
        prefix = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32)
        return super().batch_spec(batch_size, sequence_length) | {"prefix": prefix}


def _transform(config: Config, bos_id: int, eos_id: int):
    """The Grain transformation of {"rows", "row_ids"}."""
    import grain  # not at the top: a training step needs no loader, and runs where Grain is not

    class Prefix(grain.transforms.Map):
        def map(self, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            random = RowRandom(config.seed, element["row_ids"])
            return prefix_batch(element["rows"], bos_id, eos_id, random)

    return Prefix()


def prefix_batch(
    rows: np.ndarray, bos_id: int, eos_id: int, random: RowRandom
) -> dict[str, np.ndarray]:
    """`next_token_batch` of rows [B, T + 1] int32 with `prefix` [B, T] int32, 1 where a token is in one.

    The prefix of a document of n tokens in its row has 1 .. n - 1 of them, each as likely. Its last
    token has a target, the first that is out of sight; those before it have none.
    """
    batch = next_token_batch(rows, bos_id, eos_id)
    segment_ids, positions = batch["segment_ids"], batch["positions"]
    length = segment_ids.shape[1]
    changes = np.ones(segment_ids.shape, bool)
    np.not_equal(segment_ids[:, 1:], segment_ids[:, :-1], out=changes[:, 1:])
    starts = np.flatnonzero(changes)  # of documents and of padding
    sizes = np.diff(starts, append=segment_ids.size)
    numbers = segment_ids.ravel()[starts]
    draws = random.bits("prefix", int(numbers.max(initial=0)) + 1)[starts // length, numbers]
    prefix_sizes = (1 + scaled(draws, np.maximum(sizes - 1, 1))) * (numbers > 0)
    remaining = np.repeat(prefix_sizes.astype(np.int32), sizes).reshape(positions.shape) - positions
    batch["loss_weights"] *= remaining <= 1
    return batch | {"prefix": (remaining > 0).astype(np.int32)}


def make(config: Config) -> PrefixLm:
    return PrefixLm(config)
