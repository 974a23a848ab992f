"""What the endpoints share."""

import dataclasses

from llm_jax.serve.chats import Chats
from llm_jax.serve.errors import ApiError, shown
from llm_jax.serve.insight import Insight
from llm_jax.serve.settings import ServeConfig
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class About:
    """name: what clients call the model; created: seconds since 1970; step: of its run, if there is one."""

    name: str
    created: int
    parameters: int
    step: int | None = None
    has_encoder: bool = False


@dataclasses.dataclass(frozen=True)
class Service:
    config: ServeConfig
    about: About
    worker: Worker
    vocabulary: Vocabulary
    insight: Insight
    chats: Chats | None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is here."""
        if name is not None and name != self.about.name:
            message = f"model {shown(name)} is not here; choices: {self.about.name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def new_tokens(self, asked: int | None, default: int | None, field: str = "max_tokens") -> int:
        """How many tokens a completion may get.

        Args:
          asked: None is the default, and that is None for as many as there may be.

        Raises:
          ApiError: more than this server allows.
        """
        most = self.worker.max_length
        most = most if self.config.max_tokens is None else min(most, self.config.max_tokens)
        if asked is None:
            return most if default is None else min(default, most)
        if asked > most:
            raise ApiError(400, f"{field} {asked} is above {most}, the most here", param=field)
        return asked

    def check_text(self, text: str, field: str) -> None:
        """Raises ApiError for a text that cannot fit, without making tokens of it."""
        if not text:
            raise ApiError(
                400,
                f"{field} is empty: to start a text from nothing, give the id of the token that starts texts",
                param=field,
            )
        most = self.worker.max_length * self.vocabulary.longest
        if len(text) > most:
            message = f"{field} has {len(text)} characters: the model has places for {self.worker.max_length} tokens"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
