"""A request on its way from the queue to its last token, on the host."""

import dataclasses

import jax

from llm_jax.generate.events import RowStream
from llm_jax.generate.sampler import SamplingConfig


@dataclasses.dataclass(eq=False)
class Request:
    """What was asked for, and how far it has come.

    prompt: ids that the model sees, an encoder's where there is one.
    decoder: ids that the decoder starts from: the prompt, or a pad token behind an encoder.
    number: of its randomness, beside the seed.
    scored: whether log probabilities of the prompt's tokens are asked for.
    generated: tokens that the host has read.
    issued: steps of its own that were sent to the device.
    written: places of the ring that its row has taken, those of steps after its end included.
    over: ended or cancelled; steps still on their way are not for it.
    """

    id: int
    prompt: list[int]
    decoder: list[int]
    sampling: SamplingConfig
    number: int
    top_alternatives: int
    scored: bool
    stream: RowStream
    generated: list[int] = dataclasses.field(default_factory=list)
    prompt_scores: list[jax.Array] = dataclasses.field(default_factory=list)
    issued: int = 0
    written: int = 0
    over: bool = False

    @property
    def wants_step(self) -> bool:
        return not self.over and self.issued < self.stream.limit

    @property
    def known(self) -> list[int]:
        """The tokens of which the ring has keys."""
        return [*self.decoder, *self.generated][: self.written]
